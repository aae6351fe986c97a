"""The demo and the plain loop, briefly: options, names of runs, comparisons, and what the figures show."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")
from a3po_kernels import a3po, dapo, presets, psr
from examples import demo, figures, options, runs, small_model, train_plain
from examples.rollouts import DEMO, STUDY, warm_up

pytestmark = pytest.mark.trl
ROOT = Path(__file__).resolve().parents[2]


def ran(*command: str) -> str:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def read(*arguments: str):
    return options.read(options.shared_parser("", "build/demo"), list(arguments))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def common(folder):
    return (
        "--folder", str(folder), "--warm-up-folder", str(folder / "warm-up"), "--warm-up-steps", "3", "--steps", "2",
        "--threads", "1",
    )  # fmt: skip


def test_the_demo_writes_its_files(folder, common):
    out = ran("examples.demo", "--objective", "a3po", "--iterations", "2", "--seed", "3", *common)
    assert out.startswith("threads: 1") and "held-out accuracy" in out
    made = folder / "a3po-seed3"
    found = {path.name: path.stat().st_size for path in made.iterdir() if path.is_file()}
    assert found.keys() >= {"summary.json", "metrics.jsonl", "curves.jsonl", "curves.png"}
    assert found["curves.png"] > 10_000
    summary = json.loads((made / "summary.json").read_text())
    assert 0 <= summary["after"]["accuracy"] <= 1 and summary["objective"] == "a3po"
    assert summary["settings"]["seed"] == 3 and summary["seconds"] > 0
    rows = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]  # two batches of rollouts, two updates on each
    assert [row.get("reward") is None for row in rows] == [False, True, False, True]


def test_a_comparison_trains_what_is_not_there_and_overlays_the_curves(folder, common):
    ran("examples.train_plain", "--objective", "dapo", *common)
    before = (folder / "dapo-seed0" / "summary.json").stat().st_mtime_ns
    out = ran("examples.train_plain", "--compare", "dapo", "lp_reg", *common)
    assert "dapo-seed0 is there" in out and "lp_reg-seed0 is there" not in out
    assert (folder / "dapo-seed0" / "summary.json").stat().st_mtime_ns == before
    assert (folder / "lp_reg-seed0" / "curves.png").exists()
    assert (folder / "dapo-lp_reg-seed0.png").stat().st_size > 10_000


def test_a_run_is_named_by_objective_and_seed_and_below_its_task():
    assert runs.run_folder(read(), "a3po") == Path("build/demo/a3po-seed0")
    assert runs.run_folder(read("--seed", "4", "--folder", "x"), "dapo") == Path("x/dapo-seed4")
    assert runs.run_folder(read("--task", "countdown"), "dapo") == Path("build/demo/countdown/dapo-seed0")


def test_a_run_is_kept_for_its_own_settings_alone(tmp_path, capsys):
    args = read("--folder", str(tmp_path))
    ends = {"accuracy": 0.5, "standard_error": 0.1, "greedy_accuracy": 0.5}
    history = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.75}]

    def train(args, objective, folder):
        return runs.Trained(history, history, ends, ends, "cpu")

    made = runs.made(runs.run_folder(args, "dapo"), args, "dapo", train)
    assert runs.kept(runs.run_folder(args, "dapo"), args) == made
    assert runs.kept(runs.run_folder(args, "grpo"), args) is None
    for other in (("--steps", "7"), ("--rate", "1e-3"), ("--iterations", "2"), ("--warm-up-steps", "9")):
        args = read("--folder", str(tmp_path), *other)
        assert runs.kept(runs.run_folder(args, "dapo"), args) is None
        assert "other options" in capsys.readouterr().out

    def broken(args, objective, folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.made(runs.run_folder(args, "dapo"), args, "dapo", broken)
    assert runs.kept(runs.run_folder(args, "dapo"), args) is None  # not the old one under the new one's name


REFUSED = {
    ("--objective", "a3p0"): "one of a3po, cispo, ",
    ("--compare", "dapo", "foo"): "one of a3po, cispo, ",
    ("--compare", "dapo"): "two objectives or more, each once; got dapo",
    ("--compare", "dapo", "a3po", "dapo"): "each once; got dapo a3po dapo",
    ("--task", "chain"): "task must be one of chain_sum, countdown; got 'chain'; did you mean 'chain_sum'?",
    ("--steps", "0"): "--steps: must be above 0; got 0",
    ("--steps", "1.5"): "--steps: invalid int value: '1.5'",
    ("--rate", "nan"): "--rate: must be above 0; got nan",
    ("--seed", "-1"): "--seed: must be above -1; got -1",
    ("--objective", "dapo", "--compare", "dapo", "a3po"): "not allowed with argument",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_a_wrong_option_is_refused_with_what_it_takes(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        read(*arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and REFUSED[arguments] in said
    if arguments[-1] in ("a3p0", "foo"):
        assert all(name in said for name in presets) and f"got {arguments[-1]!r}" in said


def refused(program, monkeypatch, capsys, *arguments: str) -> str:
    """What a program prints, called with these arguments, before it ends without having begun."""
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with pytest.raises(SystemExit):
        program.main()
    return "".join(capsys.readouterr())


@pytest.mark.parametrize("program", [demo, train_plain], ids=["demo", "train_plain"])
def test_both_programs_have_the_same_options(program, monkeypatch, capsys):
    shared = set(re.findall(r"^  (--[a-z-]+)", options.shared_parser("", "").format_help(), re.MULTILINE))
    assert {"--objective", "--compare", "--seed", "--task", "--steps", "--rate", "--iterations", "--folder"} <= shared
    assert shared <= set(refused(program, monkeypatch, capsys, "--help").split())
    assert "one of a3po, cispo" in refused(program, monkeypatch, capsys, "--objective", "foo")


def test_a_share_of_wrong_rewards_is_a_share(monkeypatch, capsys):
    assert "must lie in [0, 1]; got 2" in refused(train_plain, monkeypatch, capsys, "--reward-noise", "2")


def make(name: str, **values: list) -> figures.Run:
    steps = len(next(iter(values.values())))
    history = [{"step": i + 1, **{key: value[i] for key, value in values.items()}} for i in range(steps)]
    ends = {"accuracy": 0.5, "standard_error": 0.1}
    return figures.Run(name, history, ends, ends)


def titles(*made: figures.Run) -> list[str]:
    return [panel.title.split(",")[0].split(" (")[0] for panel in figures.panels_of(list(made))]


def test_panels_without_anything_to_show_are_left_out(tmp_path):
    full = make("a3po", reward=[0.5, None], entropy=[0.1, 0.2], length=[9.0, 9.0], beta=[2.0, 1.9],
                clipped=[0.1, 0.0], clipped_low=[0.1, 0.0], clipped_high=[0.0, 0.0], active=[1.0, 0.5])  # fmt: skip
    bare = make("dapo", reward=[0.5, 0.5], entropy=[0.1, 0.2], length=[math.nan, None], clipped=[0.0, 0.0],
                clipped_low=[0.0, 0.0], active=[1.0, 0.9])  # fmt: skip
    assert titles(bare) == ["reward", "entropy", "share with a gradient"]
    assert titles(full) == [
        "reward", "entropy", "response length", "weight of the selected tokens", "clipped tokens",
        "share with a gradient",
    ]  # fmt: skip
    assert titles(bare, full) == titles(full)
    for several in ([bare], [full], [bare, full]):
        drawn = figures.draw_curves(several, "a title", tmp_path / "curves.png")
        assert drawn == figures.panels_of(several)


def test_beta_is_of_objectives_that_select_tokens():
    row = {"step": 1, "weight": 2.0}
    assert runs.renamed(row, {"beta": "weight"}, a3po()) == {"step": 1, "beta": 2.0}
    for objective in (dapo(), psr()):
        assert runs.renamed(row, {"beta": "weight"}, objective) == {"step": 1}


def lines(run: figures.Run, name: str):
    """What is drawn of one curve: label and points of each line."""
    panel = next(panel for panel in figures.PANELS if name in panel.curves)
    axis = figures.plt.figure().add_subplot()
    figures._draw(axis, panel, name, run, "C0", figures.label_of(name, panel.curves[name], run))
    found = [(line.get_label(), list(line.get_ydata())) for line in axis.get_lines()]
    figures.plt.close("all")
    return found


def test_beta_is_drawn_as_it_is_and_noise_with_its_mean():
    values = [2.0, 1.0, 2.0, 1.0]
    assert lines(make("a3po", beta=values), "beta") == [("β", values)]
    (_, raw), (label, mean) = lines(make("a3po", reward=values), "reward")
    assert raw == values and label == "reward" and mean == figures.smooth(values) != values


def test_the_entropy_of_all_names_the_rollouts_of_advantage_0():
    run = make("a3po", entropy=[0.1] * 20, no_advantage=[0.25] * 10 + [0.5] * 10)
    assert lines(run, "entropy")[1][0] == (
        "all, with those of advantage 0:\n25% of rollouts at first, 50% at last"
    )  # fmt: skip


def test_beside_others_a_panel_is_of_one_curve_and_named_after_it():
    for panel in figures.PANELS:
        assert panel.names(1) == list(panel.curves) and panel.heading(1) == panel.title
        assert len(panel.names(2)) == 1
    found = {panel.names(2)[0]: panel.heading(2) for panel in figures.PANELS}
    assert found["entropy"].endswith("all rollouts, those of advantage 0 too")
    assert found["active"] == "tokens with a gradient, share" and found["clipped"] == "clipped tokens, share"


def test_text_stands_out_on_every_cell():
    """Black or white, at a contrast of 4.5 to 1 (WCAG AA) on every colour of the maps."""
    for name in ("OrRd_r", "Purples"):
        for value in range(256):
            colour = figures.matplotlib.colormaps[name](value)
            linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
            light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
            black, white = (light + 0.05) / 0.05, 1.05 / (light + 0.05)
            assert max(black, white) > 4.5
            assert figures.text_colour(colour) == ("k" if black > white else "w")


def test_no_rollout_is_shown_twice():
    rewards, advantages = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0]
    problems = ["p", "q", "q", "r", "q", "s", "t"]
    responses = ["a", "b", "c", "b", "d", "e", "f"]
    # Not 0, of advantage 0; not 2 and 4, whose problem is shown; not 3, whose response is.
    assert demo.chosen(rewards, advantages, problems, responses) == [1, 6, 5]
    assert demo.chosen(rewards, advantages, problems, responses, each=1) == [1, 5]


def test_the_model_of_the_studies_is_the_one_their_rows_are_of(tmp_path):
    """bench.dynamics warms up without a recipe; the demo's smaller model is kept under another name."""
    assert (STUDY.size, STUDY.batch, STUDY.rate, STUDY.name) == (small_model.Size(128, 384, 4), 64, 2e-3, "")
    assert warm_up(tmp_path, 2).name == "arithmetic-2"
    assert warm_up(tmp_path, 2, recipe=DEMO).name == "arithmetic-small-2"
    tokens = small_model.tokenizer("01")
    assert sum(p.numel() for p in small_model.model(tokens).parameters()) > 4 * sum(
        p.numel() for p in small_model.model(tokens, DEMO.size).parameters()
    )


def test_the_plain_loop_is_short():
    assert len((ROOT / "examples" / "train_plain.py").read_text().splitlines()) < 150
