"""Many cases in several processes."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

from tqdm import tqdm

CHUNK = 10


def _set(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def environment(backend: str) -> Iterator[None]:
    """What a worker's process must start with: one thread, and Triton's interpreter for its kernels."""
    wanted = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TRITON_INTERPRET": "1" if backend == "triton" else None}
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    try:
        yield
    finally:
        _set(before)


def work(task: tuple[int, int, str]) -> tuple[str, str, str, str]:
    """(entry, kind, command, fault) of a case, in a worker's process."""
    import torch

    from .judge import run_case

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of infinities in the interpreter
    verdict = run_case(*task)
    return verdict.case.entry, verdict.kind, verdict.case.command, verdict.fault


def run(seed: int, cases: dict[str, range], workers: int, most_faults: int) -> tuple[Counter, list[str]]:
    """(how many cases by backend, entry and kind; the faults, each with the command that repeats it)."""
    counted: Counter = Counter()
    faults: list[str] = []
    spawn = multiprocessing.get_context("spawn")
    with tqdm(total=sum(map(len, cases.values())), desc="fuzz", unit="case") as bar:
        for backend, numbers in cases.items():
            if not numbers:
                continue
            tasks = [(seed, index, backend) for index in numbers]
            # An executor, and not a Pool: a process that cannot start is then an error, and not waited for.
            with environment(backend), ProcessPoolExecutor(min(workers, len(tasks)), spawn) as pool:
                for entry, kind, command, fault in pool.map(work, tasks, chunksize=CHUNK):
                    counted[backend, entry, kind] += 1
                    bar.update()
                    if fault:
                        faults.append(f"{command}  # {entry}: {fault}")
                        tqdm.write(faults[-1])
                        if len(faults) >= most_faults:
                            pool.shutdown(cancel_futures=True)
                            return counted, faults
    return counted, faults


def summary(counted: Counter) -> str:
    parts = []
    for entry in sorted({key[1] for key in counted}):
        number = {kind: sum(n for key, n in counted.items() if key[1:] == (entry, kind)) for kind in
                  ("compared", "raised", "fault")}  # fmt: skip
        parts.append(f"{entry} {number['compared']} compared, {number['raised']} raised, {number['fault']} wrong")
    return "; ".join(parts)
