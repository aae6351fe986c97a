"""What goes wrong among the ranks of a split head is said on every rank; what crosses them is counted."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import INTERPRETED
from ranks import on_ranks
from split_heads import H
from torch._subclasses import FakeTensorMode

import a3po_kernels
from a3po_kernels import CustomSurrogate, Objective

pytestmark = pytest.mark.skipif(INTERPRETED, reason="natively")
N, LOCAL = 12, 8


def own_surrogate(t):
    return -t.advantages * t.ratio


def falling(step, rate):
    return 2.0 - rate * 0


class Falling:
    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, step):
        return self.rate


def closure(rate):
    def falls(step):
        return 2.0 - 0.1 * rate

    return falls


def arguments(rank: int) -> dict:
    """A right call on two ranks, [3, 4] tokens and a vocabulary of 16."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2 * LOCAL, H, generator=generator, dtype=torch.float64)
    return {
        "hidden": torch.randn(3, 4, H, generator=generator, dtype=torch.float64).requires_grad_(),
        "weight": weight[rank * LOCAL : (rank + 1) * LOCAL].clone().requires_grad_(),
        "targets": torch.randint(0, 2 * LOCAL, (3, 4), generator=generator),
        "advantages": torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64),
        "objective": Objective(surrogate=CustomSurrogate(own_surrogate)), "tp_group": dist.group.WORLD,
    }  # fmt: skip


def _other(rank: int, one: object, other: object) -> object:
    return one if rank == 0 else other


# What each rank changes, and what both must be told.
DISAGREEMENTS = {
    "objective": (lambda r, a: a | {"objective": _other(r, a3po_kernels.dapo(), a3po_kernels.grpo())}, "objective"),
    "parameter of it": (lambda r, a: a | {"objective": a3po_kernels.a3po(rho=_other(r, 2.0, 3.0))}, "rho|start=3.0"),
    "function of it": (
        lambda r, a: a | {"objective": Objective(surrogate=CustomSurrogate(_other(r, own_surrogate, torch.neg)))},
        r"own_surrogate.* on rank 0",
    ),
    "rows": (lambda r, a: a | {"hidden": a["hidden"][: 3 - r]}, r"hidden is \[3, 4, 6\].* on rank 0, \[2, 4, 6\]"),
    "dtype": (lambda r, a: a | {"weight": a["weight"].to(_other(r, torch.float64, torch.float32))}, "weight is"),
    "width": (lambda r, a: a | {"weight": a["weight"][:, : H - r]}, r"weight is \[8, 6\]"),
    "vocabulary": (lambda r, a: a | {"vocab_size": 15 + r}, "vocab_size is 15 on rank 0, 16 on rank 1"),
    "sizes": (lambda r, a: a | {"weight": a["weight"][: LOCAL - r]}, r"weight is \[8, 6\].*\[7, 6\]"),
    "chunks": (lambda r, a: a | {"max_chunk_bytes": 1000 + r}, "max_chunk_bytes is 1000 on rank 0"),
    "gradient": (lambda r, a: a | {"weight": a["weight"].detach().requires_grad_(r == 0)}, "without a gradient"),
    "old": (lambda r, a: a | {"old_logprobs": _other(r, None, torch.zeros(3, 4))}, "old_logprobs is None on rank 0"),
    "start on one": (lambda r, a: a | {"vocab_start": _other(r, 0, None)}, "vocab_start is given on rank 0"),
    "gap": (lambda r, a: a | {"vocab_start": 9 * r, "vocab_size": 17}, "none has the columns from 8 to 9"),
    "overlap": (lambda r, a: a | {"vocab_start": 7 * r}, "both have the columns from 7 to 8"),
    "end": (lambda r, a: a | {"vocab_start": 8 * r, "vocab_size": 20}, "end at 16, vocab_size is 20"),
    "contents": (
        lambda r, a: a | {"mask": torch.arange(12).view(3, 4) < 10 + r}, r"mask is \[3, 4\] bool of contents"
    ),
    "number": (lambda r, a: a | {"denominator": torch.tensor(3.0 + r)}, r"denominator is \[\] float32 3.0 of"),
    "schedule": (
        lambda r, a: a | {"objective": a3po_kernels.a3po(schedule=Falling(2.0 + r))}, "Falling with {rate: 2.0}"
    ),
    "partial": (
        lambda r, a: a | {"objective": a3po_kernels.a3po(schedule=functools.partial(falling, rate=r))}, "{rate: 0}",
    ),
    "closure": (
        lambda r, a: a | {"objective": a3po_kernels.a3po(schedule=closure(r))}, "falls with 0",
    ),
    "layout": (lambda r, a: a | {"hidden_layout": _other(r, "replicated", "sequence_sharded")}, "hidden_layout is"),
    # On one rank alone an error of its own would leave the other waiting.
    "wrong here": (lambda r, a: a | {"temperature": _other(r, 1.0, -1.0)}, "temperature is 1.0 on rank 0"),
}  # fmt: skip


