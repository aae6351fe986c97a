"""How many threads to take: of the cores that this process may use, those that are idle."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

MOST = 4  # a model this small has no work for more
LOOK = 0.5  # seconds


def quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Cores that the control groups of this process allow, of either version; infinity without a limit."""
    allowed = float("inf")
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "cpu", "cpu,cpuacct"):
            continue
        group = root / controllers.split(",")[0] / path.lstrip("/")
        for folder in (root / controllers.split(",")[0], group, *group.parents):
            if (folder / "cpu.max").exists():
                granted, period = (folder / "cpu.max").read_text().split()
            elif (folder / "cpu.cfs_quota_us").exists():
                granted, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                continue
            if granted != "max" and int(granted) > 0:
                allowed = min(allowed, int(granted) / int(period))
    return allowed


def _ticks() -> dict[int, tuple[int, int]]:
    """Idle and all ticks of each core."""
    found = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *numbers = line.split()
        if name.startswith("cpu") and name != "cpu":
            spent = list(map(int, numbers[:8]))  # guests are counted in user time
            found[int(name[3:])] = (spent[3] + spent[4], sum(spent))
    return found


def idle_cores(seconds: float = LOOK) -> float:
    """How many of this process's cores were idle while it looked; by the load average where the kernel counts none.

    Not by the load average alone: that of a minute is high after a set-up that is over.
    """
    mine, before = os.sched_getaffinity(0), _ticks()
    time.sleep(seconds)
    spent = [(after[0] - before[n][0], after[1] - before[n][1]) for n, after in _ticks().items() if n in mine]
    if not any(total for _, total in spent):
        return max(0.0, len(mine) - os.getloadavg()[0])
    return sum(idle / total for idle, total in spent if total)


def choose(cores: float, idle: float) -> tuple[int, str]:
    """Threads for `cores` that may be used, of which `idle` are free, and a line that says so; at least one.

    >>> choose(2, 1.1)
    (1, 'threads: 1 of 2 cores; the machine is busy, 0.9 of its cores at work: this takes longer')
    """
    idle = min(idle, cores)
    threads = max(1, min(int(cores), MOST, round(idle)))
    line = f"threads: {threads} of {cores:g} core{'' if cores == 1 else 's'}"
    if idle < cores - 0.5:
        line += f"; the machine is busy, {cores - idle:.1f} of its cores at work: this takes longer"
    return threads, line


def set_threads(threads: int | None = None) -> None:
    """Sets torch's threads, `threads` or those that `choose` finds, and prints the line."""
    cores = min(len(os.sched_getaffinity(0)), quota())
    threads, line = choose(cores, idle_cores()) if threads is None else (threads, f"threads: {threads}, as was asked")
    torch.set_num_threads(threads)
    print(line, flush=True)
