"""What all benchmarks share: sizes, timing with providers taking turns, peak memory, ceilings, and rows of data.

A row is one provider on one problem in one mode; SCHEMA says what each field holds. Rows of one run were measured with
the providers interleaved, so their ratios may be compared where the machine is noisy; times of two runs may not.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

SCHEMA = {
    "provider": "who computes it",
    "operation": "logits, linear, selection",
    "mode": "forward, backward, both (timed apart in the same calls)",
    "rows": "tokens N",
    "vocabulary": "V; null where there is none",
    "hidden": "H; null where there is none",
    "dtype": "of logits, hidden states and weight",
    "objective": "what is computed",
    "active_fraction": "share of the rows whose gradient is not 0",
    "repeats": "measured calls, after one that is not",
    "median_ms": "median time of a call, on a GPU the device's (the host is ahead); null where it was not run",
    "low_ms": "10 % quantile",
    "high_ms": "90 % quantile",
    "ratio": "median over the calls of its time / the time of the baseline's call in the same turn",
    "ratio_low": "the least of these ratios",
    "ratio_high": "the greatest",
    "baseline": "the provider whose ratio is 1",
    "peak_mb": "peak memory above the inputs, 1e6 bytes: resident, in a process of its own, on a CPU; or null",
    "limit_bytes": "bytes a perfect kernel for this problem would move (limit() in bench/harness.py)",
    "limit_flops": "floating-point operations it could not avoid",
    "limit_ms": "the greater of the two at this machine's measured copy bandwidth and GEMM rate; null if not measured",
    "percent_of_limit": "100 limit_ms / median_ms",
    "skipped": "why it was not run; null where it was",
    "note": "what the provider leaves out or does otherwise",
    "device": "name of the GPU, or of the CPU",
    "threads": "torch's threads on a CPU; null on a GPU",
    "versions": "of python, torch, triton, and the provider's package",
    "commit": "of this repository, with + for uncommitted changes",
    "run": "which of the file's runs: providers take turns within one, and the times of two are not compared",
}


@dataclass(frozen=True)
class Problem:
    """Sizes of one problem; `hidden` is None for the logits path."""

    operation: str
    rows: int
    vocabulary: int | None = None
    hidden: int | None = None
    dtype: torch.dtype = torch.float32
    objective: str = "dapo"
    active_fraction: float = 1.0

    def __str__(self) -> str:
        sizes = [self.rows, self.vocabulary, self.hidden]
        share = "" if self.active_fraction == 1 else f", {100 * self.active_fraction:.0f} % active"
        return f"{self.operation} {' x '.join(str(n) for n in sizes if n)} {dtype_name(self.dtype)}{share}"


@dataclass(frozen=True)
class Provider:
    """forward(batch) gives the loss; `needs` are packages, `cuda` whether it has no CPU path.

    `prepare` changes a batch to what it takes, untimed; `inplace` ones spoil their logits and get others each time;
    `dapo`: whether its loss is DAPO's, as eager's is.
    """

    name: str
    forward: Callable
    needs: tuple[str, ...] = ()
    cuda: bool = False
    inplace: bool = False
    dapo: bool = True
    prepare: Callable[[dict], dict] = field(default=lambda batch: batch)
    note: str | None = None
    only: Callable[[Problem], bool] = field(default=lambda problem: True)

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here."""
        for package in self.needs:
            if version(package) is None:
                return f"{package} is not installed"
        if self.cuda and device.type != "cuda":
            return "needs CUDA"
        return None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def results_folder(device: torch.device) -> Path:
    """bench/results/cpu, or bench/results/<gpu> in lower case with dashes."""
    name = "cpu" if device.type == "cpu" else device_name(device).lower().replace(" ", "-")
    return RESULTS / name


def commit() -> str:
    def git(*command: str) -> str:
        result = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        return git("rev-parse", "--short=10", "HEAD") + (
            "+" if git("status", "--porcelain", "--", "a3po_kernels") else ""
        )
    except OSError:
        return ""


