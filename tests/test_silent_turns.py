"""What would have trained something else in silence is refused, in the caller's own words; and objectives by name."""

from __future__ import annotations

import pytest
import torch

import a3po_kernels as ak
from a3po_kernels.losses import stages
from a3po_kernels.planning.step import HeadStep

B, T, V, H = 2, 3, 7, 4
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(B, T, V, generator=GENERATOR)
HIDDEN, WEIGHT = torch.randn(B, T, H, generator=GENERATOR), torch.randn(V, H, generator=GENERATOR)
TARGETS = torch.randint(0, V, (B, T), generator=GENERATOR)
OLD = -torch.rand(B, T, generator=GENERATOR) - 0.5
ADVANTAGES = torch.tensor([1.0, -1.0])
MASK = torch.ones(B, T)


def on_logits(logits=LOGITS, targets=TARGETS, advantages=ADVANTAGES, objective="a3po", **keywords):
    return ak.policy_loss(logits, targets, advantages, objective=objective, **keywords)


def on_hidden(hidden=HIDDEN, targets=TARGETS, advantages=ADVANTAGES, objective="a3po", **keywords):
    return ak.linear_policy_loss(hidden, WEIGHT, targets, advantages, objective=objective, **keywords)


def on_logprobs(logprobs=OLD, advantages=ADVANTAGES, objective="a3po", **keywords):
    return ak.logprob_policy_loss(logprobs, advantages, objective=objective, **keywords)


CALLS = {"logits": on_logits, "linear": on_hidden, "logprobs": on_logprobs}


# -- an objective by its name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_name_is_its_preset_in_every_loss(call):
    for name in ("dapo", "a3po"):
        found = call(objective=name, old_logprobs=OLD - 0.3, step=30)
        expected = call(objective=ak.presets[name](), old_logprobs=OLD - 0.3, step=30)
        assert torch.equal(found.loss, expected.loss) and torch.equal(found.weights, expected.weights)


def test_a_name_is_its_preset_everywhere_else():
    assert ak.PolicyLoss("gspo").objective == ak.gspo() == ak.LinearPolicyLoss("gspo").objective
    assert ak.plan_rows(MASK, ADVANTAGES, objective="psr").objective == ak.psr()
    assert torch.equal(ak.global_denominator("grpo", MASK), torch.tensor(2.0).double())
    assert ak.estimate_memory(8, 4, 16, objective="a3po") == ak.estimate_memory(8, 4, 16, objective=ak.a3po())
    assert HeadStep(8, 16, 4, objective="a3po") == HeadStep(8, 16, 4, objective=ak.a3po())


def test_a_preset_of_ones_own_is_found(monkeypatch):
    monkeypatch.setitem(ak.presets, "mine", lambda: ak.dapo(epsilon_high=0.5))
    assert ak.PolicyLoss("mine").objective == ak.dapo(epsilon_high=0.5)


@pytest.mark.parametrize(
    "call",
    [
        *CALLS.values(), lambda objective: ak.PolicyLoss(objective), lambda objective: ak.LinearPolicyLoss(objective),
        lambda objective: ak.plan_rows(MASK, ADVANTAGES, objective=objective),
        lambda objective: ak.global_denominator(objective, MASK),
        lambda objective: ak.estimate_memory(8, 4, 16, objective=objective),
        lambda objective: HeadStep(8, 16, 4, objective=objective),
    ],
)  # fmt: skip
def test_what_is_no_objective(call):
    with pytest.raises(ValueError, match=r"one of a3po, .*, w_reinforce; got 'Dr-GRPO'; did you mean 'dr_grpo'\?"):
        call(objective="Dr-GRPO")
    with pytest.raises(ValueError, match=r"one of a3po, .*; got 'quite another'$"):
        call(objective="quite another")
    with pytest.raises(TypeError, match=r"objective must be an Objective.*or a preset's name; got function; call it"):
        call(objective=ak.a3po)


# -- parts of an objective ---------------------------------------------------------------------------------------------


class Mine(ak.Reinforce):
    """A user's own formula, which no kernel knows."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ak.Objective(surrogate=Mine()), "surrogate must be one of Clip, .*; got Mine: .* a CustomSurrogate"),
        (lambda: ak.Objective(surrogate=ak.Clip), "surrogate must be one of .*; got the class Clip: call it"),
        (lambda: ak.TokenRule(replacement=Mine()), "replacement must be one of .*; got Mine"),
        (lambda: ak.TokenRule(replacement=ak.Gmpo()), "replacement must be a surrogate of one token; got Gmpo"),
        (lambda: ak.Objective(shaping=ak.TokenRule()), r"shaping must be a tuple of .*; got TokenRule: write \(T"),
        (lambda: ak.Objective(shaping=(3,)), "shaping takes PolarityWeights and TokenRule; got int"),
        (lambda: ak.dapo(ratio_weights=ak.Topr()), r"ratio_weights must be a tuple of .*; got Topr: write \(Topr"),
        (lambda: ak.vespo(ratio_weights=ak.Topr()), "ratio_weights must be a tuple of .*; got Topr"),
        (lambda: ak.a3po(rho="2"), "^rho must be a number; got str"),
        (lambda: ak.a3po(alpha=-1.0), r"^alpha must be finite and lie in \[0.0, inf\]; got -1.0"),
        (lambda: ak.a3po(positive_metric="margin"), "^positive_metric must be one of probability, entropy; got 'mar"),
        (lambda: ak.a3po(negative_weight="1"), "^negative_weight must be a number; got str"),
        (lambda: ak.w_reinforce(positive_weight=-1.0), "^positive_weight must be finite"),
        (lambda: ak.PolicyLoss("a3po", route="one-pass"), "route must be one of auto, one-launch, two-stage; got"),
        (lambda: ak.LinearPolicyLoss("a3po", route="onepass"), "route must be one of .*, recompute; got 'onepass'"),
        (lambda: ak.LinearPolicyLoss("a3po", statistics="some"), "statistics must be one of all, active; got 'some'"),
    ],
)
def test_parts_of_an_objective(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_surrogate_without_a_code_word_is_not_reinforce(monkeypatch):
    objective = ak.dapo()
    object.__setattr__(objective, "surrogate", object())
    with pytest.raises(TypeError, match="the surrogate object has no code word"):
        stages.surrogate_form(objective)


def test_ratio_weights_of_a_preset_and_given_ones():
    assert ak.topr(ratio_weights=[ak.OffPolicyMask(0.1)]).ratio_weights == (ak.Topr(), ak.OffPolicyMask(0.1))
