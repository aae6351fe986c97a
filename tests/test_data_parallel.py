"""Reductions over data-parallel ranks, on two and on four processes, against one process with the joined batch."""

from __future__ import annotations

import pytest
import torch
from batches import largest_error
from data_parallel_cases import (
    DENOMINATED,
    LENGTH,
    OBJECTIVES,
    ROLLOUTS,
    loss_of,
    mine,
    part,
    whole,
)
from rank_runner import GATHER

import a3po_kernels
import reference
from a3po_kernels import Objective, PolarityWeights, TokenRule

EVERY = slice(0, ROLLOUTS)


def assert_metrics(got, expected) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert largest_error(got[name], torch.as_tensor(value)) < 1e-12, name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_are_those_of_the_joined_batch(ranks, name):
    """The same bits on every rank; one gathering, beside what a global rule counts."""
    expected = loss_of(part(whole(), EVERY), OBJECTIVES[name])[0].metrics
    for results in ranks:
        metrics, calls = results["reduced"][name]
        assert calls.count(GATHER) == (2 if name == "global" else 1)
        assert calls.count("all_reduce") == (9 if name == "global" else 0)  # the number, and eight bytes of an fp64
        assert_metrics(metrics, expected)
        assert all(torch.equal(value, ranks[0]["reduced"][name][0][key]) for key, value in metrics.items())


def test_metrics_of_the_other_losses(ranks):
    """Active rows alone in either route; no entropy; a NaN of one rank is everybody's."""
    logits, targets, advantages, keywords = part(whole(), EVERY)
    hidden, weight = logits.nan_to_num(0.0).clone().requires_grad_(), torch.eye(logits.shape[-1], dtype=logits.dtype)
    active = a3po_kernels.linear_policy_loss(
        hidden, weight, targets, advantages, objective=a3po_kernels.a3po(), statistics="active", **keywords
    ).metrics
    keywords["ref_logprobs"] = old = keywords["old_logprobs"]
    plain = a3po_kernels.logprob_policy_loss(old + 0.1, advantages, objective=a3po_kernels.dapo(), **keywords).metrics
    for results in ranks:
        found = results["reduced elsewhere"]
        assert_metrics(found["one-pass"], active)
        assert_metrics(found["recompute"], active)
        assert_metrics(found["logprobs"], plain)
        assert found["nan"]["ratio_max"].isnan() and found["nan"]["ratio_mean"].isnan()
        assert found["nan"]["token_count"] == plain["token_count"]


@pytest.mark.parametrize("aggregation, over", DENOMINATED)
def test_a_step_of_micro_batches_is_the_batch(ranks, aggregation, over):
    """Losses and gradients, averaged as DDP and an accumulating trainer do, add up to the joined batch's."""
    objective, length = DENOMINATED[aggregation, over], {}
    if aggregation == "seq-mean-token-sum-norm":
        length["max_length"] = 9.0
    out, gradient = loss_of(part(whole(), EVERY), objective, **length)
    found = [results["denominators"][aggregation, over] for results in ranks]
    counts, losses, gradients, calls = zip(*found, strict=True)
    assert all(torch.equal(count, counts[0]) and count.ndim == 0 for count in counts)
    assert all(call == ["all_reduce"] for call in calls)
    assert largest_error(sum(losses), out.loss) < 1e-12
    assert largest_error(torch.cat(gradients), gradient) < 1e-12


def test_groups_of_half_the_ranks(ranks):
    """A global rule, the metrics, the divisor and select_tokens of each half are those of its own joined batch."""
    world = len(ranks)
    for half in range(2):
        members = range(half * world // 2, (half + 1) * world // 2)
        rows = slice(mine(members[0], world).start, mine(members[-1], world).stop)
        objective = Objective(shaping=(TokenRule(ratio=0.29, rest_scale=0.5, scope="batch"),))
        out, _ = loss_of(part(whole(), rows), objective)
        found = [ranks[rank]["subgroups"] for rank in members]
        weights, counts, metrics, values, chosen, _, calls = zip(*found, strict=True)
        assert torch.equal(torch.cat(weights), out.weights)
        for each in metrics:
            assert_metrics(each, out.metrics)
        want = reference.select_tokens(torch.stack(values), ratio=0.4, side="high", scope="batch")
        assert torch.equal(torch.stack(chosen), want)
        assert all(count == out.metrics["token_count"] / len(members) for count in counts)
        if world == 2:
            assert not any(calls), "a group of one rank reduces nothing"
        else:
            assert all(len(call) == 9 + 2 for call in calls)


def test_wrong_groups_are_refused(ranks):
    for results in ranks:
        refused = results["subgroups"][5]
        assert set(refused) == {"not ours", "nothing to reduce", "no group", "another scope"}
        assert refused["not ours"].startswith("ValueError: group must be a process group that this rank is in")
        assert "reduce_metrics=True" in refused["nothing to reduce"]
        assert refused["no group"].startswith("TypeError: group must be a torch.distributed ProcessGroup or None; got")
        assert "scope = 'rollout'" in refused["another scope"]


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0])


