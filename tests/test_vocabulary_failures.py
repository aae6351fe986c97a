"""What goes wrong among the ranks of a split head is said on every rank; what crosses them is counted."""

from __future__ import annotations

import os
import re
import tempfile
from collections import Counter
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import INTERPRETED
from ranks import on_ranks
from split_heads import Case, H, V, run_case, same_bits

import a3po_kernels
from a3po_kernels import CustomSurrogate, Objective
from a3po_kernels.parallel import vocabulary
from a3po_kernels.planning import HeadStep, collectives_of_step

pytestmark = pytest.mark.skipif(INTERPRETED, reason="natively")
N, LOCAL = 12, 8


def own_surrogate(t):
    return -t.advantages * t.ratio


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
    found["right"] = said(a3po_kernels.linear_policy_loss, **arguments(rank), validate=True)
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
        assert found["right"] == "nothing"
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
        "size": of(vocab_size=0), "target": of(targets=torch.full((3, 4), 2 * LOCAL)),
        "told target": of(targets=torch.full((3, 4), 15), vocab_size=15),
        "untold target": of(targets=torch.full((3, 4), 15), vocab_start=7 * rank, weight=arguments(rank)["weight"][:7]),
        "shape": of(hidden_layout="sequence_sharded"),
        "one launch": said(
            a3po_kernels.policy_loss, torch.zeros(3, 4, LOCAL, dtype=torch.float64), arguments(rank)["targets"],
            arguments(rank)["advantages"], objective=a3po_kernels.dapo(), tp_group=dist.group.WORLD,
            route="one-launch",
        ),
    }  # fmt: skip
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
        assert "IndexError: targets must lie in [0, 16)" in found["target"]
        assert "IndexError: targets must lie in [0, 15)" in found["told target"]
        assert "IndexError: targets must lie in [0, 14)" in found["untold target"]
        assert "targets must have shape [3, 8]" in found["shape"]
        assert "a row's statistics are the ranks' together" in found["one launch"]
    assert "a group that this rank (1) is in" in second["member"] or "TypeError" in second["member"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"vocab_start": 0}, "it needs tp_group"), ({"grad_hidden": "partial"}, "they need tp_group"),
        ({"hidden_layout": "sequence_sharded"}, "they need tp_group"),
        ({"tp_group": "world"}, "process group; got str"),
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


# (module, name): vocabulary's own names for what PyTorch renamed.
GATHER, REDUCE, SCATTER = "all_gather_single", "all_reduce", "reduce_scatter_single"
KINDS = (
    (vocabulary, GATHER), (dist, REDUCE), (vocabulary, SCATTER), (dist, "all_gather"), (dist, "all_gather_object"),
    (dist, "broadcast"),
)  # fmt: skip


