"""How the cost grows with N, V and H: one of them varied at a time, and the exponent of the fitted power law.

    python -m bench.scaling [--quick]

Writes bench/results/<device>/scaling.jsonl: a row for each point (provider, operation, axis, rows, vocabulary, hidden,
median_ms) and, with point null, for each fit (exponent, and r2 of the straight line through the logarithms).
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from bench import harness, options, providers
from bench._compare import step
from bench.harness import Problem

CHOSEN = {"logits": ("eager", "ours"), "linear": ("eager", "ours, one pass", "ours, recompute", "TRL head")}
FIELDS = {"N": "rows", "V": "vocabulary", "H": "hidden"}


def sweeps(device: torch.device, quick: bool) -> list[tuple[Problem, str, tuple[int, ...]]]:
    if device.type == "cuda":
        logits, linear = (
            Problem("logits", 4160, 64000, dtype=torch.bfloat16),
            Problem("linear", 4160, 64000, 2048, torch.bfloat16),
        )
        factors = (1, 2, 4)
    elif quick:
        logits, linear, factors = Problem("logits", 60, 8000), Problem("linear", 60, 8000, 64), (1, 2)
    else:
        logits, linear, factors = Problem("logits", 240, 16000), Problem("linear", 240, 16000, 256), (1, 2, 4)
    found = []
    for problem in (logits, linear):
        for axis in "NVH" if problem.hidden else "NV":
            size = getattr(problem, FIELDS[axis])
            found.append((problem, axis, tuple(size * factor for factor in factors)))
    return found


def fit(sizes: list[int], times: list[float]) -> tuple[float, float]:
    """(exponent, r2) of time = a size^exponent by least squares on the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in times]
    exponent, _ = statistics.linear_regression(x, y)
    return exponent, statistics.correlation(x, y) ** 2


def main() -> None:
    args = options.parse(options.arguments(__doc__))
    repeats = args.repeats or (3 if args.quick else 5)
    rows = []
    for base, axis, sizes in tqdm(sweeps(args.device, args.quick), desc="scaling"):
        medians: dict[str, list[float]] = {}
        for size in sizes:
            problem = replace(base, **{FIELDS[axis]: size})
            chosen = [providers.named(f"{base.operation}:{name}") for name in CHOSEN[base.operation]]
            present = [p for p in chosen if p.missing(args.device) is None]
            batch = providers.inputs(problem, args.device)
            made = {p.name: lambda batch=batch: providers.leaves(batch) for p in present}
            for provider in present:
                step(provider, batch)
            times = harness.measure(present, made, args.device, repeats)
            for provider in present:
                medians.setdefault(provider.name, []).append(statistics.median(times[provider.name]["both"]))
        for name, values in medians.items():
            exponent, r2 = fit(list(sizes), values)
            where = harness.environment(args.device, providers.named(f"{base.operation}:{name}").needs)
            common = {
                "provider": name,
                "operation": base.operation,
                "axis": axis,
                "dtype": harness.dtype_name(base.dtype),
            }
            fixed = {field: getattr(base, field) for field in FIELDS.values()}
            for size, value in zip(sizes, values, strict=True):
                rows.append({**common, **fixed, FIELDS[axis]: size, "point": size, "median_ms": value, **where})
            rows.append({**common, **fixed, "point": None, "exponent": exponent, "r2": r2, **where})
    print(f"\n{'operation':11}{'provider':24}{'axis':6}{'exponent':>9}{'r2':>8}")
    for row in rows:
        if row["point"] is None:
            print(f"{row['operation']:11}{row['provider']:24}{row['axis']:6}{row['exponent']:9.2f}{row['r2']:8.3f}")
    harness.write(rows, args.folder / "scaling.jsonl")


if __name__ == "__main__":
    main()
