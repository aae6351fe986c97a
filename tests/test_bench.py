"""The benchmarks: rows have the documented fields, pages show nothing else, and the GPU's call walks on a CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import bench_memory, gpus, harness, machine_code, on_gpu, profile_step, providers, report, scaling
from bench.harness import Problem

ROOT = Path(__file__).resolve().parents[1]
COMPARED = sorted(path for path in harness.RESULTS.rglob("*.jsonl") if path.stem in ("logits", "linear", "selection"))


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_rows_have_the_documented_fields(path):
    rows = harness.read(path)
    assert rows
    for row in rows:
        assert row.keys() == harness.SCHEMA.keys()
        if row["skipped"]:
            assert row["median_ms"] is None and row["ratio"] is None and row["percent_of_limit"] is None
        else:
            assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
            assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
            assert row["repeats"] >= 3 and row["commit"] and row["versions"]["torch"]
    assert {row["baseline"] for row in rows} <= {row["provider"] for row in rows}


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: page.name)
def test_every_number_of_a_page_is_in_the_rows(page):
    """The blocks are what the rows give, and under "Cost" no table with a measure stands outside of one."""
    text = page.read_text()
    assert report.BLOCK.search(text)
    assert report.render(text, report.blocks()) == text, "run: python -m bench.report"
    rest = report.BLOCK.sub("", text)
    if "## Cost" in rest:
        rest = rest[rest.index("## Cost") :].split("\n## ")[0]
    cells = re.findall(r"^\|.*\|$", rest, re.MULTILINE)
    assert not [cell for cell in cells if re.search(r"\d (ms|MB|%|GB/s)\b", cell)]


def test_a_changed_number_is_found():
    text = report.PAGES[0].read_text()
    made = report.blocks()
    number = re.search(r"\d+ ms", made["logits-first"])[0]
    assert report.render(text.replace(number, "12345 ms"), made) != text.replace(number, "12345 ms")
    with pytest.raises(KeyError):
        report.render("<!-- data:nothing -->\n<!-- end -->", made)


def test_no_gpu_number_without_a_gpus_rows():
    assert report.gpu([]) == report.NOT_MEASURED
    measured = [path for path in harness.RESULTS.iterdir() if path.is_dir() and path.name != "cpu"]
    assert (report.NOT_MEASURED in report.PAGES[0].read_text()) == (not measured)


def test_limits():
    """DESIGN's passes and products, for f = 0.25."""
    logits = Problem("logits", 8, 100, dtype=torch.bfloat16, active_fraction=0.25)
    assert [harness.limit(logits, mode) for mode in harness.MODES] == [(1600, 0), (2000, 0), (3600, 0)]
    linear = Problem("linear", 8, 100, 16, active_fraction=0.25)
    work = 8 * 100 * 16
    assert [harness.limit(linear, mode)[1] for mode in harness.MODES] == [2 * work, work, 3 * work]
    assert harness.limit(Problem("selection", 10), "forward") == (50, 0)
    assert harness.limit_ms(*harness.limit(logits, "both"), logits, {"copy": 3.6e6}) == pytest.approx(1.0)
    assert harness.limit_ms(1, 1, linear, {"copy": 1.0}) is None


def test_gpu_limits():
    """DESIGN: at full bandwidth an H200 issues 13.8 instructions a bf16 element of a kernel that only reads."""
    h200 = next(gpu for gpu in gpus.GPUS if gpu.name == "H200")
    times = h200.limits(13.8, "bf16", 1)
    assert times["instructions"] == pytest.approx(times["bytes"], rel=0.02)
    assert {gpu.target for gpu in gpus.GPUS} == set(machine_code.TARGETS)


def test_quantiles_and_fits():
    assert harness.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert harness.quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    exponent, r2 = scaling.fit([1, 2, 4, 8], [3.0, 12.0, 48.0, 192.0])
    assert exponent == pytest.approx(2.0) and r2 == pytest.approx(1.0)


def test_the_largest_that_fits():
    def measure(rows: int) -> float:
        return 5.0 + 0.1 * rows

    best, peaks = bench_memory.largest(measure, 100.0, 120, 6000, 3)
    assert peaks[best] <= 100.0 < measure(best + 2 * bench_memory.STEP)
    best, peaks = bench_memory.largest(measure, 10.0, 120, 6000, 3)
    assert best == 30 and all(rows > 0 for rows in peaks)
    assert bench_memory.largest(lambda rows: 500.0, 10.0, 120, 6000, 3)[0] is None
    assert bench_memory.largest(lambda rows: 5.0, 10.0, 120, 600, 3)[0] == 600