def environment(device: torch.device, packages: Iterable[str] = ()) -> dict:
    """The fields of a row that say where it was measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": version("triton")}
    versions |= {package: version(package) for package in packages}
    threads = torch.get_num_threads() if device.type == "cpu" else None
    return {"device": device_name(device), "threads": threads, "versions": versions, "commit": commit()}


def limit(problem: Problem, mode: str) -> tuple[int, int]:
    """(bytes, operations) of a perfect kernel. With a share f of rows that have a gradient:

    logits: one read and one write in all, for what was read is in the cache still; apart, one read forward, and
    backward f reads and one write (rows without a gradient are filled with zeros).
    linear: 2NVH forward, 4fNVH backward; hidden states and weight read once a mode, gradients written once.
    selection: one fp32 read and one bool write a token.
    """
    n, v, h, f = problem.rows, problem.vocabulary or 0, problem.hidden or 0, problem.active_fraction
    size = problem.dtype.itemsize
    if problem.operation == "selection":
        return 5 * n, 0
    if problem.operation == "logits":
        passes = {"forward": 1.0, "backward": 1 + f, "both": 2.0}[mode]
        return round(passes * n * v * size), 0
    operands = (n + v) * h * size
    factor = {"forward": 2.0, "backward": 4 * f, "both": 2 + 4 * f}[mode]
    return operands * {"forward": 1, "backward": 2, "both": 2}[mode], round(factor * n * v * h)


def ceilings(device: torch.device, dtypes: Iterable[torch.dtype], quick: bool = False) -> dict[str, float]:
    """Measured here: "copy" in bytes a second (read and written), and a GEMM's operations a second by dtype."""
    size = 2**28 if device.type == "cpu" or quick else 2**30
    source = torch.empty(size // 4, device=device).normal_()
    target = torch.empty_like(source)
    best = min(timed(lambda: target.copy_(source), device) for _ in range(10))
    found = {"copy": 2 * size / (best / 1e3)}
    n = 1024 if device.type == "cpu" else 8192
    for dtype in dtypes:
        left = torch.randn(n, n, device=device).to(dtype)
        right = torch.randn(n, n, device=device).to(dtype)
        best = min(timed(lambda left=left, right=right: left @ right, device) for _ in range(10))
        found[dtype_name(dtype)] = 2 * n**3 / (best / 1e3)
    return found


HEAD_START = 5_000_000  # cycles: about 3 ms, more than any provider's host takes to issue a step


def timed(call: Callable, device: torch.device) -> float:
    """Milliseconds of one call."""
    return timed_stages([call], device)[0]


def timed_stages(calls: list[Callable], device: torch.device) -> list[float]:
    """Milliseconds of each of several calls made one after another; on a GPU nothing waits between them.

    There it is the device's time: the host gets a head start, as it has in a training step whose forward pass keeps
    the device busy. What a call takes of the host is bench_host's question.
    """
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda.synchronize(device)
        torch.cuda._sleep(HEAD_START)
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        torch.cuda.synchronize(device)
        return [a.elapsed_time(b) for a, b in pairwise(events)]
    marks = [time.perf_counter()]
    for call in calls:
        call()
        marks.append(time.perf_counter())
    return [1e3 * (b - a) for a, b in pairwise(marks)]


def flush_cache(device: torch.device) -> None:
    """Writes more than the GPU's L2 holds, so that a call finds its inputs in memory."""
    if device.type == "cuda":
        torch.empty(2**28, dtype=torch.int8, device=device).zero_()


MODES = ("forward", "backward", "both")


def measure(
    providers: list[Provider], batches: dict[str, Callable], device: torch.device, repeats: int, bar: tqdm | None = None
) -> dict[str, dict[str, list[float]]]:
    """provider -> mode -> times in ms; the providers take turns, and each must have run once before.

    batches[name]() makes a provider's inputs anew (fresh leaves, so that gradients do not add up), untimed.
    """
    times: dict[str, dict[str, list[float]]] = {p.name: {mode: [] for mode in MODES} for p in providers}
    for _ in range(repeats):
        for provider in providers:
            batch = batches[provider.name]()
            held: list = []
            flush_cache(device)
            forward, backward = timed_stages(
                [
                    lambda held=held, provider=provider, batch=batch: held.append(provider.forward(batch)),
                    lambda held=held: held[0].backward() if held[0] is not None else None,
                ],
                device,
            )
            del held, batch
            for mode, value in zip(MODES, (forward, backward, forward + backward), strict=True):
                times[provider.name][mode].append(value)
            if bar is not None:
                bar.update(1)
    return times


def quantile(values: list[float], share: float) -> float:
    """The value at a share of the sorted list, between neighbours in proportion."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def make_rows(
    problem: Problem, providers: list[Provider], times: dict, baseline: str, known: dict, device: torch.device,
    skipped: dict[str, str], peaks: dict[str, float] | None = None, modes: Iterable[str] = MODES,
) -> list[dict]:  # fmt: skip
    """The rows of one problem; providers that could not run get one row a mode with the reason."""
    found = []
    for provider in providers:
        for mode in modes:
            moved, operations = limit(problem, mode)
            row = dict.fromkeys(SCHEMA)
            row |= {**asdict(problem), "dtype": dtype_name(problem.dtype), "provider": provider.name, "mode": mode}
            row |= {"note": provider.note, "baseline": baseline, "limit_bytes": moved, "limit_flops": operations}
            row |= {**environment(device, provider.needs), "run": 1}
            if provider.name in times:
                values = times[provider.name][mode]
                against = times[baseline][mode] if baseline in times else values
                ratios = [a / b for a, b in zip(values, against, strict=True)]
                bound = limit_ms(moved, operations, problem, known)
                median = statistics.median(values)
                row |= {
                    "repeats": len(values), "median_ms": median, "low_ms": quantile(values, 0.1),
                    "high_ms": quantile(values, 0.9), "ratio": statistics.median(ratios), "ratio_low": min(ratios),
                    "ratio_high": max(ratios), "limit_ms": bound,
                    "percent_of_limit": None if bound is None else 100 * bound / median,
                }  # fmt: skip
                if mode == "both" and peaks:
                    row["peak_mb"] = peaks.get(provider.name)
            else:
                row["skipped"] = skipped[provider.name]
            found.append(row)
    return found


def limit_ms(moved: int, operations: int, problem: Problem, known: dict[str, float]) -> float | None:
    rate = known.get(dtype_name(problem.dtype))
    if "copy" not in known or (operations and rate is None):
        return None
    return 1e3 * max(moved / known["copy"], operations / rate if operations else 0.0)


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {name} in /proc/self/status")


_HIGH_WATER = Path("/proc/self/clear_refs")  # writing 5 starts a process's high-water mark anew


def measures_peaks(device: torch.device) -> bool:
    """Whether peak memory can be measured: on a GPU, and on a CPU under Linux."""
    return device.type == "cuda" or os.access(_HIGH_WATER, os.W_OK)


def peak_bytes(call: Callable, device: torch.device) -> int:
    """Peak memory of the second call() above what is held before it; on a CPU run it in a process of its own.

    The first call loads libraries and compiles. in_a_process sees to it that a CPU's freed tensors go back at once.
    """
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = resident("VmRSS")
    _HIGH_WATER.write_text("5")
    call()
    return resident("VmHWM") - before


def write(rows: list[dict], path: Path, quiet: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not quiet:
        print(f"{len(rows)} rows in {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def print_rows(rows: list[dict], modes: Iterable[str] = ("both",)) -> None:
    """A table on stdout, and a line for each provider that was skipped."""
    print(f"{'provider':36}{'mode':>9}{'median ms':>11}{'ratio (least..greatest)':>26}{'% of limit':>12}{'peak MB':>9}")
    for row in rows:
        if row["mode"] not in modes:
            continue
        if row["skipped"]:
            print(f"{row['provider']:36}  skipped: {row['skipped']}")
            continue
        ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f}..{row['ratio_high']:.2f})"
        share = "-" if row["percent_of_limit"] is None else f"{row['percent_of_limit']:.0f}"
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        print(f"{row['provider']:36}{row['mode']:>9}{row['median_ms']:11.2f}{ratio:>26}{share:>12}{peak:>9}")


def in_a_process(call: Callable, *values):
    """call(*values) in a process that has done nothing before but import this package and the peers."""
    # glibc would keep freed tensors below 32 MB for later, and the resident memory would not show them.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench._compare", "transformers.utils", "liger_kernel.chunked_loss"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, *values).result()