def _counted(work) -> list[tuple[str, int]]:
    """(kind, bytes of this rank's tensor) of every collective that `work` starts."""
    seen = []

    def counting(kind, function):
        def call(*given, **keywords):
            sent = given[0] if kind in ("all_reduce", "broadcast") else given[1]
            seen.append((kind, sent.numel() * sent.element_size()))
            return function(*given, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, kind in KINDS:
            patch.setattr(module, kind, counting(kind, getattr(module, kind)))
        work()
    return seen


def count() -> dict[str, list[tuple[str, int]]]:
    rank, found = dist.get_rank(), {}
    options = {
        "one chunk": {}, "chunks": {"max_chunk_bytes": 2 * 8 * LOCAL * 4}, "recompute": {"route": "recompute"},
        "partial": {"grad_hidden": "partial"}, "scatter": {"grad_hidden": "reduce_scatter"},
        "frozen": {"frozen": True}, "lora": {"lora": True}, "sharded": {"hidden_layout": "sequence_sharded"},
        "start": {"vocab_start": 8 * rank}, "told": {"vocab_start": 8 * rank, "vocab_size": 16},
        "validate": {"validate": True}, "active": {"route": "recompute", "objective": a3po_kernels.psr()},
        "no gradient": {"no_grad": True},
        "lp_reg": {"objective": a3po_kernels.lp_reg(quantile=0.9)},
    }  # fmt: skip
    for name, given in options.items():
        call = arguments(rank) | {"objective": a3po_kernels.dapo()} | given
        if call.pop("frozen", False):
            call["hidden"] = call["hidden"].detach()
        if call.pop("lora", False):
            a = torch.ones(2, H, dtype=torch.float64, requires_grad=True)
            call["lora"] = (a, torch.ones(LOCAL, 2, dtype=torch.float64, requires_grad=True), 1.0)
        if "hidden_layout" in call:
            call["hidden"] = call["hidden"].detach()[:, 2 * rank : 2 * rank + 2].contiguous().requires_grad_()
        no_grad = call.pop("no_grad", False)

        def step(call=call, no_grad=no_grad):
            with torch.set_grad_enabled(not no_grad):
                loss = a3po_kernels.linear_policy_loss(**call).loss
                return None if no_grad else loss.backward()

        found[name] = _counted(step)
    logits = torch.zeros(3, 4, LOCAL, dtype=torch.float64, requires_grad=True)
    call = {name: x for name, x in arguments(rank).items() if name not in ("hidden", "weight")}
    found["logits"] = _counted(lambda: a3po_kernels.policy_loss(logits, **call).loss.backward())
    return found


E = 8  # bytes of a number in fp64
STATISTICS, D_HIDDEN = (GATHER, 4 * N * E), (REDUCE, N * H * E)
EXPECTED = {
    "one chunk": [STATISTICS, D_HIDDEN],
    # Three chunks of four rows: the next one's statistics are on their way before the last one's gradient.
    "chunks": [(GATHER, 4 * 4 * E)] * 2 + [(REDUCE, 4 * H * E), (GATHER, 4 * 4 * E)] + [(REDUCE, 4 * H * E)] * 2,
    "recompute": [STATISTICS, D_HIDDEN],
    "partial": [STATISTICS],
    "scatter": [STATISTICS, (SCATTER, N * H * E)],
    "frozen": [STATISTICS],
    "lora": [STATISTICS, (REDUCE, 2 * H * E), D_HIDDEN],
    "sharded": [(GATHER, N // 2 * H * E), STATISTICS, (SCATTER, N * H * E)],
    "start": [(REDUCE, 16), STATISTICS, D_HIDDEN],
    "told": [STATISTICS, D_HIDDEN],
    # Two rollouts of four tokens are right ones.
    "active": [STATISTICS, (REDUCE, 8 * H * E)],
    "no gradient": [STATISTICS],
    "lp_reg": [(GATHER, 4 * E), (GATHER, 2 * 4 * E), STATISTICS, D_HIDDEN],
    "logits": [STATISTICS],
}


@pytest.fixture(scope="module")
def counts():
    return on_ranks(2, count)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_collectives_of_a_step(counts, name):
    assert counts[0][name] == counts[1][name] == EXPECTED[name]


def test_validating_is_one_small_collective_more(counts):
    first, *rest = counts[0]["validate"]
    assert first[0] == "all_gather" and rest == EXPECTED["one chunk"]


def of_one() -> dict:
    """A group of one rank: the very call without a group."""
    found = {}
    calls = ("linear_policy_loss", "policy_loss", "linear_token_logprobs", "token_logprobs", "min_p_token_logprobs")
    for call in calls:
        case = Case(call, call=call)
        group = {"tp_group": dist.group.WORLD}
        alone = run_case(case)
        grouped: dict = {}
        seen = _counted(
            lambda case=case, group=group, into=grouped: into.update(
                run_case(Case(case.name, call=case.call, options=group))
            )
        )
        found[call] = (seen, same_bits(alone, grouped))
    found["start"] = said(
        a3po_kernels.linear_token_logprobs, torch.zeros(2, H), torch.zeros(V, H), torch.tensor([0, 1]),
        tp_group=dist.group.WORLD, vocab_start=3,
    )  # fmt: skip
    return found


def test_a_group_of_one_crosses_nothing():
    (found,) = on_ranks(1, of_one)
    assert "vocab_start must be 0 in a group of one rank" in found.pop("start")
    assert all(found[call] == ([], True) for call in found)


# The formula of docs/scaling.md, for the calls that it describes.
PLANNED = {
    "one chunk": {}, "chunks": {"max_chunk_bytes": 2 * 8 * LOCAL * 4}, "recompute": {"route": "recompute"},
    "partial": {"grad_hidden": "partial"}, "scatter": {"grad_hidden": "reduce_scatter"}, "lora": {"lora_rank": 2},
    "sharded": {"hidden_layout": "sequence_sharded"}, "told": {},
    "active": {"route": "recompute", "active_fraction": 8 / 12}, "no gradient": {"active_fraction": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("name", PLANNED)
def test_the_documented_formula_is_what_is_called(counts, name):
    step = HeadStep(
        N, 2 * LOCAL, H, torch.float64, a3po_kernels.dapo(), rollouts=3, tp=2, reduce_metrics=False, **PLANNED[name]
    )
    words = {GATHER: "all_gather", REDUCE: "all_reduce", SCATTER: "reduce_scatter"}
    called = Counter((words[kind], size) for kind, size in counts[0][name])
    assert Counter({(kind, size): count for kind, count, size in collectives_of_step(step)}) == called
