"""How objectives differ in training: accuracy, exploration and entropy from one warmed-up model, several seeds each.

    python -m bench.dynamics run                    # the pieces that are missing; stop and start it as you like
    python -m bench.dynamics run --study ablations  # those of one study of bench/dynamics_studies.py
    python -m bench.dynamics page                   # docs/images/dynamics-*.png, and the tables of docs/dynamics.md

A piece is one arm and one seed. It is appended to bench/results/cpu/dynamics.jsonl once done: a row for each
evaluation, with the fields setting, objective (the arm's label), seed, step, and those of examples.rollouts.evaluate;
reward is the mean over the training steps since the last evaluation, seconds the time since the piece began.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from bench.dynamics_studies import STUDIES, Arm, Study

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu" / "dynamics.jsonl"
PAGE = ROOT / "docs" / "dynamics.md"
IMAGES = ROOT / "docs" / "images"
HEADINGS = {
    "accuracy": "accuracy, sampled", "greedy_accuracy": "accuracy, greedy", "pass_at_4": "solved by one of 4",
    "solved_once": "solved by one of {}", "ways": "different right answers", "entropy": "entropy, nats",
    "length": "length",
}  # fmt: skip


def rows(study: Study) -> list[dict]:
    """The rows of a study's setting: those of studies that share it, too."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [row for row in map(json.loads, lines) if row["setting"] == study.setting]


def run_piece(study: Study, arm: Arm, seed: int, folder: Path) -> list[dict]:
    """Trains once from the warmed-up model; gives a row for each evaluation, the first before training."""
    from transformers import LlamaForCausalLM

    from examples import small_model
    from examples.rollouts import evaluate
    from examples.tasks import TASKS
    from examples.train_plain import train

    task = TASKS[study.task]
    tokens = small_model.tokenizer(task.CHARACTERS)
    model = LlamaForCausalLM.from_pretrained(folder)
    key = {"setting": study.setting, "objective": arm.label, "seed": seed, "torch": torch.__version__}
    measure = {"task": task, "samples": study.responses}
    # The same model and the same noise for every piece: measured once.
    known = [row for row in rows(study) if row["step"] == 0]
    first = known[0] if known else {"reward": None, **evaluate(model, tokens, **measure)}
    found = [{**first, **key, "step": 0, "seconds": 0.0}]
    rewards = []
    start = time.perf_counter()
    options = {name: value for name, value in study.setting.items() if name not in ("warm_up", "task", "responses")}
    options.update(seed=seed, task=task, reward_noise=arm.reward_noise)
    for metrics in train(model, tokens, arm.objective(), **options):
        rewards.append(metrics["reward"])
        if metrics["step"] % study.every == 0:
            measured = {**evaluate(model, tokens, **measure), "seconds": round(time.perf_counter() - start, 1)}
            found.append({**key, "step": metrics["step"], "reward": statistics.fmean(rewards), **measured})
            rewards = []
    return found


def missing(studies: list[Study]) -> list[tuple[Study, Arm, int]]:
    """Pieces that no row is there of, seed by seed, each once though several studies may want it."""
    pieces = {}
    for seed in range(max(study.seeds for study in studies)):
        for study in studies:
            done = {(row["objective"], row["seed"]) for row in rows(study)}
            for arm in study.arms if seed < study.seeds else ():
                if (arm.label, seed) not in done:
                    pieces.setdefault((study.task, arm.label, seed), (study, arm, seed))
    return list(pieces.values())


def run(args: argparse.Namespace) -> None:
    from examples.rollouts import warm_up
    from examples.tasks import TASKS

    torch.set_num_threads(args.threads)
    studies = [STUDIES[name] for name in args.study or STUDIES]
    mine = missing(studies)[args.worker :: args.workers]
    for study, arm, seed in (bar := tqdm(mine)):
        bar.set_description(f"{study.task}: {arm.label}, seed {seed}")
        folder = warm_up(args.folder, study.setting["warm_up"], task=TASKS[study.task])
        piece = run_piece(study, arm, seed, folder)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        # One write, so that workers may share the file.
        with RESULTS.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in piece))


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (NaN for one seed)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def _cell(field: str, values: list[float]) -> str:
    digits = 1 if field == "length" else 2 if field == "ways" else 3
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def table(study: Study, data: list[dict], step: int) -> str:
    """Each arm's evaluation at a step as a Markdown table: mean ± standard error over its seeds."""
    first = next(row for row in data if row["step"] == 0)
    fields = [field for field in HEADINGS if field in first and (study.responses > 4 or field != "ways")]
    titles = [HEADINGS[field].format(study.responses) for field in fields]
    lines = ["| objective | seeds | " + " | ".join(titles) + " |", "|---" * (2 + len(fields)) + "|"]
    lines.append("| before | | " + " | ".join(_cell(field, [first[field]]) for field in fields) + " |")
    for arm in study.arms:
        ends = [r for r in data if (r["objective"], r["step"]) == (arm.label, step) and r["seed"] < study.seeds]
        if ends:
            cells = [_cell(field, [row[field] for row in ends]) for field in fields]
            lines.append(f"| `{arm.label}` | {len(ends)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(study: Study, data: list[dict], path: Path) -> None:
    """Curves over the steps, mean and standard error over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"accuracy": "held-out accuracy, sampled", "solved_once": f"solved by one of {study.responses}",
              "entropy": "entropy of held-out responses, nats"}  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.5), layout="constrained")
    for axis, (field, title) in zip(axes, panels.items(), strict=True):
        for index, arm in enumerate(study.arms):
            mine = [row for row in data if row["objective"] == arm.label and row["seed"] < study.seeds]
            steps = sorted({row["step"] for row in mine})
            points = [mean_and_error([r[field] for r in mine if r["step"] == step]) for step in steps]
            style = {"color": f"C{index % 10}", "linewidth": 2.5 if arm.label == "a3po" else 1.3}
            means, errors = zip(*points, strict=True) if points else ((), ())
            axis.errorbar(steps, means, yerr=errors, capsize=2, label=arm.label, **style)
        axis.set(title=title, xlabel="training step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def with_tables(page: str) -> str:
    """The page with the table between each pair of marks <!-- study step --> and <!-- end --> made anew."""

    def made(match: re.Match) -> str:
        study = STUDIES[match[1]]
        return f"<!-- {match[1]} {match[2]} -->\n{table(study, rows(study), int(match[2]))}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) (\d+) -->\n.*?<!-- end -->", made, page, flags=re.DOTALL)


def page() -> None:
    for name in ("chain_sum", "countdown"):
        figure(STUDIES[name], rows(STUDIES[name]), IMAGES / f"dynamics-{name}.png")
    PAGE.write_text(with_tables(PAGE.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train the pieces that are missing")
    runner.add_argument("--study", action="append", choices=STUDIES, help="may be repeated; default: all")
    runner.add_argument("--folder", type=Path, default=ROOT / "build" / "warm-up", help="of warmed-up models")
    runner.add_argument("--threads", type=int, default=1)
    runner.add_argument("--worker", type=int, default=0, help="which of the workers this process is")
    runner.add_argument("--workers", type=int, default=1, help="how many processes share the pieces")
    commands.add_parser("page", help="draw the figures and renew the page's tables")
    args = parser.parse_args()
    if args.command == "run":
        run(args)
    else:
        page()


if __name__ == "__main__":
    main()