def said(work, *given, **keywords) -> str:
    try:
        work(*given, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagree() -> dict[str, str]:
    rank, found = dist.get_rank(), {}
    for name, (change, _) in DISAGREEMENTS.items():
        found[name] = said(a3po_kernels.linear_policy_loss, **change(rank, arguments(rank)), validate=True)
        dist.barrier()
    call = arguments(rank)
    for name in ("advantages", "objective"):
        call.pop(name)
    found["log-probs"] = said(
        a3po_kernels.linear_token_logprobs, **call, softcap=_other(rank, None, 3.0), validate=True
    )
    found["min-p"] = said(
        a3po_kernels.linear_min_p_token_logprobs, **call, min_p=_other(rank, 0.1, 0.2), validate=True
    )
    logits = torch.zeros(3, 4, LOCAL)
    found["logits"] = said(
        a3po_kernels.token_logprobs, logits, call["targets"], tp_group=dist.group.WORLD, validate=True,
        temperature=_other(rank, 1.0, 2.0),
    )  # fmt: skip
    with torch.set_grad_enabled(rank == 0):
        found["grad mode"] = said(a3po_kernels.linear_policy_loss, **arguments(rank), validate=True)
    with torch.autocast("cpu", enabled=rank == 1):
        found["autocast"] = said(a3po_kernels.linear_policy_loss, **arguments(rank), validate=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found["fake"] = said(a3po_kernels.linear_policy_loss, **arguments(rank), validate=True)
    found["right"] = said(a3po_kernels.linear_policy_loss, **arguments(rank), validate=True)
    alone = [dist.new_group([member]) for member in range(2)][rank]
    metrics = {"group": alone, "reduce_metrics": True, "cp_group": alone}
    found["right, groups"] = said(a3po_kernels.linear_policy_loss, **arguments(rank), **metrics, validate=True)
    found["right, cut"] = said(
        a3po_kernels.linear_policy_loss, **arguments(rank), vocab_start=(8 * rank, 8 * rank + 7 + rank), validate=True
    )
    return found


@pytest.fixture(scope="module")
def disagreements():
    return on_ranks(2, disagree)


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_disagree_are_both_told(disagreements, name):
    pattern = DISAGREEMENTS[name][1]
    for found in disagreements:
        assert found[name].startswith("ValueError"), found[name]
        assert re.search(pattern, found[name]), found[name]


def test_so_are_the_other_calls_and_right_ones_pass(disagreements):
    for found in disagreements:
        assert "softcap is None on rank 0, 3.0 on rank 1" in found["log-probs"]
        assert "min_p is 0.1 on rank 0, 0.2 on rank 1" in found["min-p"]
        assert "temperature is 1.0 on rank 0" in found["logits"]
        assert "grad mode is on on rank 0, off on rank 1" in found["grad mode"]
        assert "autocast is off on rank 0, bfloat16 on rank 1" in found["autocast"]
        assert found["fake"] == "nothing"  # no value is looked at
        assert found["right"] == found["right, groups"] == "nothing"
        assert "none has the columns from 7 to 8" in found["right, cut"]


def misuse() -> dict[str, str]:
    rank = dist.get_rank()

    def of(**changes):
        return said(a3po_kernels.linear_policy_loss, **{**arguments(rank), **changes})

    outside = dist.new_group([0])
    found = {
        "word": of(grad_hidden="sum"), "layout": of(hidden_layout="sharded"),
        "scatter": of(hidden_layout="sequence_sharded", grad_hidden="all_reduce"),
        "uneven": of(grad_hidden="reduce_scatter", hidden=torch.zeros(3, 5, H, dtype=torch.float64),
                     targets=torch.zeros(3, 5, dtype=torch.int64)),
        "start": of(vocab_start=-1), "kind": of(vocab_start=2.0), "stop": of(vocab_start=(0, 9)),
        "size": of(vocab_size=0), "large": of(vocab_size=17), "one of": of(vocab_start=(5,)),
        "target": of(targets=torch.full((3, 4), 2 * LOCAL)),
        "told target": of(targets=torch.full((3, 4), 15), vocab_size=15),
        "untold target": of(targets=torch.full((3, 4), 15), vocab_start=7 * rank, weight=arguments(rank)["weight"][:7]),
        "shape": of(hidden_layout="sequence_sharded"),
        "one launch": said(
            a3po_kernels.policy_loss, torch.zeros(3, 4, LOCAL, dtype=torch.float64), arguments(rank)["targets"],
            arguments(rank)["advantages"], objective=a3po_kernels.dapo(), tp_group=dist.group.WORLD,
            route="one-launch",
        ),
    }  # fmt: skip
    alone = [dist.new_group([member]) for member in range(2)][rank]
    wide = replace(a3po_kernels.fork_tokens().shaping[0], scope="global")
    found["metrics"] = of(reduce_metrics=True)
    found["rule"] = of(objective=Objective(shaping=(wide,)))
    found["same tokens"] = of(objective=Objective(shaping=(wide,)), group=dist.group.WORLD)
    found["cp"] = of(cp_group=dist.group.WORLD)
    found["alone"] = of(objective=Objective(shaping=(wide,)), group=alone, reduce_metrics=True)
    if rank == 1:
        found["member"] = of(tp_group=outside)
    return found


def test_misuse_is_refused():
    first, second = on_ranks(2, misuse)
    for found in (first, second):
        assert "grad_hidden must be one of all_reduce, reduce_scatter, partial; got 'sum'" in found["word"]
        assert "hidden_layout must be one of" in found["layout"]
        assert "needs grad_hidden 'reduce_scatter'" in found["scatter"]
        assert "as many rows for each of the 2 ranks; hidden has 5" in found["uneven"]
        assert "vocab_start must be at least 0" in found["start"] and "TypeError" in found["kind"]
        assert "at most 8 further, the rows of weight; got (0, 9)" in found["stop"]
        assert "vocab_size must be positive" in found["size"]
        assert "vocab_size must lie in [1, 16], the rows of weight of all ranks; got 17" in found["large"]
        assert "TypeError: vocab_start must be an integer, or a tuple (first, stop)" in found["one of"]
        assert "IndexError: targets must lie in [0, 16)" in found["target"]
        assert "IndexError: targets must lie in [0, 15)" in found["told target"]
        assert "IndexError: targets must lie in [0, 14)" in found["untold target"]
        assert "targets must have shape [3, 8]" in found["shape"]
        assert "a row's statistics are the ranks' together" in found["one launch"]
        for name in ("metrics", "rule", "same tokens"):
            assert "group must hold, of the tensor-parallel ranks [0, 1], this one alone" in found[name]
        assert "cp_group must hold, of the tensor-parallel ranks [0, 1], this one alone" in found["cp"]
        assert found["alone"] == "nothing"
    assert "ValueError: tp_group must be a process group that this rank is in" in second["member"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"vocab_start": 0}, "it needs tp_group"), ({"grad_hidden": "partial"}, "they need tp_group"),
        ({"hidden_layout": "sequence_sharded"}, "they need tp_group"),
        ({"tp_group": "world"}, "ProcessGroup or None; got str"),
    ],
)  # fmt: skip
def test_words_without_a_group(keywords, message):
    with pytest.raises((ValueError, TypeError), match=message):
        a3po_kernels.linear_token_logprobs(torch.zeros(2, H), torch.zeros(5, H), torch.tensor([0, 1]), **keywords)


