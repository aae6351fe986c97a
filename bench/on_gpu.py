"""Everything a GPU can tell, in one call of under ten minutes; each stage is saved as soon as it is done.

    python -m bench.on_gpu [--quick] [--folder DIR] [--limit SECONDS] [--stages NAME ...]
    python -m bench.on_gpu --dry-run        # the same walk on a CPU, at tiny sizes
    python -m bench.on_gpu --quick --check  # fails below a floor of FLOORS, or where a check or a test failed

Writes on_gpu.json (stage -> status, seconds, result) and the rows of the benchmarks to bench/results/<device>/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from bench import _gpu_checks, harness
from bench.harness import ROOT

# (benchmark, provider) -> eager's time over its own that it must reach on the quick problem, active fraction 1.
FLOORS = {("logits", "ours"): 1.5, ("logits", "ours, in place"): 1.5, ("linear", "ours, one pass"): 1.0}


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
    found = harness.environment(context.device, ("trl", "liger-kernel", "verl", "cut-cross-entropy", "quack-kernels"))
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
    several = ["-n", "8", "--dist", "worksteal"] if harness.version("pytest-xdist") and not context.dry else []
    return pytest_cuda(
        context, "cuda_tests", *several, "tests/test_autograd.py" if context.dry else "tests", seconds=240
    )


def promises(context: Context) -> dict:
    """No host synchronisation, CUDA-graph capture, no recompilation, more than 2^31 elements: their tests by name."""
    files = ("tests/test_autograd.py", "tests/test_token_logprobs.py")
    return pytest_cuda(context, "promises", "-k", PROMISES, *files, seconds=90)


def correctness(context: Context) -> dict:
    """Every preset by every route against fp64, at full size on a slice of the gradient."""
    sizes = (80, 1000, 64) if context.dry else (8192, 151936, 1024)
    found = _gpu_checks.check_all(*sizes, torch.bfloat16, context.device)
    failed = [(row["preset"], row["route"]) for row in found if not row["passed"]]
    return {"rows": found, "failures": failed, "passed": not failed}


def determinism(context: Context) -> dict:
    sizes = (80, 1000, 64) if context.dry else (8192, 151936, 1024)
    found = _gpu_checks.deterministic(*sizes, torch.bfloat16, context.device)
    return {"rows": found, "passed": all(row["passed"] for row in found)}


def benchmark(name: str) -> Callable[[Context], dict]:
    def go(context: Context) -> dict:
        options = ["--folder", str(context.folder), "--device", str(context.device)]
        options += ["--quick"] if context.dry or context.args.quick else []
        options += ["--repeats", "1"] if context.dry else []
        ran = context.call("-m", f"bench.bench_{name}", *options, most=200)
        return {
            "passed": ran.returncode == 0,
            "table": ran.stdout,
            "error": ran.stderr[-2000:] if ran.returncode else "",
        }

    return go


def tuning(context: Context) -> dict:
    """Block sizes and warps of the two vocabulary kernels; the table of configurations, the fastest marked."""
    copy = context.done["environment"]["result"]["ceilings"]["copy"]
    sizes = (80, 1000) if context.dry else (8320, 151936)
    found = []
    for dtype in (torch.bfloat16, torch.float32)[: 1 if context.args.quick or context.dry else 2]:
        rows = _gpu_checks.tune(*sizes, dtype, context.device, copy, context.dry)
        found += [{**row, "dtype": harness.dtype_name(dtype)} for row in rows]
    harness.write(found, context.folder / "tuning.jsonl", quiet=True)
    return {"rows": found, "passed": True}


def sanitizer(context: Context) -> dict:
    """compute-sanitizer's memcheck and racecheck over every preset at small sizes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    found = {}
    for check in ("memcheck", "racecheck"):
        command = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "bench.on_gpu",
            "--small-steps",
        ]
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=max(min(context.left(), 100), 1)
        )
        found[check] = {"passed": ran.returncode == 0, "output": (ran.stdout + ran.stderr)[-3000:]}
    return {**found, "passed": all(result["passed"] for result in found.values())}


