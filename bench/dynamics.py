"""How objectives differ in training: entropy, accuracy and length from one warmed-up model, several seeds each.

    python -m bench.dynamics run       # the pieces that are missing; stop and start it as you like
    python -m bench.dynamics figure    # docs/images/dynamics.png, and the tables of docs/dynamics.md on stdout

A piece is one objective and one seed. It is appended to bench/results/cpu/dynamics.jsonl once done: a row for each
evaluation, with the fields setting, objective, seed, step, and those of examples.rollouts.evaluate; reward is the mean
over the training steps since the last evaluation, seconds the time since the piece began.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

import a3po_kernels

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu" / "dynamics.jsonl"
FIGURE = ROOT / "docs" / "images" / "dynamics.png"
OBJECTIVES = ("grpo", "dapo", "psr", "nsr", "w_reinforce", "fork_tokens", "lp_reg", "a3po")
SEEDS = 8
# Everything a row depends on besides objective and seed; a change starts the table anew.
SETTING = {"warm_up": 700, "steps": 40, "prompts": 16, "samples": 8, "iterations": 2, "rate": 1e-4}
EVERY = 10
TABLES = (10, 40)  # early, and the end


def rows() -> list[dict]:
    """The rows of the present setting."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [row for row in map(json.loads, lines) if row["setting"] == SETTING]


def run_piece(objective: str, seed: int, folder: Path) -> list[dict]:
    """Trains once from the warmed-up model; gives a row for each evaluation, the first before training."""
    from transformers import LlamaForCausalLM

    from examples import arithmetic
    from examples.rollouts import evaluate
    from examples.train_plain import train

    tokens = arithmetic.tokenizer()
    model = LlamaForCausalLM.from_pretrained(folder)
    key = {"setting": SETTING, "objective": objective, "seed": seed, "torch": torch.__version__}
    start = time.perf_counter()
    found = [{**key, "step": 0, "reward": None, **evaluate(model, tokens), "seconds": 0.0}]
    rewards = []
    options = {name: value for name, value in SETTING.items() if name != "warm_up"}
    for metrics in train(model, tokens, getattr(a3po_kernels, objective)(), seed=seed, **options):
        rewards.append(metrics["reward"])
        if metrics["step"] % EVERY == 0:
            measured = {**evaluate(model, tokens), "seconds": round(time.perf_counter() - start, 1)}
            found.append({**key, "step": metrics["step"], "reward": statistics.fmean(rewards), **measured})
            rewards = []
    return found


def run(args: argparse.Namespace) -> None:
    from examples.rollouts import warm_up

    torch.set_num_threads(args.threads)
    warm_up(args.folder, SETTING["warm_up"])
    done = {(row["objective"], row["seed"]) for row in rows()}
    pieces = [(name, seed) for seed in range(args.seeds) for name in OBJECTIVES]
    mine = [piece for piece in pieces[args.worker :: args.workers] if piece not in done]
    for objective, seed in (bar := tqdm(mine)):
        bar.set_description(f"{objective}, seed {seed}")
        text = "".join(json.dumps(row) + "\n" for row in run_piece(objective, seed, args.folder))
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        # One write, so that workers may share the file.
        with RESULTS.open("a") as file:
            file.write(text)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error (NaN for one seed)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.fmean(values), error


def curve(data: list[dict], objective: str, field: str) -> tuple[list[int], list[float], list[float]]:
    """Steps, means over seeds and their standard errors."""
    steps = sorted({row["step"] for row in data if row["objective"] == objective})
    points = [
        mean_and_error([r[field] for r in data if r["objective"] == objective and r["step"] == step]) for step in steps
    ]
    return steps, [mean for mean, _ in points], [error for _, error in points]


def table(data: list[dict], step: int) -> str:
    """Each objective's evaluation at a step as a Markdown table: mean over seeds ± standard error over seeds."""
    fields = ("accuracy", "greedy_accuracy", "solved_once", "entropy", "length")
    lines = [
        "| objective | seeds | accuracy, sampled | accuracy, greedy | solved by one of 4 | entropy, nats | length |",
        "|---|---|---|---|---|---|---|",
    ]
    first = next(row for row in data if row["step"] == 0)
    lines.append("| before | | " + " | ".join(f"{first[f]:.3f}" for f in fields[:-1]) + f" | {first['length']:.1f} |")
    for name in OBJECTIVES:
        ends = [row for row in data if row["objective"] == name and row["step"] == step]
        if not ends:
            continue
        cells = []
        for field in fields:
            mean, error = mean_and_error([row[field] for row in ends])
            digits = 1 if field == "length" else 3
            cells.append(f"{mean:.{digits}f} ± {error:.{digits}f}")
        lines.append(f"| `{name}` | {len(ends)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(data: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {"accuracy": "held-out accuracy, sampled", "entropy": "entropy of held-out responses, nats",
              "length": "response length, tokens"}  # fmt: skip
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.5), layout="constrained")
    for axis, (field, title) in zip(axes, panels.items(), strict=True):
        for index, name in enumerate(OBJECTIVES):
            steps, means, errors = curve(data, name, field)
            style = {"color": f"C{index}", "linewidth": 2.5 if name == "a3po" else 1.3}
            axis.errorbar(steps, means, yerr=errors, capsize=2, label=name, **style)
        axis.set(title=title, xlabel="training step")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train the pieces that are missing")
    runner.add_argument("--seeds", type=int, default=SEEDS)
    runner.add_argument("--folder", type=Path, default=ROOT / "build" / "demo" / "warm-up")
    runner.add_argument("--threads", type=int, default=1)
    runner.add_argument("--worker", type=int, default=0, help="which of the workers this process is")
    runner.add_argument("--workers", type=int, default=1, help="how many processes share the pieces")
    commands.add_parser("figure", help="draw the figure and print the table")
    args = parser.parse_args()
    if args.command == "run":
        run(args)
    else:
        figure(rows(), FIGURE)
        for step in TABLES:
            print(f"After {step} steps:\n\n{table(rows(), step)}\n")


if __name__ == "__main__":
    main()
