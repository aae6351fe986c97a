"""Every bad input is refused by name, before anything runs."""

from __future__ import annotations

import pytest
import torch

import a3po_kernels
from a3po_kernels import (
    a3po,
    cispo,
    dapo,
    fork_tokens,
    group_advantages,
    grpo,
    linear_policy_loss,
    lp_reg,
    min_p_token_logprobs,
    plan_rows,
    policy_loss,
    sapo,
    select_tokens,
    token_logprobs,
    w_reinforce,
)  # fmt: skip

LOGITS = torch.randn(2, 3, 5)
TARGETS = torch.tensor([[0, 1, 2], [3, 4, -100]])
ADVANTAGES = torch.tensor([1.0, -1.0])


def loss(logits=LOGITS, targets=TARGETS, advantages=ADVANTAGES, objective=None, **keywords):
    return policy_loss(logits, targets, advantages, objective=objective or a3po(), **keywords)


def packed(cu_seqlens, **keywords):
    ends = torch.tensor(cu_seqlens) if isinstance(cu_seqlens, list) else cu_seqlens
    keywords = {"advantages": torch.ones(len(ends) - 1), **keywords}
    return loss(LOGITS.view(6, 5), TARGETS.view(6), cu_seqlens=ends, **keywords)


MASK = torch.ones(2, 3)


def linear(**keywords):
    return linear_policy_loss(LOGITS, torch.randn(7, 5), TARGETS, ADVANTAGES, objective=a3po(), **keywords)