def test_denominators_by_hand():
    """Without torch.distributed: 5 tokens in 2 of 3 rollouts, 3 of them positive."""
    count = a3po_kernels.global_denominator
    mean, rollouts = Objective(), a3po_kernels.gspo()
    assert count(mean, MASK) == 5 and count(rollouts, MASK) == 2
    assert count(a3po_kernels.dr_grpo(), MASK, max_length=10) == 30
    assert count(a3po_kernels.psr(), MASK, ADVANTAGES) == 3
    assert count(a3po_kernels.nsr(), MASK, ADVANTAGES) == 2
    assert count(a3po_kernels.nsr(), MASK, polarity=-ADVANTAGES) == 3
    assert count(a3po_kernels.psr(aggregation="seq-mean-token-sum"), MASK, ADVANTAGES) == 1
    assert count(mean, MASK, accumulation=2, average_over_ranks=True) == 2.5
    ends = torch.tensor([0, 3, 5, 5])
    assert count(mean, cu_seqlens=ends) == 5 and count(rollouts, cu_seqlens=ends) == 2
    assert count(a3po_kernels.psr(), advantages=ADVANTAGES, cu_seqlens=ends) == 3
    assert count(a3po_kernels.psr(), advantages=torch.tensor([1.0, 1, -1, -1, 1]), cu_seqlens=ends) == 3
    assert count(a3po_kernels.psr(), MASK, torch.tensor([[1.0, -1, 1, 1], [1, -1, 1, 1], [1, 1, 1, 1]])) == 3
    assert count(mean, advantages=torch.ones(2, 4)) == 8
    assert count(mean, torch.zeros(2, 4)) == 0
    assert count(mean, MASK).dtype == torch.float64


@pytest.mark.parametrize(
    "arguments, keywords, message",
    [
        ((a3po_kernels.fork_tokens(), MASK), {}, "known from its own batch and statistics alone"),
        ((Objective(normalize_over="selected", shaping=(PolarityWeights(lambda step: step),)), MASK), {}, "a schedule"),
        ((a3po_kernels.psr(), MASK), {}, "advantages or polarity; got neither"),
        ((a3po_kernels.psr(), MASK, torch.ones(2)), {}, "advantages must have shape"),
        ((a3po_kernels.psr(), MASK), {"polarity": torch.ones(3) > 0}, "polarity takes"),
        ((a3po_kernels.dr_grpo(), MASK), {}, "needs max_length"),
        ((a3po_kernels.dapo(), MASK), {"max_length": 4}, "max_length is of seq-mean-token-sum-norm"),
        ((a3po_kernels.dapo(),), {}, "mask must be given"),
        ((a3po_kernels.dapo(), MASK), {"accumulation": 0}, "accumulation must be at least 1; got 0"),
        ((a3po_kernels.dapo(), MASK), {"accumulation": 1.5}, "accumulation must be an int; got float"),
        ((a3po_kernels.dapo(), MASK), {"group": "world"}, "group must be a torch.distributed ProcessGroup"),
        ((a3po_kernels.dapo(), MASK), {"cp_group": 1}, "cp_group must be a torch.distributed ProcessGroup"),
        ((a3po_kernels.dapo(),), {"cu_seqlens": torch.zeros(2, 2, dtype=torch.long)}, r"shape \[S \+ 1\]"),
    ],
)
def test_denominators_that_are_not_known(arguments, keywords, message):
    with pytest.raises((ValueError, TypeError), match=message):
        a3po_kernels.global_denominator(*arguments, **keywords)


def test_one_process_reduces_nothing():
    """reduce_metrics without torch.distributed are this process's own, to the bit."""
    arguments = part(whole(), slice(0, 2))
    got = loss_of(arguments, OBJECTIVES["a3po"], reduce_metrics=True)[0].metrics
    own = loss_of(arguments, OBJECTIVES["a3po"])[0].metrics
    assert all(torch.equal(got[name], own[name]) for name in own)
    assert LENGTH * 2 >= got["token_count"] > 0
    with pytest.raises(TypeError, match="reduce_metrics must be True or False; got int"):
        loss_of(arguments, OBJECTIVES["a3po"], reduce_metrics=1)
