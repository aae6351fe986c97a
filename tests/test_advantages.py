"""Advantages by estimator and of several rewards: by hand, beside the reference in fp64, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from host_reads import NoHostReads

import reference
from a3po_kernels import group_advantages, multi_reward_advantages

ESTIMATORS = ("rloo", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
CLOSE = {"rtol": 1e-11, "atol": 1e-12}
# Groups a: 1, 0, 0, 1 (rows 0, 2, 3, 5); b: one; c: two equal rewards.
REWARDS = torch.tensor([1, 5, 0, 0, 2, 1, 2], dtype=torch.float64)
IDS = torch.tensor([7, -3, 7, 7, 9, 7, 9])
LENGTHS = torch.tensor([1, 2, 3, 4, 5, 2, 6])


def uneven(seed, rewards=1):
    """Twenty-four rollouts in unequal groups, one of them alone, one of equal rewards; a rollout without a token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (24,), generator=generator) * 1000 - 5
    ids[3] = 99
    values = torch.rand(24, rewards, generator=generator, dtype=torch.float64) * 3 - 1
    values[ids == ids[0]] = 0.1
    lengths = torch.randint(1, 30, (24,), generator=generator)
    lengths[5] = 0
    return values[:, 0] if rewards == 1 else values, ids, lengths


def test_by_hand():
    third = 1 / 3
    # OPO's baselines: group a (1 * 1 + 2 * 1) / 10 = .3.
    expected = {
        "dr_grpo": [0.5, 5, -0.5, -0.5, 0, 0.5, 0],
        "rloo": [1 - third, 5, -2 * third, -2 * third, 0, 1 - third, 0],
        "opo": [0.7, 5, -0.3, -0.3, 0, 0.7, 0],
    }
    for name, values in expected.items():
        lengths = LENGTHS if name == "opo" else None
        assert group_advantages(REWARDS, IDS, estimator=name, lengths=lengths).tolist() == pytest.approx(values), name
    # REINFORCE++: mean 11/7, sum of squares 35 - 121/7. Over tokens: 23 of them, sum 35, sum of squares 97.
    spread = math.sqrt((35 - 121 / 7) / 6) + 1e-6
    got = group_advantages(REWARDS, None, estimator="reinforce_plus_plus").tolist()
    assert got == pytest.approx([(r - 11 / 7) / spread for r in REWARDS.tolist()])
    spread = math.sqrt((97 - 35**2 / 23) / 22) + 1e-6
    got = group_advantages(REWARDS, IDS, estimator="reinforce_plus_plus", lengths=LENGTHS).tolist()
    assert got == pytest.approx([(r - 35 / 23) / spread for r in REWARDS.tolist()])
    # Its baseline whitens .5, 5, -.5, -.5, 0, .5, 0: mean 5/7, sum of squares 26.
    spread = math.sqrt((26 - 25 / 7) / 6) + 1e-6
    got = group_advantages(REWARDS, IDS, estimator="reinforce_plus_plus_baseline").tolist()
    assert got == pytest.approx([(a - 5 / 7) / spread for a in (0.5, 5, -0.5, -0.5, 0, 0.5, 0)])
    # GDPO, one group of two, weights 1 and 2: A_1 = +-1/sqrt 2, A_2 = -+1/sqrt 2, their sum -+1/sqrt 2, whitened again.
    rewards = torch.tensor([[1.0, 0.0], [0.0, 10.0]], dtype=torch.float64)
    got = multi_reward_advantages(rewards, torch.tensor([4, 4]), torch.tensor([1.0, 2.0]))
    assert got.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators(estimator, seed):
    rewards, ids, lengths = uneven(seed)
    takes = {"rloo": (None,), "opo": (lengths,)}
    for counts in takes.get(estimator, (None, lengths)):
        got = group_advantages(rewards, ids, estimator=estimator, lengths=counts)
        want = reference.estimated_advantages(rewards, ids, estimator, counts)
        assert torch.allclose(got, want, **CLOSE), (estimator, counts)
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        shuffled = group_advantages(
            rewards[order], ids[order], estimator=estimator, lengths=None if counts is None else counts[order]
        )
        assert torch.allclose(shuffled, got[order], **CLOSE)
    if estimator in ("rloo", "opo"):
        assert not got[ids == ids[0]].any() and got[3] == rewards[3]


