"""The stages of bench.on_gpu: each takes the Context and gives a result, a dictionary that says whether it passed."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import _gpu_checks, _sanitizer, _tuning, harness
from bench.harness import ROOT


@dataclass
class Context:
    """What the stages share."""

    args: argparse.Namespace
    device: torch.device
    folder: Path
    deadline: float
    done: dict[str, dict]

    @property
    def dry(self) -> bool:
        return self.args.dry_run

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def call(self, *command: str, most: float = 600.0) -> subprocess.CompletedProcess:
        """Another python process within what is left of the time."""
        return subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=max(min(self.left(), most), 1)
        )  # fmt: skip


def environment(context: Context) -> dict:
    """Versions, and the measured ceilings: copy bandwidth and GEMM rate."""
    packages = ("trl", "liger-kernel", "verl", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")
    found = harness.environment(context.device, packages)
    dtypes = (torch.float32,) if context.dry else (torch.bfloat16, torch.float32)
    found["ceilings"] = harness.ceilings(context.device, dtypes, quick=context.dry)
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        found["memory_gb"] = properties.total_memory / 1e9
        found["multiprocessors"] = properties.multi_processor_count
    return found


PROMISES = "synchronisation or recompile or two_to_the_31"


def pytest_cuda(context: Context, name: str, *options: str, seconds: float) -> dict:
    """`pytest -m cuda`: counts, and each failure by name."""
    if harness.version("pytest") is None:
        return {"skipped": "pytest is not installed"}
    report = context.folder / f"{name}.xml"
    report.unlink(missing_ok=True)
    ran = context.call("-m", "pytest", "-q", "-m", "cuda", f"--junitxml={report}", *options, most=seconds)
    if not report.exists():
        return {"passed": False, "output": (ran.stdout + ran.stderr)[-4000:]}
    outcomes = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        bad = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = outcome
    counts = {kind: sum(outcome == kind for outcome in outcomes.values()) for kind in ("passed", "failed", "skipped")}
    found = {"counts": counts, "failures": [test for test, outcome in outcomes.items() if outcome == "failed"]}
    if counts["passed"] + counts["failed"] == 0:
        return {**found, "skipped": f"all {counts['skipped']} tests skipped: no GPU"}
    return {**found, "outcomes": outcomes if len(outcomes) < 20 else None, "passed": not found["failures"]}


def cuda_tests(context: Context) -> dict:
    """All of them; most of their time is the compiler's, on the host, so several at a time."""
    several = ["-n", "14", "--dist", "worksteal"] if harness.version("pytest-xdist") and not context.dry else []
    return pytest_cuda(
        context, "cuda_tests", *several, "tests/test_autograd.py" if context.dry else "tests", seconds=240
    )


def promises(context: Context) -> dict:
    """No host synchronisation, CUDA-graph capture, no recompilation, more than 2^31 elements: their tests by name."""
    files = ("tests/test_autograd.py", "tests/test_token_logprobs.py")
    return pytest_cuda(context, "promises", "-k", PROMISES, *files, seconds=90)


def _sizes(context: Context) -> tuple[int, int, int]:
    return (80, 1000, 64) if context.dry else (8192, 151936, 1024)


def correctness(context: Context) -> dict:
    """Every preset by every route against fp64, at full size on a slice of the gradient."""
    found = _gpu_checks.check_all(*_sizes(context), torch.bfloat16, context.device)
    failed = [(row["preset"], row["route"]) for row in found if not row["passed"]]
    return {"rows": found, "failures": failed, "passed": not failed}


def determinism(context: Context) -> dict:
    found = _gpu_checks.deterministic(*_sizes(context), torch.bfloat16, context.device)
    return {"rows": found, "passed": all(row["passed"] for row in found)}


def benchmark(name: str, seconds: float) -> Callable[[Context], dict]:
    """bench.bench_<name>, which begins no further problem after so many seconds."""

    def go(context: Context) -> dict:
        options = ["--folder", str(context.folder), "--device", str(context.device), "--limit", str(seconds)]
        options += ["--quick"] if context.dry or context.args.quick else []
        options += ["--repeats", "1"] if context.dry else []
        ran = context.call("-m", f"bench.bench_{name}", *options, most=3 * seconds + 30)
        return {
            "passed": ran.returncode == 0,
            "table": ran.stdout,
            "error": ran.stderr[-2000:] if ran.returncode else "",
        }

    return go


def trainer(context: Context) -> dict:
    """A few steps of A3POTrainer beside GRPOTrainer, in an environment that has them."""
    missing = [name for name in ("trl", "transformers", "datasets", "accelerate") if harness.version(name) is None]
    if missing:
        return {"skipped": f"{', '.join(missing)} not installed"}
    return benchmark("trainer", 60)(context)


def tuning(context: Context) -> dict:
    """Block sizes and warps of the vocabulary kernels; the table of configurations, the fastest marked."""
    copy = context.done["environment"]["result"]["ceilings"]["copy"]
    sizes = (80, 1000) if context.dry else (8320, 151936)
    found = []
    for dtype in (torch.bfloat16, torch.float32)[: 1 if context.args.quick or context.dry else 2]:
        rows = _tuning.tune(*sizes, dtype, context.device, copy, context.dry)
        found += [{**row, "dtype": harness.dtype_name(dtype)} for row in rows]
    harness.write(found, context.folder / "tuning.jsonl", quiet=True)
    return {"rows": found, "passed": True}


def sanitizer(context: Context) -> dict:
    """compute-sanitizer's memcheck and racecheck over our kernels at small sizes."""
    if context.dry:
        return {"skipped": "needs a GPU"}
    return _sanitizer.check(context.left)


def profile(context: Context) -> dict:
    tables = {}
    for provider in ("linear:ours, one pass", "logits:ours"):
        options = ["--provider", provider, "--device", str(context.device)]
        options += ["--quick"] if context.dry or context.args.quick else []
        ran = context.call("-m", "bench.profile_step", *options, most=90)
        tables[provider] = ran.stdout if ran.returncode == 0 else ran.stderr[-2000:]
        if ran.returncode:
            return {"passed": False, "tables": tables}
    return {"passed": True, "tables": tables}


# The most important first: a run that is cut off has the rest to be asked for by --stages.
STAGES: dict[str, Callable[[Context], dict]] = {
    "environment": environment,
    "host": benchmark("host", 20),
    "logits": benchmark("logits", 40),
    "linear": benchmark("linear", 50),
    "correctness": correctness,
    "determinism": determinism,
    "promises": promises,
    "cuda tests": cuda_tests,
    "selection": benchmark("selection", 20),
    "tuning": tuning,
    "sanitizer": sanitizer,
    "profile": profile,
    "trainer": trainer,
}
