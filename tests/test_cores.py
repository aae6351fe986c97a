"""The threads that the examples take: a function of the cores that may be used and of those that are idle."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import cores

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("usable", "idle", "threads", "busy"),
    [
        (2, 2.0, 2, False),
        (2, 1.8, 2, False),
        (2, 1.1, 1, True),
        (2, 0.0, 1, True),  # one at least
        (1, 0.9, 1, False),
        (1, 0.2, 1, True),
        (1.5, 2.0, 1, False),  # a quota below the cores of the machine
        (0.5, 2.0, 1, False),
        (16, 15.9, cores.MOST, False),
        (16, 3.2, 3, True),
    ],
)
def test_threads_are_the_idle_cores_and_a_busy_machine_is_named(usable, idle, threads, busy):
    chosen, line = cores.choose(usable, idle)
    assert chosen == threads
    assert line.startswith(f"threads: {threads} of {usable:g} core") and ("busy" in line) == busy


def cgroups(folder: Path, files: dict[str, str], own: str) -> float:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "own").write_text(own)
    return cores.quota(folder, folder / "own")


def test_the_quota_of_control_groups(tmp_path):
    """The tightest on the way up, of version 2 or 1; infinity without one."""
    assert cgroups(tmp_path / "none", {"a/cpu.max": "max 100000\n"}, "0::/a\n") == float("inf")
    two = {"cpu.max": "300000 100000\n", "a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}
    assert cgroups(tmp_path / "two", two, "0::/a/b\n") == 1.5
    one = {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}
    assert cgroups(tmp_path / "one", one, "4:memory:/a\n3:cpu,cpuacct:/a\n") == 0.5
    assert cgroups(tmp_path / "free", {**one, "cpu/a/cpu.cfs_quota_us": "-1\n"}, "3:cpu:/a\n") == float("inf")
    assert cores.quota(tmp_path, tmp_path / "absent") == float("inf")


def test_idle_cores_are_those_of_the_affinity(monkeypatch):
    looks = iter([{0: (0, 0), 1: (0, 0), 2: (0, 0)}, {0: (50, 50), 1: (10, 50), 2: (50, 50)}])
    monkeypatch.setattr(cores, "_ticks", lambda: next(looks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert cores.idle_cores(0.0) == pytest.approx(1.2)


def test_where_no_ticks_are_counted_the_load_average_tells(monkeypatch):
    monkeypatch.setattr(cores, "_ticks", lambda: {0: (0, 0), 1: (0, 0)})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "getloadavg", lambda: (0.75, 0.0, 0.0))
    assert cores.idle_cores(0.0) == pytest.approx(1.25)


def test_this_machine_can_be_read():
    assert 0.0 <= cores.idle_cores(0.05) <= len(os.sched_getaffinity(0))
    assert cores.quota() > 0


def test_what_was_asked_is_taken(capsys):
    before = torch.get_num_threads()
    try:
        cores.set_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert capsys.readouterr().out == "threads: 1, as was asked\n"


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_openmp_is_told_not_to_spin_before_torch_is_loaded(given):
    """Who sets the policy or the count keeps it."""
    program = "import sys, os, examples; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, env={**environment, **given}, capture_output=True, text=True, check=True)
    expected = given.get("GOMP_SPINCOUNT", "None" if "OMP_WAIT_POLICY" in given else "10000")
    assert result.stdout.split() == ["False", expected]
