"""The collectives of a split head: which, how many bytes, in what order; what a group of one rank costs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from batches import INTERPRETED
from ranks import on_ranks
from split_heads import Case, H, V, run_case, same_bits
from test_vocabulary_failures import LOCAL, N, arguments, said

import a3po_kernels
from a3po_kernels.ops import linear_head
from a3po_kernels.parallel import vocabulary
from a3po_kernels.planning import HeadStep, collectives_of_step

pytestmark = pytest.mark.skipif(INTERPRETED, reason="natively")
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
    call = arguments(rank) | {"objective": a3po_kernels.dapo()}
    for name in ("hidden", "weight"):
        call[name] = call[name].detach().bfloat16().requires_grad_()
    found["bf16"] = _counted(lambda: a3po_kernels.linear_policy_loss(**call).loss.backward())
    return found


def order() -> dict[str, list[str]]:
    """What a step of each route does in which order: the collectives, waits for them, and products for dWeight."""
    found = {}
    for route, options in {"one-pass": {"max_chunk_bytes": 2 * 8 * LOCAL * 4}, "recompute": {}}.items():
        seen: list[str] = []

        def noting(word, function, seen=seen):
            def call(*given, **keywords):
                seen.append(word)
                return function(*given, **keywords)

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vocabulary, GATHER, noting("gather", vocabulary.all_gather_single))
            patch.setattr(vocabulary.Gathering, "wait", noting("wait", vocabulary.Gathering.wait))
            patch.setattr(dist, REDUCE, noting("sum", dist.all_reduce))
            patch.setattr(vocabulary.HiddenSum, "finish", noting("finish", vocabulary.HiddenSum.finish))
            patch.setattr(linear_head._Sum, "add", noting("dWeight", linear_head._Sum.add))
            patch.setattr(linear_head.Logits, "tile", noting("logits", linear_head.Logits.tile))
            step = arguments(dist.get_rank()) | {"objective": a3po_kernels.dapo(), "route": route, **options}
            a3po_kernels.linear_policy_loss(**step).loss.backward()
        found[route] = seen
    return found


def test_what_crosses_ranks_goes_on_beside_products():
    for found in on_ranks(2, order):
        chunk = ["wait", "sum", "dWeight"]
        assert found["one-pass"] == [
            "logits", "gather", "logits", "gather", *chunk, "logits", "gather", *chunk, *chunk, "finish",
        ]  # fmt: skip
        assert found["recompute"] == ["logits", "gather", "wait", "logits", "sum", "dWeight", "finish"]


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
    # dHidden is summed in fp32, however the head multiplies.
    "bf16": [(GATHER, 4 * N * 4), (REDUCE, N * H * 4)],
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