def test_the_good_input_is_good():
    assert loss().loss.isfinite() and packed([0, 3, 6]).loss.isfinite() and linear(mask=MASK).loss.isfinite()


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: loss(advantages=torch.ones(3)), ValueError, r"advantages.*\[2\].*\[2, 3\].*got \[3\]"),
        (lambda: loss(advantages=torch.ones(2, 1)), ValueError, r"advantages.*got \[2, 1\]"),
        (lambda: loss(advantages=torch.ones(6)), ValueError, r"advantages.*got \[6\]"),
        (lambda: loss(advantages=torch.ones(2, dtype=torch.long)), TypeError, "advantages"),
        (lambda: loss(advantages=[1.0, -1.0]), TypeError, "advantages must be a tensor"),
        (lambda: loss(logits=LOGITS.long()), TypeError, "logits.*int64"),
        (lambda: loss(logits=LOGITS.view(6, 5), targets=TARGETS.view(6)), ValueError, "cu_seqlens"),
        (lambda: loss(logits=LOGITS[..., :0]), ValueError, "logits"),
        (lambda: loss(targets=TARGETS[:, :2]), ValueError, r"targets.*\[2, 3\].*got \[2, 2\]"),
        (lambda: loss(targets=TARGETS.float()), TypeError, "targets"),
        (lambda: loss(targets=TARGETS + 1), IndexError, r"\[0, 5\).*got 5"),
        (lambda: loss(targets=TARGETS - 1), IndexError, "got -1"),
        (lambda: loss(objective="a3p"), ValueError, "objective must be .*; got 'a3p'; did you mean 'a3po'"),
        (lambda: loss(mask=torch.ones(2, 4)), ValueError, "mask"),
        (lambda: loss(old_logprobs=torch.ones(2)), ValueError, "old_logprobs"),
        (lambda: loss(old_logprobs=TARGETS), TypeError, "old_logprobs"),
        (lambda: loss(ref_logprobs=torch.ones(3, 2)), ValueError, "ref_logprobs"),
        (lambda: loss(importance_weights=torch.ones(5)), ValueError, "importance_weights"),
        (lambda: loss(polarity=torch.ones(5)), ValueError, "polarity"),
        (lambda: loss(polarity=torch.tensor([True, False])), TypeError, r"polarity.*got torch.bool"),
        (lambda: loss(polarity=torch.ones(2, 3, dtype=torch.bool)), TypeError, r"polarity.*got torch.bool"),
        (lambda: loss(mask=torch.full((2, 3), 0.5)), ValueError, "mask must be bool or hold 0 and 1; got 0.5"),
        (lambda: loss(mask=torch.full((2, 3), float("nan"))), ValueError, "mask must be.*got nan"),
        (lambda: loss(mask=torch.tensor([[0.0, float("-inf"), 0.0]] * 2)), ValueError, "mask must be.*got -inf"),
        (lambda: loss(mask=torch.full((2, 3), 2)), ValueError, "mask must be.*got 2"),
        (lambda: loss(ignore_index=None), TypeError, "ignore_index must be an integer; got NoneType"),
        (lambda: loss(ignore_index=-100.0), TypeError, "ignore_index must be an integer; got float"),
        (lambda: token_logprobs(LOGITS, TARGETS, ignore_index=None), TypeError, "ignore_index"),
        (lambda: min_p_token_logprobs(LOGITS, TARGETS, ignore_index=None), TypeError, "ignore_index"),
        (lambda: token_logprobs(LOGITS, TARGETS, temperature=torch.zeros(2, 3)), ValueError, "temperature"),
        (lambda: plan_rows(torch.full((2, 3), 0.5), ADVANTAGES, objective=a3po()), ValueError, "mask"),
        (lambda: plan_rows(MASK, ADVANTAGES, objective=a3po(), polarity=ADVANTAGES > 0), TypeError, "polarity"),
        (lambda: select_tokens(ADVANTAGES, torch.tensor([0.5, 1.0]), ratio=0.5, side="low"), ValueError, "mask"),
        (lambda: linear(ignore_index=None), TypeError, "ignore_index"),
        (lambda: linear(mask=torch.full((2, 3), 0.5)), ValueError, "mask"),
        (lambda: linear(polarity=torch.tensor([True, False])), TypeError, "polarity"),
        (lambda: linear(temperature=torch.zeros(2, 3)), ValueError, "temperature"),
        (lambda: linear(denominator=torch.tensor(float("nan"))), ValueError, "denominator.*got nan"),
        (lambda: loss(temperature=0.0), ValueError, "temperature"),
        (lambda: loss(temperature=-1), ValueError, "temperature"),
        (lambda: loss(temperature=float("nan")), ValueError, "temperature"),
        (lambda: loss(temperature="1"), TypeError, "temperature"),
        (lambda: loss(temperature=torch.ones(2)), ValueError, r"temperature.*\[2, 3\]"),
        (lambda: loss(temperature=torch.zeros(2, 3)), ValueError, "temperature"),
        (lambda: loss(temperature=torch.ones(2, 3, requires_grad=True)), ValueError, "temperature"),
        (lambda: loss(temperature=torch.full((2, 3), float("nan"))), ValueError, "temperature.*got nan"),
        (lambda: loss(temperature=torch.tensor(0.0)), ValueError, "temperature.*got 0"),
        (lambda: loss(softcap=0.0), ValueError, "softcap"),
        (lambda: loss(softcap=-5.0), ValueError, "softcap"),
        (lambda: loss(logit_scale=0), ValueError, "logit_scale"),
        (lambda: loss(backend="cuda"), ValueError, "backend"),
        (lambda: loss(backend="triton"), ValueError, "TRITON_INTERPRET"),
        (lambda: loss(step=torch.zeros(2)), ValueError, "step"),
        (lambda: loss(step="1"), TypeError, "step"),
        (lambda: loss(denominator=-1), ValueError, "denominator"),
        (lambda: loss(denominator=torch.ones(1)), ValueError, "denominator"),
        (lambda: loss(denominator=torch.tensor(-1.0)), ValueError, "denominator must be finite and at least 0; got -1"),
        (lambda: loss(denominator=torch.tensor(float("nan"))), ValueError, "denominator.*got nan"),
        (lambda: loss(denominator=torch.tensor(float("inf"))), ValueError, "denominator.*got inf"),
        (lambda: loss(max_length=0), ValueError, "max_length"),
        (lambda: loss(objective=dapo(kl_coef=0.1)), ValueError, "ref_logprobs"),
        (lambda: loss(objective=lp_reg(), old_logprobs=torch.zeros(2, 3)), ValueError, "min_p_logprobs"),
        (lambda: loss(objective=a3po(metric="entropy"), old_logprobs=torch.zeros(2, 3)), ValueError, "old_entropy"),
        (lambda: packed([0, 3, 5]), ValueError, "cu_seqlens.*rise from 0 to N = 6"),
        (lambda: packed([1, 3, 6]), ValueError, "cu_seqlens"),
        (lambda: packed([0, 4, 3, 6]), ValueError, "cu_seqlens"),
        (lambda: packed(torch.tensor([0.0, 6.0])), TypeError, "cu_seqlens"),
        (lambda: packed(torch.tensor([[0, 6]])), ValueError, "cu_seqlens"),
        (lambda: loss(cu_seqlens=torch.tensor([0, 6])), ValueError, "logits"),
        (lambda: packed([0, 6], objective=a3po_kernels.dr_grpo()), ValueError, "max_length"),
        (lambda: token_logprobs(LOGITS, TARGETS[0]), ValueError, "targets"),
        (lambda: token_logprobs(LOGITS, TARGETS, temperature=torch.ones(2, 3).long()), TypeError, "temperature"),
        (lambda: token_logprobs([1.0], TARGETS), TypeError, "logits must be a tensor"),
        (lambda: min_p_token_logprobs(LOGITS, TARGETS, 0.0), ValueError, "min_p"),
        (lambda: min_p_token_logprobs(LOGITS, TARGETS, 1.5), ValueError, "min_p"),
        (lambda: select_tokens(ADVANTAGES, ratio=0.0, side="low"), ValueError, "ratio"),
        (lambda: select_tokens(ADVANTAGES, ratio=1.1, side="low"), ValueError, "ratio"),
        (lambda: select_tokens(ADVANTAGES, ratio="0.2", side="low"), TypeError, "ratio"),
        (lambda: select_tokens(ADVANTAGES, ratio=0.2, side="top"), ValueError, "side"),
        (lambda: select_tokens(ADVANTAGES, ratio=0.2, side="low", scope="all"), ValueError, "scope"),
        (lambda: select_tokens(ADVANTAGES, ratio=0.2, side="low", rounding="up"), ValueError, "rounding"),
        (lambda: select_tokens(TARGETS, ratio=0.2, side="low"), TypeError, "metric"),
        (lambda: select_tokens(LOGITS, ratio=0.2, side="low"), ValueError, "metric"),
        (lambda: select_tokens(ADVANTAGES, torch.ones(3), ratio=0.2, side="low"), ValueError, "mask"),
        (lambda: group_advantages(TARGETS[0], TARGETS[0]), TypeError, "rewards"),
        (lambda: group_advantages(ADVANTAGES, ADVANTAGES), TypeError, "group_ids"),
        (lambda: group_advantages(ADVANTAGES, TARGETS[0]), ValueError, "share a shape"),
        (lambda: group_advantages(ADVANTAGES, TARGETS[0, :2], "mean"), ValueError, "normalize"),
    ],
)  # fmt: skip
def test_bad_inputs(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    "make, error",
    [
        (lambda: grpo(epsilon_low=-0.1), ValueError),
        (lambda: grpo(epsilon_low=1.5), ValueError),
        (lambda: grpo(epsilon_high=float("inf")), ValueError),
        (lambda: grpo(dual_clip=1.0), ValueError),
        (lambda: grpo(delta=0.0), ValueError),
        (lambda: grpo(kl_coef=-1.0), ValueError),
        (lambda: grpo(kl_estimator="k4"), ValueError),
        (lambda: grpo(kl_estimator="k3-ratio", ratio_level="sequence"), ValueError),
        (lambda: grpo(aggregation="mean"), ValueError),
        (lambda: grpo(kl_clamp=0.0), ValueError),
        (lambda: grpo(kl_clamp=float("inf")), ValueError),
        (lambda: grpo(kl_clamp="20"), TypeError),
        (lambda: grpo(entropy_coef="1"), TypeError),
        (lambda: grpo(rho=2.0), TypeError),
        (lambda: a3po(rho=-1.0), ValueError),
        (lambda: a3po(ratio=0.0), ValueError),
        (lambda: a3po(ratio=1.5), ValueError),
        (lambda: a3po(metric="margin"), ValueError),
        (lambda: a3po(source="future"), ValueError),
        (lambda: fork_tokens(ratio=2), ValueError),
        (lambda: fork_tokens(rounding="nearest"), ValueError),
        (lambda: fork_tokens(normalize_over="some"), ValueError),
        (lambda: w_reinforce(positive_weight=-0.1), ValueError),
        (lambda: lp_reg(quantile=0.0), ValueError),
        (lambda: lp_reg(min_p=2.0), ValueError),
        (lambda: lp_reg(beta=-1.0), ValueError),
        (lambda: cispo(epsilon_high=0.0), ValueError),
        (lambda: sapo(tau_positive=0.0), ValueError),
        (lambda: sapo(dual_clip=3.0), TypeError),
        (lambda: a3po_kernels.Objective(shaping=("keep",)), TypeError),
        (lambda: a3po_kernels.Objective(surrogate="clip"), TypeError),
        (lambda: a3po_kernels.Objective(ratio_level="rollout"), ValueError),
        (lambda: a3po_kernels.TokenRule(polarity=2), ValueError),
        (lambda: a3po_kernels.TokenRule(scope="world"), ValueError),
        (lambda: a3po_kernels.LinearDecay(start=float("nan")), ValueError),
        (lambda: a3po_kernels.CosineDecay(steps=0), ValueError),
        (lambda: a3po_kernels.PolicyLoss("a3p"), ValueError),
        (lambda: a3po_kernels.PolicyLoss(None), TypeError),
    ],
)
def test_bad_objectives(make, error):
    with pytest.raises(error):
        make()