def small_steps(device: torch.device) -> None:
    """What the sanitizer watches: every preset and route once; an odd vocabulary, and one of several programs a row."""
    for vocabulary in (1001, 40000):
        rows = _gpu_checks.check_all(80, vocabulary, 64, torch.bfloat16, device)
        assert all(row["passed"] for row in rows)


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


STAGES: dict[str, Callable[[Context], dict]] = {
    "environment": environment,
    "cuda tests": cuda_tests,
    "correctness": correctness,
    "determinism": determinism,
    "promises": promises,
    "logits": benchmark("logits"),
    "linear": benchmark("linear"),
    "selection": benchmark("selection"),
    "tuning": tuning,
    "sanitizer": sanitizer,
    "profile": profile,
}


def below_floor(folder: Path) -> list[str]:
    """Providers whose time against eager is worse than their floor, by the rows in a folder."""
    found = []
    for (name, provider), floor in FLOORS.items():
        path = folder / f"{name}.jsonl"
        rows = harness.read(path) if path.exists() else []
        ratios = [row["ratio"] for row in rows if (row["provider"], row["mode"], row["active_fraction"]) ==
                  (provider, "both", 1.0) and row["ratio"] is not None]  # fmt: skip
        if not ratios:
            found.append(f"{name}, {provider}: not measured")
        elif 1 / ratios[0] < floor:
            found.append(f"{name}, {provider}: {1 / ratios[0]:.2f} times as fast as eager, the floor is {floor}")
    return found


def summary(done: dict[str, dict]) -> str:
    lines = [f"{'stage':14}{'status':10}{'seconds':>8}"]
    for name, stage in done.items():
        result = stage["result"]
        note = result.get("skipped") or result.get("error") or ", ".join(map(str, result.get("failures", [])))
        lines.append(f"{name:14}{stage['status']:10}{stage['seconds']:8.1f}  {str(note)[:100]}".rstrip())
    return "\n".join(lines)


def run(context: Context, names: list[str]) -> None:
    context.folder.mkdir(parents=True, exist_ok=True)
    for name in (bar := tqdm(names)):
        bar.set_description(name)
        begin = time.monotonic()
        if context.left() <= 0:
            status, result = "no time", {}
        else:
            try:
                result = STAGES[name](context)
                status = "skipped" if "skipped" in result else "failed" if result.get("passed") is False else "passed"
            except subprocess.TimeoutExpired as error:
                said = error.stdout or b""
                text = said if isinstance(said, str) else said.decode(errors="replace")
                status, result = "failed", {"error": "out of its time", "output": text[-4000:]}
            except Exception as error:  # the other stages are still worth their time
                status, result = "failed", {"error": f"{type(error).__name__}: {error}"[:2000]}
        if context.device.type == "cuda":
            torch.cuda.empty_cache()
        context.done[name] = {"status": status, "seconds": time.monotonic() - begin, "result": result}
        (context.folder / "on_gpu.json").write_text(json.dumps(context.done, indent=1) + "\n")


def main() -> int:
    parser = harness.arguments(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--check", action="store_true", help="exit 1 below a floor or where a stage failed")
    parser.add_argument("--limit", type=float, default=570, help="seconds for all stages")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--small-steps", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry_run:
        args.device = torch.device("cpu")
    elif args.device.type != "cuda":
        parser.error("needs a CUDA GPU; --dry-run walks the stages without one")
    if args.small_steps:
        small_steps(args.device)
        return 0
    if args.dry_run and args.folder is None:
        args.folder = ROOT / "build" / "on_gpu"  # its times mean nothing
    harness.start(args)
    context = Context(args, args.device, args.folder.resolve(), time.monotonic() + args.limit, {})
    names = args.stages if "environment" in args.stages else ["environment", *args.stages]
    run(context, names)
    for name in ("logits", "linear", "selection"):
        if name in context.done:
            print(context.done[name]["result"].get("table", ""))
    print(summary(context.done))
    if not args.check:
        return 0
    problems = [name for name, stage in context.done.items() if stage["status"] not in ("passed", "skipped")]
    problems += below_floor(context.folder)
    print("\n".join(f"FAILED: {problem}" for problem in problems))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
