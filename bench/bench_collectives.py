"""What the linear head's two collectives cost with gloo, by number of ranks and bytes: growth, not a GPU's speed.

    python -m bench.bench_collectives [--quick]

Appends to bench/results/cpu/collectives.jsonl, a row a point: operation ("statistics": an all_gather of 4 fp32 numbers
a row; "dHidden": an all_reduce of `hidden` fp32 numbers a row), kind, ranks, rows, bytes (of each rank's input),
repeats, median_ms, low_ms, high_ms (10 and 90 % quantiles; a call takes what its slowest rank took), cores, load (of
the machine, a minute's mean before these ranks started, over the rounds), device, threads, versions, commit, run. The
numbers of ranks take turns, ROUNDS each. Ranks are processes of this machine: more than its cores share them. The fits
are bench.scaling_page's, of the last run.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm.auto import tqdm

from bench import harness, options

RANKS = (1, 2, 4)
ROUNDS = 5
HIDDEN = 1024
KINDS = {"statistics": "all_gather", "dHidden": "all_reduce"}
# 4 KB to 4 MB by the one, 64 KB to 16 MB by the other.
ROWS = {"statistics": (256, 1024, 4096, 16384, 65536, 262144), "dHidden": (16, 64, 256, 1024, 4096)}


def bytes_of(operation: str, rows: int, hidden: int = HIDDEN) -> int:
    return 4 * rows * (4 if operation == "statistics" else hidden)


def _worker(rank: int, ranks: int, points: list[tuple[str, int]], repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    found = []
    for operation, rows in points:
        mine = torch.ones(bytes_of(operation, rows) // 4)
        gathered = [torch.empty_like(mine) for _ in range(ranks)] if operation == "statistics" else []
        times = []
        for _ in range(repeats + 2):
            mine.fill_(1.0)
            dist.barrier()
            begin = time.perf_counter()
            if operation == "statistics":
                dist.all_gather(gathered, mine)
            else:
                dist.all_reduce(mine)
            times.append(1e3 * (time.perf_counter() - begin))
        total = mine[0].item() if operation == "dHidden" else float(sum(part[0].item() for part in gathered))
        if total != ranks:
            raise RuntimeError(f"{operation} of {ranks} ranks gave {total}")
        found.append(times[2:])
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def times(ranks: int, points: list[tuple[str, int]], repeats: int) -> list[list[float]]:
    """For each (operation, rows) the milliseconds of `repeats` calls, each that of its slowest rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(ranks, points, repeats, folder), nprocs=ranks)
        each = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
    return [[max(calls) for calls in zip(*point, strict=True)] for point in zip(*each, strict=True)]


def make_rows(
    ranks: int, points: list[tuple[str, int]], measured: list[list[float]], load: float, run: int
) -> list[dict]:
    where = {**harness.environment(torch.device("cpu")), "threads": 1, "cores": os.cpu_count(), "load": load}
    rows = []
    for (operation, count), values in zip(points, measured, strict=True):
        rows.append({
            "operation": operation, "kind": KINDS[operation], "ranks": ranks, "rows": count,
            "hidden": HIDDEN if operation == "dHidden" else None, "bytes": bytes_of(operation, count),
            "repeats": len(values), "median_ms": statistics.median(values), "low_ms": harness.quantile(values, 0.1),
            "high_ms": harness.quantile(values, 0.9), **where, "run": run,
        })  # fmt: skip
    return rows


def fit(sizes: Iterable[float], milliseconds: Iterable[float]) -> tuple[float, float, float]:
    """(a, b, error) of time = a + b bytes, in ms and ms a byte, by least squares of the relative errors.

    Relative, since the times span three decades: of absolute errors the largest size alone would decide both.
    error: the root of their mean square.
    """
    sizes, measured = torch.tensor([*sizes], dtype=torch.float64), torch.tensor([*milliseconds], dtype=torch.float64)
    design = torch.stack([1 / measured, sizes / measured], dim=1)
    a, b = torch.linalg.lstsq(design, torch.ones_like(measured).unsqueeze(1)).solution[:, 0].tolist()
    error = ((a + b * sizes) / measured - 1).square().mean().sqrt().item()
    return a, b, error


def main() -> None:
    parser = options.arguments(__doc__)
    args = options.parse(parser)
    if args.device.type != "cpu":
        parser.error("gloo on a CPU: --device cpu")
    path = args.folder / "collectives.jsonl"
    rows = harness.read(path) if path.exists() else []
    run = 1 + max((row["run"] for row in rows), default=0)
    points = [(name, n) for name, sizes in ROWS.items() for n in (sizes[:2] if args.quick else sizes)]
    repeats = args.repeats or (5 if args.quick else 41)
    loads: dict[int, list[float]] = {ranks: [] for ranks in RANKS}
    measured: dict[int, list[list[float]]] = {ranks: [[] for _ in points] for ranks in RANKS}
    for ranks in tqdm(RANKS * (1 if args.quick else ROUNDS), desc="turns"):
        loads[ranks].append(os.getloadavg()[0])
        for before, more in zip(measured[ranks], times(ranks, points, repeats), strict=True):
            before += more
    for ranks in RANKS:
        new = make_rows(ranks, points, measured[ranks], statistics.fmean(loads[ranks]), run)
        rows += new
        print(f"\n{'operation':12}{'ranks':>6}{'bytes':>12}{'median ms':>11}{'10 %':>9}{'90 %':>9}")
        for row in new:
            print(f"{row['operation']:12}{ranks:6}{row['bytes']:12}{row['median_ms']:11.3f}{row['low_ms']:9.3f}"
                  f"{row['high_ms']:9.3f}")  # fmt: skip
    harness.write(rows, path)


if __name__ == "__main__":
    main()
