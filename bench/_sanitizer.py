"""compute-sanitizer over this package's kernels alone, compiled before it starts: memcheck and racecheck.

    python -m bench._sanitizer --steps     # what it watches: every preset once, at small sizes
    python -m bench._sanitizer --planted   # a kernel that writes out of bounds, which it must report
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import time

import torch
import triton
import triton.language as tl

from bench import _gpu_checks
from bench.harness import ROOT

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # exit status for an error that the sanitizer reports
SECONDS = 60.0  # of each run
# Odd, and of several blocks; every kernel by some preset (the others differ in the N-sized terms alone).
STEPS = ((1001, ("a3po", "lp_reg", "gspo")), (40001, ("dapo", "fork_tokens")))


@triton.jit
def planted_kernel(out_ptr):
    tl.store(out_ptr + (1 << 40), 1.0)


def small_steps(device: torch.device) -> None:
    for vocabulary, presets in STEPS:
        rows = _gpu_checks.check_all(80, vocabulary, 64, torch.bfloat16, device, presets)
        assert all(row["passed"] for row in rows), [row for row in rows if not row["passed"]]


def planted(device: torch.device) -> None:
    planted_kernel[(1,)](torch.zeros(1, device=device))
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # the fault itself; the report is the sanitizer's
        print(error)
    sys.stdout.flush()
    os._exit(0)


def kernel_names() -> list[str]:
    """Every kernel that a module of backends.triton defines; all end in _kernel."""
    package = importlib.import_module("a3po_kernels.backends.triton")
    names = set()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        names |= {name for name in vars(importlib.import_module(module.name)) if name.endswith("_kernel")}
    return sorted(names)


def filters(names: list[str], help_text: str) -> list[str]:
    """The tool's options that confine it to kernels of these names; a kernel that matches one of them is checked."""
    # Renamed over the releases; each takes kns=<part of a name>.
    option = next((o for o in ("--kernel-regex", "--kernel-name", "--filter") if re.search(rf"{o}\b", help_text)), None)
    if option is None:
        raise RuntimeError("this compute-sanitizer lists no option to choose kernels by name")
    return [part for name in names for part in (option, f"kns={name}")]


def _go(command: list[str], seconds: float) -> tuple[int | None, float, str]:
    """(exit status or None where its time ran out, seconds, output)"""
    # Without the caching allocator every tensor has bounds of its own.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin = time.monotonic()
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(min(seconds, SECONDS), 1)
        )
        status, output = ran.returncode, ran.stdout + ran.stderr
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        status, output = None, said if isinstance(said, str) else said.decode(errors="replace")
    return status, time.monotonic() - begin, output


def check(left) -> dict:
    """The stage's result; left() gives the seconds that remain."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    names = kernel_names()
    told = subprocess.run([tool, "--help"], capture_output=True, text=True)
    chosen = filters([*names, planted_kernel.fn.__name__], told.stdout + told.stderr)
    steps = [sys.executable, "-m", "bench._sanitizer"]

    def under(name: str, what: str) -> list[str]:
        return [tool, "--tool", name, "--error-exitcode", str(FOUND), *chosen, *steps, what]

    # The first run leaves all kernels compiled in Triton's cache on disk; the last must report what is planted.
    runs = {"compile": [*steps, "--steps"], **{name: under(name, "--steps") for name in TOOLS},
            "planted fault": under("memcheck", "--planted")}  # fmt: skip
    found: dict = {"kernels": names}
    for name, command in runs.items():
        status, seconds, output = _go(command, left())
        passed = "Invalid __global__ write" in output if name == "planted fault" else status == 0
        found[name] = {"status": status, "seconds": seconds, "passed": passed, "output": output[-3000:]}
    failed = [name for name in runs if not found[name]["passed"]]
    return {**found, "failures": failed, "passed": not failed}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--planted", action="store_true")
    chosen_steps = parser.parse_args()
    (planted if chosen_steps.planted else small_steps)(torch.device("cuda"))
