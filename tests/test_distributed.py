"""Selection over data-parallel ranks, on two processes."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import a3po_kernels
import reference

DTYPES = [torch.float32, torch.float64]


def metric_of(dtype):
    """Values of both signs with many ties, across the ranks too."""
    values = torch.randn(2, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round(decimals=1)
    values[0, 5], values[1, 7], values[1, 8] = torch.nan, -torch.inf, -0.0
    mask = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)) > 0.3
    return values.to(dtype), mask


def select(metric, mask, side, rounding):
    return a3po_kernels.select_tokens(metric, mask, ratio=0.29, side=side, scope="global", rounding=rounding)


def worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    chosen = {}
    for dtype in DTYPES:
        metric, mask = metric_of(dtype)
        for side in ("low", "high"):
            for rounding in ("floor", "ceil"):
                chosen[dtype, side, rounding] = select(metric[rank : rank + 1], mask[rank : rank + 1], side, rounding)
    torch.save(chosen, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def test_two_ranks_select_as_one_batch(tmp_path):
    """The tokens selected on both ranks are those of the joined batch; ties go to the lower rank."""
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for dtype in DTYPES:
        metric, mask = metric_of(dtype)
        for side in ("low", "high"):
            for rounding in ("floor", "ceil"):
                joined = torch.cat([chosen[dtype, side, rounding] for chosen in ranks])
                want = reference.select_tokens(metric, mask, ratio=0.29, side=side, scope="batch", rounding=rounding)
                assert torch.equal(joined, want), (dtype, side, rounding)


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_one_process_is_the_batch(rounding):
    metric, mask = metric_of(torch.float32)
    batch = a3po_kernels.select_tokens(metric, mask, ratio=0.29, side="low", scope="batch", rounding=rounding)
    assert torch.equal(select(metric, mask, "low", rounding), batch)
