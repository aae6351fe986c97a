"""The benchmarks' options: where rows go, shapes of one's own, and what the tables say in words."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from batches import INTERPRETED

from bench import bench_linear, bench_memory, harness, on_gpu, options, profile_step, providers, verdict
from bench.harness import Problem

pytestmark = pytest.mark.skipif(INTERPRETED, reason="arithmetic, natively")
ROOT = Path(__file__).resolve().parents[1]
SHAPE = "--rows 40 --vocab 300 --hidden 16 --dtype bf16 --active 0.2".split()


def parser_of_a_bench():
    parser = options.arguments("a bench")
    options.add_shape(parser, hidden=True)
    return parser


def parsed(*argv: str):
    return options.parse(parser_of_a_bench(), ["--device", "cpu", "--threads", "1", *argv])


def refusal(capsys, call, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_committed_rows_are_written_with_save_alone(capsys):
    scratch = ROOT / "build" / "bench" / "cpu"
    assert parsed().folder == parsed("--quick").folder == parsed(*SHAPE).folder == scratch
    assert parsed("--save").folder == harness.RESULTS / "cpu"
    assert parsed("--folder", "elsewhere", *SHAPE).folder == Path("elsewhere")
    assert "--quick" in refusal(capsys, parsed, "--quick", "--save")
    assert "own problems" in refusal(capsys, parsed, "--rows", "40", "--save")
    assert "not allowed with" in refusal(capsys, parsed, "--save", "--folder", "elsewhere")


def test_on_gpu_saves_its_rows():
    args = on_gpu.make_parser().parse_args(["--device", "cpu", "--threads", "1", "--quick"])
    assert options.settle(args).folder == harness.RESULTS / "cpu"


def test_no_script_finds_the_committed_rows_but_by_the_options():
    """Who writes rows gets the folder from bench.options; make bench asks for it by name."""
    texts = {path.stem: path.read_text() for path in (ROOT / "bench").glob("*.py")}
    asking = {name for name, text in texts.items() if "results_folder" in text}
    assert asking == {"harness", "options"}
    writing = {name for name, text in texts.items() if re.search(r"harness\.write\(|= compare\(|\bcompare\(", text)}
    helpers = {"_compare", "_gpu_stages"}
    assert writing - helpers >= {"bench_linear", "bench_logits", "bench_memory", "scaling", "bench_host"}
    assert all("options." in texts[name] for name in writing - helpers)
    makefile = (ROOT / "Makefile").read_text()
    loops = re.findall(r"for script in ([\w ]+); do.*?bench\.\$\$script( --save)?", makefile, re.DOTALL)
    saved = {name for names, save in loops if save for name in names.split()}
    names = "bench_logits bench_linear bench_memory bench_selection scaling bench_collectives machine_code"
    assert saved == set(names.split())


def test_a_shape_of_ones_own():
    own = bench_linear.problems(torch.device("cpu"), False)
    parser = parser_of_a_bench()
    assert options.chosen(parser, parsed(), own) == own
    wanted = Problem("linear", 40, 300, 16, torch.bfloat16, active_fraction=0.2)
    assert options.chosen(parser, parsed(*SHAPE), own) == [wanted]
    assert options.chosen(parser, parsed("--vocab", "300"), own) == [Problem("linear", 600, 300, 512)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--rows", "0"), "--rows: must be a positive integer; got 0"),
        (("--hidden", "-3"), "--hidden"),
        (("--dtype", "int8"), "--dtype: must be one of fp32, bf16, fp16; got int8"),
        (("--active", "0"), r"--active: must lie in \(0, 1\]; got 0"),
        (("--active", "much"), r"--active: must lie in \(0, 1\]; got much"),
        (("--rows", "64", "--active", "0.2"), "64 rows are 16 rollouts.* take 0.1875"),
        (("--rows", "7", "--active", "0.01"), "7 rows are 7 rollouts.* take 0.142857"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(capsys, argv, message):
    parser, own = parser_of_a_bench(), [Problem("linear", 600, 300, 16)]
    said = refusal(capsys, lambda: options.chosen(parser, parsed(*argv), own))
    assert re.search(message, said), said


def test_every_row_is_measured_and_as_many_have_an_advantage_as_was_said():
    for rows, share in ((40, 0.2), (64, 0.25), (63, 1.0), (17, 1.0)):
        batch = providers.inputs(Problem("logits", rows, 30, active_fraction=share), torch.device("cpu"))
        assert batch["targets"].numel() == rows
        active = (batch["advantages"] != 0).repeat_interleave(batch["targets"].shape[1])
        assert int(active.sum()) == share * rows


def row_of(provider: str, median: float, ratio: float, **other) -> dict:
    row = dict.fromkeys(harness.SCHEMA) | {"mode": "both", "baseline": "eager", "dtype": "fp32", "limit_ms": 2.0}
    row |= {"ratio_low": 0.9 * ratio, "ratio_high": 1.1 * ratio, "limit_bytes": 8, "limit_flops": 0}
    return row | {"provider": provider, "median_ms": median, "ratio": ratio} | other


def test_the_table_in_words():
    """Fastest is by the ratios, as times of a noisy machine do not compare; what computes less is left out."""
    rows = [
        row_of("eager", 20.0, 1.0, peak_mb=50.0),
        row_of("ours", 5.0, 0.25, note="all of it", peak_mb=40.0),
        row_of("peer", 4.0, 0.5, peak_mb=30.0),
        row_of("near", 5.0, 0.2525),
        row_of("half the work", 1.0, 0.05, peak_mb=1.0),
        row_of("absent", 1.0, 0.1, skipped="not installed"),
        row_of("ours", 1.0, 0.01, mode="forward"),
    ]
    loss = {"eager", "ours", "peer", "near", "absent"}
    said = verdict.of_times(rows, loss, {"copy": 4e9, "fp32": 1e12}).splitlines()
    assert said == [
        "Fastest: ours (all of it), 5 ms forward and backward, 4.00 times as fast as eager.",
        "Level with it, within 3 %: near.",
        "Next: peer, 2.00 times its time.",
        "It takes 2.50 times the limit of 2 ms (the memory traffic at 4 GB/s, as measured here).",
        "Least memory: peer, 30 MB above the inputs.",
    ]
    assert verdict.of_times(rows, {"absent"}, {}) == "Fastest: nobody ran."
    alone = verdict.of_times(rows[:1], {"eager"}, {"copy": 4e9})
    assert alone.startswith("Fastest: eager, 20 ms forward and backward.\n") and "Next" not in alone
    noisy = verdict.of_times([row_of("ours", 5.0, 0.25, ratio_high=0.75), rows[0]], loss, {"copy": 4e9})
    assert "Too noisy to rank by: the fastest's calls took 0.23 to 0.75 times eager's." in noisy
    products = row_of("ours", 1.0, 0.25, limit_flops=10**9, limit_ms=2.0)
    assert "no longer than the limit of 2 ms (the products at 1 TFLOP/s" in verdict.of_times(
        [products], loss, {"copy": 4e9, "fp32": 1e12}
    )
    unknown = verdict.of_times([row_of("ours", 1.0, 0.25, limit_ms=None)], loss, {})
    assert "How far from the limit: not known" in unknown


def test_peaks_and_stages_in_words():
    def peak(provider, largest, **peaks):
        found = {int(name[1:]): value for name, value in peaks.items()}
        return {"provider": provider, "largest_rows": largest, "skipped": None, "peaks": found}

    rows = [peak("eager", 60, n40=9.0), peak("ours", 240, n40=3.0), {**peak("gone", 900), "skipped": "not installed"}]
    assert verdict.of_peaks(rows, "linear", "eager", 40) == (
        "linear, least memory for 40 tokens: ours, 3 MB above the inputs; eager: 9 MB."
    )
    assert verdict.of_peaks(rows, "linear", "eager", None) == (
        "linear, most tokens within the budget: ours, 240 of those tried; eager: 60."
    )
    assert "nobody" in verdict.of_peaks(rows[2:], "linear", "eager", None)
    assert "nobody" in verdict.of_peaks(rows[2:], "linear", "eager", 40)
    assert verdict.of_stages({"logits": 3.0, "matrix products": 1.0}, 2.0).splitlines() == [
        "The step's operations take 4 ms, most of it logits: 75 %.",
        "It takes 2.00 times the limit of 2 ms (traffic or products, as measured here).",
    ]


def run(monkeypatch, capsys, main, *argv: str) -> str:
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--threads", "1", *argv])
    main()
    return capsys.readouterr().out


def committed() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in harness.RESULTS.rglob("*") if path.is_file()}


def test_the_linear_bench_at_a_shape_of_ones_own(monkeypatch, capsys, tmp_path):
    """Rows of that shape alone, below build/; a table and its words; nothing that is committed is touched."""
    before = committed()
    monkeypatch.setattr(options, "ROOT", tmp_path)
    monkeypatch.setattr(providers, "LINEAR", [p for p in providers.LINEAR if p.name in ("eager", "ours, one pass")])
    monkeypatch.setattr(harness, "measures_peaks", lambda device: False)
    monkeypatch.setattr(harness, "ceilings", lambda *rest: {"copy": 1e9, "bf16": 1e12})
    said = run(monkeypatch, capsys, bench_linear.main, *SHAPE, "--repeats", "3")
    assert "linear 40 x 300 x 16 bf16, 20 % active" in said
    assert re.search(r"^Fastest: (eager|ours, one pass).* forward and backward", said, re.MULTILINE)
    assert "the limit of" in said
    rows = harness.read(tmp_path / "build" / "bench" / "cpu" / "linear.jsonl")
    shapes = {(row["rows"], row["vocabulary"], row["hidden"], row["dtype"], row["active_fraction"]) for row in rows}
    assert shapes == {(40, 300, 16, "bf16", 0.2)} and len(rows) == 6
    assert committed() == before


def test_the_profile_at_a_shape_of_ones_own(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(profile_step, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "ceilings", lambda *rest, **keywords: {"copy": 1e9, "fp32": 1e12})
    said = run(monkeypatch, capsys, profile_step.main, "--provider", "logits:ours", "--rows", "40", "--vocab", "300")
    assert "one step, logits 40 x 300 fp32" in said and "The step's operations take" in said and "the limit of" in said
    wrong = ("--provider", "logits:ours", "--hidden", "8")
    assert "the logits path has none" in refusal(capsys, run, monkeypatch, capsys, profile_step.main, *wrong)


@pytest.mark.slow
@pytest.mark.skipif(not harness.measures_peaks(torch.device("cpu")), reason="peaks are read under Linux alone")
def test_memory_at_a_shape_of_ones_own(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(options, "ROOT", tmp_path)
    monkeypatch.setattr(providers, "LOGITS", [p for p in providers.LOGITS if p.name == "eager"])
    monkeypatch.setattr(providers, "LINEAR", [p for p in providers.LINEAR if p.name == "ours, one pass"])
    argv = ("--rows", "64", "--vocab", "20000", "--hidden", "16")
    said = run(monkeypatch, capsys, bench_memory.main, *argv)
    words = r"^linear, least memory for 64 tokens: ours, one pass, \d+ MB above the inputs\.$"
    assert re.search(words, said, re.MULTILINE)
    rows = harness.read(tmp_path / "build" / "bench" / "cpu" / "memory.jsonl")
    assert [(row["operation"], list(row["peaks"]), row["largest_rows"]) for row in rows] == [
        ("logits", ["64"], None), ("linear", ["64"], None),
    ]  # fmt: skip
    refused = refusal(capsys, run, monkeypatch, capsys, bench_memory.main, *argv, "--budget", "10")
    assert "--budget" in refused
