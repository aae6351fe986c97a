"""Peak memory of each provider at two sizes, and the largest number of tokens that fits a budget.

    python -m bench.bench_memory [--quick] [--save] [--budget MB]
    python -m bench.bench_memory --rows 8192 --vocab 151936 --hidden 2048 --dtype bf16    # at so many tokens alone

Writes memory.jsonl (bench/options.py says where): provider, operation, vocabulary, hidden, dtype, active_fraction,
budget_mb (above the inputs), largest_rows (of the numbers tried, the greatest whose peak was within the budget; null
if none, and with --rows), peaks ({rows: MB measured}), model_mb ({rows: MB} by estimate_memory, for this package's
linear head), skipped, device, threads, versions, commit. Every measurement is in a process of its own.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial

import torch
from tqdm.auto import tqdm

import a3po_kernels
from bench import harness, options, providers, verdict
from bench._compare import peak_in_a_process
from bench.harness import Problem

STEP = 30  # rows; a multiple of providers.ROLLOUTS
ALIKE = ("ours, a3po", "ours, one pass, a3po", "ours, entropy bonus")  # hold what DAPO holds
ROUTES = {"ours, one pass": "one-pass", "ours, recompute": "recompute"}


def largest(measure, budget: float, start: int, most: int, tries: int) -> tuple[int | None, dict[int, float]]:
    """The greatest number of rows tried whose peak (MB) is within the budget, and all that was measured.

    Peaks grow nearly in a line: two sizes give it, and each further try starts from the nearest ones on both sides.
    """
    peaks = {rows: measure(rows) for rows in (start, 2 * start)}
    for _ in range(tries):
        below = max((rows for rows, peak in peaks.items() if peak <= budget), default=0)
        above = min((rows for rows, peak in peaks.items() if peak > budget), default=None)
        known = sorted(peaks)[-2:] if above is None else [rows for rows in (below, above) if rows]
        if len(known) < 2:
            known = sorted(peaks)[:2]
        slope = (peaks[known[1]] - peaks[known[0]]) / (known[1] - known[0])
        guess = most
        if slope > 0:  # a little below, for the noise
            guess = min(int(0.99 * (known[0] + (budget - peaks[known[0]]) / slope)) // STEP * STEP, most)
        if above is not None:
            guess = min(max(guess, below + STEP), above - STEP)
        if guess <= 0 or guess in peaks:
            break
        peaks[guess] = measure(guess)
    return max((rows for rows, peak in peaks.items() if peak <= budget), default=None), peaks


def peak_mb(problem: Problem, provider: harness.Provider, args: argparse.Namespace, rows: int) -> float:
    return peak_in_a_process(replace(problem, rows=rows), provider, args) / 1e6


def main() -> None:
    parser = options.arguments(__doc__, timed=False)
    options.add_shape(parser, hidden=True)
    parser.add_argument("--budget", type=float, help="MB above the inputs")
    args = options.parse(parser)
    if args.rows is not None and args.budget is not None:
        parser.error("--budget is what a search for the most rows keeps to; --rows names them")
    if not harness.measures_peaks(args.device):
        parser.error("a CPU's peak memory can be measured under Linux alone")
    gpu = args.device.type == "cuda"
    own = Problem("linear", STEP, 128256, 4096, torch.bfloat16) if gpu else Problem(
        "linear", STEP, 32000, 128 if args.quick else 512
    )  # fmt: skip
    shape = options.chosen(parser, args, [own])[0]
    budget = args.budget or (8000 if gpu else 100 if args.quick else 300)
    begin, most = (2040, 262140) if gpu else (120, 720) if args.quick else (240, 4020)
    rows = []
    for operation in ("logits", "linear"):
        problem = replace(shape, operation=operation, hidden=shape.hidden if operation == "linear" else None)
        vocabulary, hidden, dtype = problem.vocabulary, problem.hidden, problem.dtype
        listed = providers.table(problem)
        for provider in tqdm([p for p in listed if p.name not in ALIKE], desc=operation):
            where = harness.environment(args.device, provider.needs)
            row = {
                "provider": provider.name, "operation": operation, "vocabulary": vocabulary, "hidden": hidden,
                "dtype": harness.dtype_name(dtype), "active_fraction": problem.active_fraction, "budget_mb": budget,
                "largest_rows": None, "peaks": None, "model_mb": None,
                "skipped": provider.missing(args.device), **where,
            }  # fmt: skip
            rows.append(row)
            if row["skipped"]:
                continue
            measure = partial(peak_mb, problem, provider, args)
            try:
                if args.rows is None:
                    row["largest_rows"], row["peaks"] = largest(measure, budget, begin, most, 1 if args.quick else 2)
                else:
                    row["peaks"] = {args.rows: measure(args.rows)}
            except Exception as error:  # a peer may fail in any way, and the others go on
                row["skipped"] = f"{type(error).__name__}: {error}"[:200]
                continue
            if route := ROUTES.get(provider.name):
                known = {"route": route, "device": args.device, "active_fraction": problem.active_fraction}
                parts = {n: a3po_kernels.estimate_memory(n, hidden, vocabulary, dtype, **known) for n in row["peaks"]}
                row["model_mb"] = {n: part["total"] / 1e6 for n, part in parts.items()}
    print(
        f"\n{'operation':11}{'provider':28}{'largest N':>10}   peaks, N: MB (budget {budget:.0f} MB above the inputs)"
    )
    for row in rows:
        peaks = ", ".join(f"{n}: {peak:.0f}" for n, peak in sorted((row["peaks"] or {}).items()))
        end = f"skipped: {row['skipped']}" if row["skipped"] else f"{row['largest_rows'] or '-':>10}   {peaks}"
        print(f"{row['operation']:11}{row['provider']:28}{end}")
    for operation in ("logits", "linear"):
        same = {p.name for p in (*providers.LOGITS, *providers.LINEAR) if p.dapo}
        told = [row for row in rows if row["operation"] == operation and row["provider"] in same]
        print(verdict.of_peaks(told, operation, providers.BASELINE, args.rows))
    harness.write(rows, args.folder / "memory.jsonl")


if __name__ == "__main__":
    main()
