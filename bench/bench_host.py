"""What a step costs the host: the time to issue forward and backward while nothing waits, and its launches.

    python -m bench.bench_host [--quick]

Writes bench/results/<device>/host.jsonl, a row a provider: `host_ms` (and low, high: 10 % and 90 % quantiles) from the
call of forward to the return of backward, after a synchronisation; `triton_launches`, {kernel: how often} by Triton's
launch hook; `device_activities`, kernels, copies and fills that torch.profiler saw on the GPU, null on a CPU;
`operators`, PyTorch operators of the step but for those that others call. On a CPU the time is the step's own.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from bench import harness, options, providers
from bench._compare import failures
from bench.harness import Problem

LOGITS = ("ours", "ours, in place", "ours, a3po", "ours, one-launch", "ours, two-stage",
          "TRL logits kernel", "Liger Triton GRPO")  # fmt: skip
LINEAR = ("ours, one pass", "ours, with a plan")


def problems(device: torch.device, quick: bool) -> list[tuple[Problem, tuple[str, ...]]]:
    """Small enough for the GPU to keep up: what the host issues depends on no length, save the head's chunks."""
    if device.type == "cuda":
        half = torch.bfloat16
        linear = Problem("linear", 2080, 151936, 1024, half, active_fraction=0.2)
        return [(Problem("logits", 1040, 151936, dtype=half), LOGITS), (linear, LINEAR)]
    return [(Problem("logits", 40, 500), LOGITS), (Problem("linear", 40, 500, 32, active_fraction=0.2), LINEAR)]


@contextmanager
def triton_launches():
    """Counter of kernels by name that Triton launches inside; None where this Triton has no hook for it."""
    try:
        from triton.knobs import runtime

        hook = runtime.launch_enter_hook
        add, remove = hook.add, hook.remove
    except (ImportError, AttributeError):
        yield None
        return
    counted: Counter = Counter()

    def count(metadata) -> None:
        counted[metadata.get()["name"]] += 1

    add(count)
    try:
        yield counted
    finally:
        remove(count)


def launches(step, device: torch.device) -> dict:
    """triton_launches, device_activities and operators of one step that has run before."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with triton_launches() as counted:
        step()
    with profile(activities=activities) as seen:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    on_device = operators = 0
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            on_device += 1
        elif event.name.startswith("aten::"):
            inside = event.cpu_parent is not None and event.cpu_parent.name.startswith("aten::")
            operators += not inside
    found = None if device.type == "cpu" else on_device
    return {
        "triton_launches": None if counted is None else dict(counted), "device_activities": found,
        "operators": operators,
    }  # fmt: skip


def host_times(make, step, device: torch.device, repeats: int) -> list[float]:
    """Milliseconds to issue step(make()), the inputs made and the device idle before."""
    times = []
    for _ in range(repeats):
        batch = make()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        step(batch)
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def measure(problem: Problem, names: tuple[str, ...], device: torch.device, repeats: int) -> list[dict]:
    listed = [p for p in providers.table(problem) if p.name in names]
    batch = providers.inputs(problem, device)
    skipped = failures(listed, batch, device)
    rows = []
    for provider in listed:
        row = {"provider": provider.name, "operation": problem.operation, "problem": str(problem)}
        row |= {**harness.environment(device, provider.needs), "skipped": skipped.get(provider.name)}
        if row["skipped"] is None:
            prepared = provider.prepare(batch)

            def make(prepared=prepared, provider=provider) -> dict:
                return providers.leaves(prepared, copy=provider.inplace)

            def step(inputs: dict, provider=provider) -> None:
                provider.forward(inputs).backward()

            step(make())
            times = host_times(make, step, device, repeats)
            inputs = [make(), make()]
            row |= {"repeats": repeats, "host_ms": statistics.median(times), "low_ms": harness.quantile(times, 0.1),
                    "high_ms": harness.quantile(times, 0.9)}  # fmt: skip
            row |= launches(lambda inputs=inputs, step=step: step(inputs.pop()), device)
        rows.append(row)
    return rows


def main() -> None:
    args = options.parse(options.arguments(__doc__))
    rows = []
    for problem, names in problems(args.device, args.quick):
        found = measure(problem, names, args.device, args.repeats or (5 if args.device.type == "cpu" else 30))
        print(f"\n{problem}")
        print(f"{'provider':24}{'host ms':>9}{'Triton launches':>17}{'on the device':>15}{'operators':>11}")
        for row in found:
            if row["skipped"]:
                print(f"{row['provider']:24}  skipped: {row['skipped']}")
                continue
            ours = "-" if row["triton_launches"] is None else sum(row["triton_launches"].values())
            seen = "-" if row["device_activities"] is None else row["device_activities"]
            print(f"{row['provider']:24}{row['host_ms']:9.3f}{ours:>17}{seen:>15}{row['operators']:11}")
        rows += found
        harness.write(rows, args.folder / "host.jsonl", quiet=True)


if __name__ == "__main__":
    main()