@pytest.mark.parametrize(
    "problem", [Problem("logits", 40, 300), Problem("linear", 40, 300, 16, active_fraction=0.2)], ids=str
)
def test_providers_compute_the_same_loss(problem):
    """Whoever runs here and claims DAPO gives eager's loss and gradients."""
    device = torch.device("cpu")
    batch = providers.inputs(problem, device)
    names = [name for name in ("logits", "hidden", "weight") if name in batch]

    def run(provider):
        inputs = providers.leaves(batch)
        watched = {name: inputs[name] for name in names}
        if "logits" in watched:
            watched = {"logits": batch["logits"].clone().requires_grad_()}
            inputs["logits"] = watched["logits"].view_as(watched["logits"])
        loss = provider.forward(inputs)
        return loss.detach(), torch.autograd.grad(loss, list(watched.values()))

    loss, gradients = run(providers.named(f"{problem.operation}:{providers.BASELINE}"))
    compared = 0
    for provider in providers.table(problem):
        if provider.missing(device) or provider.name == "torch.compile" or "a3po" in provider.name:
            continue
        if "bonus" in provider.name or provider.name.startswith("Liger"):  # another loss; Liger compiles
            continue
        found, others = run(provider)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
        for mine, right in zip(others, gradients, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-6)
        compared += 1
    assert compared >= 3


def test_providers_know_what_they_lack():
    cpu = torch.device("cpu")
    assert providers.named("logits:TRL logits kernel").missing(cpu)
    assert harness.Provider("x", print, ("no-such-package",)).missing(cpu) == "no-such-package is not installed"
    assert providers.named("linear:ours, one pass").missing(cpu) is None


def test_stages_of_a_profile():
    problem = Problem("linear", 100, 32000, 64)
    assert profile_step.stage("aten::addmm", [[100, 64], [64, 32000]], problem) == "matrix products"
    assert profile_step.stage("aten::exp_", [[50, 32000]], problem) == "logits"
    assert profile_step.stage("aten::where", [[100], [100]], problem) == "tokens (N numbers)"
    assert profile_step.stage("aten::index_select", [[100, 64]], problem) == "hidden states and weight"
    assert profile_step.stage("aten::copy_", [[100, 32000]], problem) == "copies and fills"


def row_of(name: str, provider: str, ratio: float) -> dict:
    row = dict.fromkeys(harness.SCHEMA)
    return row | {"provider": provider, "operation": name, "mode": "both", "active_fraction": 1.0, "ratio": ratio}


def test_floors(tmp_path):
    good = {key: 0.9 / floor for key, floor in on_gpu.FLOORS.items()}

    def write(ratios: dict) -> None:
        for name in {name for name, _ in ratios}:
            rows = [row_of(name, provider, ratio) for (n, provider), ratio in ratios.items() if n == name]
            harness.write(rows, tmp_path / f"{name}.jsonl", quiet=True)

    assert len(on_gpu.below_floor(tmp_path)) == len(on_gpu.FLOORS), "nothing was measured"
    write(good)
    assert on_gpu.below_floor(tmp_path) == []
    slow = next(iter(good))
    write({**good, slow: 1.1 / on_gpu.FLOORS[slow]})
    assert len(on_gpu.below_floor(tmp_path)) == 1


def call_on_gpu(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench.on_gpu", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_dry_run_walks_every_stage(tmp_path):
    ran = call_on_gpu("--dry-run", "--folder", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    done = json.loads((tmp_path / "on_gpu.json").read_text())
    assert list(done) == list(on_gpu.STAGES)
    others = {name: stage["status"] for name, stage in done.items() if stage["status"] != "passed"}
    if not torch.cuda.is_available():
        # Every test of a promise was found, and skipped for want of a GPU.
        assert others.pop("cuda tests") == others.pop("promises") == "skipped"
        assert done["promises"]["result"]["counts"]["skipped"] == 3
    assert others in ({}, {"sanitizer": "skipped"})
    checked = {(row["preset"], row["route"]) for row in done["correctness"]["result"]["rows"]}
    assert len(checked) == 12 * 4
    assert {path.name for path in tmp_path.glob("*.jsonl")} >= {"logits.jsonl", "linear.jsonl", "tuning.jsonl"}
    assert "stage" in ran.stdout and "correctness" in ran.stdout


def test_a_cut_off_run_keeps_what_it_has(tmp_path):
    ran = call_on_gpu(
        "--dry-run", "--folder", str(tmp_path), "--stages", "determinism", "tuning", "--limit", "0.01", "--check"
    )
    assert ran.returncode == 1 and "no time" in ran.stdout
    done = json.loads((tmp_path / "on_gpu.json").read_text())
    assert list(done) == ["environment", "determinism", "tuning"]
    assert done["environment"]["status"] == "passed" and done["tuning"]["status"] == "no time"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    ran = call_on_gpu("--quick")
    assert ran.returncode == 2 and "needs a CUDA GPU" in ran.stderr