def with_nan() -> list:
    """NaN in the weight of rank 1 alone, and a target's logit of -inf there."""
    rank = dist.get_rank()
    found = []
    for route in ("one-pass", "recompute"):
        call = arguments(rank) | {"objective": a3po_kernels.dapo(), "route": route}
        if rank == 1:
            call["weight"].data[3, 2] = torch.nan
        out = a3po_kernels.linear_policy_loss(**call)
        out.loss.backward()
        found.append((out.loss.detach(), out.entropy, call["hidden"].grad))
    return found


def test_a_nan_of_one_rank_reaches_all():
    for rank in on_ranks(2, with_nan):
        for loss, entropy, d_hidden in rank:
            assert loss.isnan() and entropy.isnan().all() and d_hidden.isnan().all()


def _dying(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
                            timeout=timedelta(seconds=5))  # fmt: skip
    dist.barrier()
    if rank == 1:
        os._exit(0)
    text = said(a3po_kernels.linear_policy_loss, **arguments(rank))
    with open(os.path.join(folder, "said"), "w") as file:
        file.write(text)
    os._exit(0)


def test_a_rank_that_dies_makes_the_other_raise():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_dying, args=(folder,), nprocs=2)
        with open(os.path.join(folder, "said")) as file:
            assert file.read().startswith(("RuntimeError", "DistBackendError", "DistNetworkError"))
