"""bench.on_gpu: its floors, and that it walks its stages on a CPU, is cut off in time and keeps what it has."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import _sanitizer, _tuning, bench_linear, bench_logits, harness, kernel_cases, on_gpu, providers

ROOT = Path(__file__).resolve().parents[1]


def test_the_sanitizer_watches_our_kernels_alone():
    names = _sanitizer.kernel_names()
    assert len(names) >= 5 and all(name.endswith("_kernel") for name in names)
    assert {case.kernel.fn.__name__ for case in kernel_cases.cases()} <= set(names)
    chosen = _sanitizer.filters(["a_kernel", "b_kernel"], "  --kernel-regex arg   --kernel-regex-exclude arg")
    assert chosen == ["--kernel-regex", "kns=a_kernel", "--kernel-regex", "kns=b_kernel"]
    assert _sanitizer.filters(["a_kernel"], "--filter arg")[0] == "--filter"
    with pytest.raises(RuntimeError, match="by name"):
        _sanitizer.filters(names, "--kernels")


def test_the_swept_constants_exist():
    """setattr on a name that no kernel reads would time one configuration many times."""
    for _, module, choices in _tuning.SWEEPS:
        held = vars(importlib.import_module(module))
        for name, values in choices.items():
            assert name in held and len(set(map(repr, values))) == len(values) > 1


def row_of(name: str, provider: str, share: float, ratio: float) -> dict:
    row = dict.fromkeys(harness.SCHEMA)
    return row | {"provider": provider, "operation": name, "mode": "both", "active_fraction": share, "ratio": ratio}


def test_floors(tmp_path):
    good = {key: 0.9 / floor for key, floor in on_gpu.FLOORS.items()}

    def write(ratios: dict) -> None:
        for name in {key[0] for key in ratios}:
            rows = [row_of(*key, ratio) for key, ratio in ratios.items() if key[0] == name]
            harness.write(rows, tmp_path / f"{name}.jsonl", quiet=True)

    assert len(on_gpu.below_floor(tmp_path)) == len(on_gpu.FLOORS), "nothing was measured"
    write(good)
    assert on_gpu.below_floor(tmp_path) == []
    slow = next(iter(good))
    write({**good, slow: 1.1 / on_gpu.FLOORS[slow]})
    assert len(on_gpu.below_floor(tmp_path)) == 1


def test_floors_are_of_what_the_quick_run_measures():
    """Its providers on its problems: another name would only ever be "not measured"."""
    cuda = torch.device("cuda")
    quick = [*bench_logits.problems(cuda, True), *bench_linear.problems(cuda, True)]
    measured = {
        (problem.operation, provider.name, problem.active_fraction)
        for problem in quick
        for provider in providers.table(problem)
    }
    assert set(on_gpu.FLOORS) <= measured


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
    assert others.pop("sanitizer") == "skipped"
    assert others in ({}, {"trainer": "skipped"})
    checked = {(row["preset"], row["route"]) for row in done["correctness"]["result"]["rows"]}
    assert len(checked) == 12 * 6
    written = {path.name for path in tmp_path.glob("*.jsonl")}
    assert written >= {"host.jsonl", "logits.jsonl", "linear.jsonl", "tuning.jsonl"}
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