@pytest.mark.parametrize("seed", range(4))
def test_several_rewards(seed):
    rewards, ids, lengths = uneven(seed, 3)
    for weights in (None, torch.tensor([1.0, -0.5, 2.0])):
        for counts in (None, lengths):
            got = multi_reward_advantages(rewards, ids, weights, lengths=counts)
            assert torch.allclose(got, reference.multi_reward_advantages(rewards, ids, weights, counts), **CLOSE)


def test_names_of_grpo():
    rewards, ids, _ = uneven(0)
    plain = group_advantages(rewards, ids)
    assert torch.equal(plain, group_advantages(rewards, ids, "std", estimator="grpo"))
    assert torch.equal(plain, group_advantages(rewards, ids, normalize="std"))
    centred = group_advantages(rewards, ids, "none")
    assert torch.equal(centred, group_advantages(rewards, ids, estimator="dr_grpo")) and not torch.equal(centred, plain)


def test_whitening_leaves_zeros():
    """Groups without a spread stay exactly 0 where the batch's mean is 0 but for rounding."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.7, 0.1], dtype=torch.float64)
    ids = torch.tensor([0, 0, 0, 1, 1, 1])
    assert not group_advantages(rewards, ids, estimator="reinforce_plus_plus_baseline")[:3].any()
    assert not multi_reward_advantages(rewards[:, None], ids)[:3].any()
    for equal in (torch.full((n,), 0.7, dtype=torch.float64) for n in (1, 3, 11)):
        assert not group_advantages(equal, None, estimator="reinforce_plus_plus").any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_gradient_and_nothing(dtype):
    rewards, ids, lengths = uneven(1)
    given = rewards.to(dtype).requires_grad_()
    for estimator in ("grpo", "dr_grpo", *ESTIMATORS):
        counts = lengths if estimator == "opo" else None
        got = group_advantages(given, ids, estimator=estimator, lengths=counts)
        exact = group_advantages(given.double(), ids, estimator=estimator, lengths=counts)
        assert got.dtype == dtype and not got.requires_grad and torch.equal(got, exact.to(dtype))
        none = group_advantages(given[:0], ids[:0], estimator=estimator, lengths=None if counts is None else counts[:0])
        assert none.shape == (0,) and not none.requires_grad
    assert multi_reward_advantages(given[:, None], ids).dtype == dtype
    assert multi_reward_advantages(given[:0, None], ids[:0]).shape == (0,)


def test_a_group_without_tokens():
    """OPO's baseline of nothing is 0; verl divides 0 by 0."""
    got = group_advantages(REWARDS, IDS, estimator="opo", lengths=torch.where(IDS == 7, 0, LENGTHS))
    assert got.tolist() == pytest.approx([1, 5, 0, 0, 0, 1, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_no_numbers(bad):
    """A ValueError with its place on the CPU; where values are not read (as on a GPU) NaN, never a number."""
    rewards = REWARDS.clone()
    rewards[2] = bad
    for estimator in ("grpo", "dr_grpo", *ESTIMATORS):
        lengths = LENGTHS if estimator == "opo" else None
        with pytest.raises(ValueError, match=rf"rewards must be finite; got {bad} at \[2\]"):
            group_advantages(rewards, IDS, estimator=estimator, lengths=lengths)
        unread = unchecked(group_advantages, rewards, IDS, estimator=estimator, lengths=lengths)
        assert unread[IDS == 7].isnan().all(), estimator
        assert unread[IDS != 7].isnan().all() == ("reinforce" in estimator)
    with pytest.raises(ValueError, match=rf"rewards must be finite; got {bad} at \[2, 1\]"):
        multi_reward_advantages(torch.stack([REWARDS, rewards], 1), IDS)
    assert unchecked(multi_reward_advantages, torch.stack([REWARDS, rewards], 1), IDS).isnan().all()
    with pytest.raises(ValueError, match=r"weights must be finite"):
        multi_reward_advantages(REWARDS[:, None], IDS, torch.tensor([bad]))


def unchecked(call, *given, **options):
    """As on a GPU: values may not be read on the host."""
    with NoHostReads():
        return call(*given, **options)


def test_no_host_reads():
    rewards, ids, lengths = uneven(2)
    for estimator in ("grpo", "dr_grpo", *ESTIMATORS):
        counts = lengths if estimator == "opo" else None
        got = unchecked(group_advantages, rewards, ids, estimator=estimator, lengths=counts)
        assert torch.equal(got, group_advantages(rewards, ids, estimator=estimator, lengths=counts))
    unchecked(multi_reward_advantages, rewards[:, None], ids, torch.ones(1), lengths=lengths)
    negative = unchecked(group_advantages, REWARDS, IDS, estimator="opo", lengths=-LENGTHS)
    assert negative[IDS != -3].isnan().all()


@pytest.mark.cuda
def test_no_synchronisation():
    rewards, ids, lengths = (x.cuda() for x in uneven(2, 2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [
            group_advantages(rewards[:, 0], ids, estimator=name, lengths=lengths if name == "opo" else None)
            for name in ("grpo", "dr_grpo", *ESTIMATORS)
        ]
        found.append(multi_reward_advantages(rewards, ids, lengths=lengths))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rewards, ids, lengths = uneven(2, 2)
    for got, name in zip(found, ("grpo", "dr_grpo", *ESTIMATORS), strict=False):
        want = group_advantages(rewards[:, 0], ids, estimator=name, lengths=lengths if name == "opo" else None)
        assert torch.allclose(got.cpu(), want, **CLOSE)
    with pytest.raises(ValueError, match="rewards must be finite"):
        group_advantages(torch.tensor([math.nan, 1.0], device="cuda"), torch.zeros(2).long().cuda(), validate=True)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: group_advantages(REWARDS, IDS, estimator="gae"), ValueError, "estimator must be one of grpo, .*'gae'"),
        (lambda: group_advantages(REWARDS, IDS, "std", estimator="rloo"), ValueError, "normalize is of .*'rloo'"),
        (lambda: group_advantages(REWARDS, IDS, "std", estimator="dr_grpo"), ValueError, "normalize is of estimator"),
        (lambda: group_advantages(REWARDS, IDS, lengths=LENGTHS), ValueError, "lengths are of the estimators opo"),
        (lambda: group_advantages(REWARDS, IDS, estimator="opo"), ValueError, "lengths must be given"),
        (lambda: group_advantages(REWARDS, None), TypeError, "group_ids must be an integer tensor"),
        (lambda: group_advantages(REWARDS, IDS[1:], estimator="reinforce_plus_plus"), ValueError, "share a shape"),
        (lambda: group_advantages(REWARDS[None], IDS[None]), ValueError, r"rewards must have shape \[S\]; got"),
        (lambda: opo(LENGTHS[1:]), ValueError, r"lengths must have shape \[7\]; got \[6\]"),
        (lambda: opo(LENGTHS > 2), TypeError, "lengths must be a tensor of numbers"),
        (lambda: opo([1] * 7), TypeError, "lengths must be a tensor; got list"),
        (lambda: opo(LENGTHS - 2), ValueError, "lengths must be at least 0; got -1.0"),
        (lambda: opo(LENGTHS / 0), ValueError, "lengths must be finite; got inf"),
        (lambda: multi_reward_advantages(REWARDS, IDS), ValueError, r"rewards must have shape \[S, K\]; got \[7\]"),
        (lambda: multi_reward_advantages(REWARDS[:, None][:, :0], IDS), ValueError, "K >= 1"),
        (lambda: several(torch.ones(2)), ValueError, r"weights must have shape \[1\]; got \[2\]"),
        (lambda: several(torch.ones(1).long()), TypeError, "weights must be a floating-point tensor"),
        (lambda: several([1.0]), TypeError, "weights must be a tensor; got list"),
        (lambda: multi_reward_advantages(REWARDS[:, None], IDS[1:]), ValueError, "share a shape"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def opo(lengths):
    return group_advantages(REWARDS, IDS, estimator="opo", lengths=lengths)


def several(weights):
    return multi_reward_advantages(REWARDS[:, None], IDS, weights)
