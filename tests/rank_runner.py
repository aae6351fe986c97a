"""Cases run on several ranks: one spawn a number of ranks for all of them, their results on disk by name and rank."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ranks import on_ranks

from a3po_kernels.parallel import groups

MODULES = ("data_parallel_cases", "context_parallel_cases")
GATHER = "all_gather_single"
COLLECTIVES = (
    (dist, "all_reduce"), (groups, GATHER), (dist, "all_gather"), (dist, "broadcast"), (dist, "all_to_all"),
    (groups, "reduce_scatter_single"),
)  # fmt: skip


class Counted:
    """Counts the collectives called within it, of torch.distributed's functions."""

    def __enter__(self) -> Counted:
        self.calls: list[str] = []
        self.patches = []
        for module, name in COLLECTIVES:
            right = getattr(module, name)

            def call(*args, _name=name, _right=right, **kwargs):
                self.calls.append(_name)
                return _right(*args, **kwargs)

            self.patches.append(mock.patch.object(module, name, call))
            self.patches[-1].start()
        return self

    def __exit__(self, *_) -> None:
        for patch in self.patches:
            patch.stop()


def run_modules(modules: tuple[str, ...]) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    for module in modules:
        for name, case in importlib.import_module(module).CASES.items():
            try:
                results[name] = case(rank, world)
            except Exception:
                results[name] = traceback.format_exc()
                break  # the other ranks may wait for this one
    return results


def spawn_ranks(world: int, folder: Path, modules: tuple[str, ...] = MODULES) -> None:
    """Runs every case of some modules on every rank."""
    for rank, results in enumerate(on_ranks(world, run_modules, modules)):
        torch.save(results, folder / f"{rank}.pt")


def read_ranks(world: int, folder: Path) -> list[dict[str, Any]]:
    """The results of every case, by rank; an AssertionError with the traceback of one that failed."""
    found = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    for rank, results in enumerate(found):
        for name, result in results.items():
            assert not isinstance(result, str), f"{name} on rank {rank}:\n{result}"
    return found
