"""Runs a function on several gloo processes, once for many cases, and gives what each rank returned."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 60


def _main(rank: int, ranks: int, folder: str, work: Callable, arguments: tuple, timeout: float, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    try:
        torch.save(work(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        # What work left in cycles goes first: a Reducer that frees the group does so under the interpreter's lock, for
        # which a thread of gloo's may be waiting.
        gc.collect()
        dist.destroy_process_group()


def on_ranks(
    ranks: int, work: Callable, *arguments: Any, timeout: float = TIMEOUT, device: str = "cpu"
) -> list[Any]:
    """[work(*arguments) of each rank], tensors on the CPU; an exception of one is raised here. On GPUs by NCCL."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, args=(ranks, folder, work, arguments, timeout, device), nprocs=ranks)
        files = [Path(folder) / f"{rank}.pt" for rank in range(ranks)]
        return [torch.load(file, weights_only=False, map_location="cpu") for file in files]


def refused(call: Callable[[], Any]) -> str:
    """The message of the ValueError that a call raises, or "nothing"."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"
