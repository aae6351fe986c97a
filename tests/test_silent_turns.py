"""What would have trained something else in silence is refused, in the caller's own words; and objectives by name."""

from __future__ import annotations

import inspect
import re
import warnings

import numpy as np
import pytest
import torch

import a3po_kernels as ak
from a3po_kernels.backends import choice
from a3po_kernels.losses import stages
from a3po_kernels.named_objectives import keywords
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


# -- values that cannot be --------------------------------------------------------------------------------------------


class Fixed:
    """A schedule that gives what it was made of."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return self.value

    def __repr__(self):
        return "Fixed()"


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("value", "got"),
    [
        (None, "it gave None"), (float("nan"), "it gave nan at step 7"), (-1.0, "it gave -1.0 at step 7"),
        (float("inf"), "it gave inf"), ("2", "it gave str"), (True, "it gave bool"),
        (torch.tensor(-0.5), "it gave -0.5 at step 7"), (torch.tensor(float("nan")), "it gave nan"),
        (torch.ones(2), r"it gave a tensor of shape \[2\] on cpu"),
    ],
)  # fmt: skip
def test_a_schedule_that_gives_no_weight(call, value, got):
    rules = {
        r"shaping\[1\].selected_scale": (ak.PolarityWeights(), ak.TokenRule(selected_scale=Fixed(value))),
        r"shaping\[0\].negative": (ak.PolarityWeights(negative=Fixed(value)),),
    }
    for name, shaping in rules.items():
        with pytest.raises((TypeError, ValueError), match=rf"^{name} = Fixed\(\) must give a number or 0-d .*; {got}"):
            call(objective=ak.Objective(shaping=shaping), old_logprobs=OLD, step=7)


def test_a_schedule_is_called_once_a_loss():
    """Also where the one pass shapes each chunk anew."""
    calls = []
    objective = ak.a3po(schedule=lambda step: calls.append(step) or 2.0, source="current", polarity="positive")
    on_hidden(objective=objective, step=4, max_chunk_bytes=3 * V * 4)
    assert calls == [4]


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_denominator_of_0_with_tokens(call, zero):
    with pytest.raises(ValueError, match=r"denominator must be positive where .* tokens: .*; got 0 with 5 tokens"):
        call(denominator=zero, mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert call(denominator=zero, mask=torch.zeros(B, T)).loss == 0
    # What global_denominator gives where no token is kept.
    nothing = ak.global_denominator("psr", MASK, -torch.ones(B))
    assert nothing == 0 and call(objective="psr", advantages=-torch.ones(B), denominator=nothing).loss == 0
    with pytest.raises(ValueError, match="got 0 with 3 tokens"):
        call(objective="psr", denominator=zero)


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "min_p_logprobs", "logprobs"])
def test_probabilities_are_not_log_probs(name):
    probabilities = OLD.exp()
    message = rf"^{name} must be log-probs in nats, at most 0 .*; got 0\.\d+: probabilities need \.log\(\)"
    calls = [on_logprobs] if name == "logprobs" else CALLS.values()
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(**{name: probabilities})
        rounded = OLD.clone()
        rounded[0, 0] = 0.05  # of log-probs in bf16
        call(**{name: rounded})
        rounded[0, 0] = 3.0
        call(**{name: rounded}, mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))  # no token there
        if call is not on_logprobs:
            ignored = TARGETS.clone()
            ignored[0, 0] = -100
            call(**{name: rounded}, targets=ignored)


def test_probabilities_in_a_rollout_correction():
    for given in ((OLD.exp(), OLD), (OLD, -OLD)):
        with pytest.raises(ValueError, match=r"logprobs_(trainer|rollout) must be log-probs in nats"):
            ak.rollout_correction(*given)
    ak.rollout_correction(OLD.exp(), OLD, torch.zeros(B, T))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.tensor([[0.0, 0.0, float("-inf")]] * B), "got -inf: an additive mask .*; give mask == 0"),
        (torch.full((B, T), torch.finfo(torch.float32).min), "an additive mask"),
        (torch.tensor([[-100.0, 5.0, 3.0]] * B), "got -100.0: these look like labels; give labels != -100"),
        (torch.tensor([[-100, 5, 3]] * B), "these look like labels"),
        (torch.full((B, T), 0.5), r"got 0\.5$"),
    ],
)
def test_masks_of_other_kinds(mask, message):
    for call in CALLS.values():
        with pytest.raises(ValueError, match=rf"^mask must be bool or hold 0 and 1; .*{message}"):
            call(mask=mask)


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: on_logits(OLD), r"logits must have a dimension V .*; got \[2, 3\] for both: .* logprob_policy_loss"),
        (lambda: ak.token_logprobs(OLD, TARGETS), r"logits must have a dimension V behind the 2 of targets"),
        (lambda: on_logits(torch.randn(B, T + 1, V)), r"shape \[2, 4\]; got \[2, 3\], one .*: give logits\[:, :-1\]$"),
        (lambda: on_hidden(torch.randn(B, T + 1, H)), r"row i of the hidden predicts .*: give hidden\[:, :-1\]$"),
        (
            lambda: on_logits(LOGITS.view(-1, V), TARGETS.view(-1)[:5], cu_seqlens=torch.tensor([0, 2, 5])),
            r"targets must have shape \[6\]; got \[5\], one less: .*: give logits without each rollout's last row$",
        ),
        (lambda: on_logits(torch.randn(B, T + 2, V)), r"targets must have shape \[2, 5\]; got \[2, 3\]$"),
        (lambda: on_logits(advantages=None), "advantages must be a tensor; got NoneType"),
    ],
)
def test_shapes(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# -- what would turn a gradient round, or run something slower ---------------------------------------------------------


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_weights_below_zero_are_none(call):
    weights = torch.full((B, T), 0.5)
    weights[0, 1] = -0.7
    with pytest.raises(ValueError, match=r"importance_weights must be at least 0: ratios, not .*; got -0\.7"):
        call(importance_weights=weights)
    with pytest.raises(ValueError, match="importance_weights must be at least 0"):
        call(importance_weights=torch.tensor([-1.0, 1.0]))
    mask = torch.ones(B, T)
    mask[0, 1] = 0  # what is no token is not read
    assert call(importance_weights=weights, mask=mask).loss.isfinite()


def test_logits_with_their_vocabulary_in_the_middle():
    with pytest.raises(ValueError, match=r"V as their last dimension, behind \[2, 3\]; got \[2, 7, 3\]"):
        on_logits(logits=LOGITS.transpose(1, 2))


def test_an_adapter_without_its_scale():
    with pytest.raises(TypeError, match=r"lora must be a tuple .*; got 2 of them"):
        on_hidden(lora=(torch.ones(2, H), torch.ones(V, 2)))


@pytest.mark.parametrize(("capability", "found"), [((7, 5), False), ((8, 0), True)])
def test_a_card_that_the_kernels_do_not_run_on_is_said(capability, found, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert choice._supports_triton.__wrapped__(torch.device("cuda")) == found
    assert [str(warning.message) for warning in recwarn] == (
        [] if found else ["cuda has compute capability 7.5: below 8.0 PyTorch runs, no kernel"]
    )


# -- what other trainers call it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ak.a3po(token_ratio=0.2), "unexpected keyword 'token_ratio' of a3po (here it is ratio)"),
        (lambda: ak.dapo(epsilon=0.2), "(here it is epsilon_low and epsilon_high)"),
        (lambda: ak.dapo(clip_ratio_high=0.2), "(here it is epsilon_high)"),
        (lambda: ak.grpo(beta=0.1), "(here it is kl_coef)"),
        (lambda: ak.cispo(clip_ratio_high=0.28), "(its epsilon_high is the bound of the ratio itself: 1.28 where"),
        (lambda: ak.a3po(beta=2.0), "(beta(step) is rho and alpha, or schedule; TRL's KL coefficient is kl_coef)"),
        (lambda: ak.sapo(epsilon=0.1), "unexpected keyword 'epsilon' of sapo"),  # which has no bound
        (lambda: ak.dapo(epsilon_low=np.float32(0.2)), "must be a number; got numpy.float32: give float(...)"),
        (lambda: on_logits(objective=ak.Reinforce()), "Objective(surrogate=Reinforce(...))"),
    ],
)
def test_the_name_that_it_has_here(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_every_name_that_is_given_is_a_keyword():
    """Of some preset: a hint to what none takes would never be seen."""
    known = {name for preset in ak.presets.values() for name in inspect.signature(preset).parameters}
    assert {text.split()[0].rstrip(",") for text in keywords.ELSEWHERE.values()} <= known


def test_a_bound_of_cispo_that_scales_every_gradient_is_said():
    with pytest.warns(UserWarning, match=r"epsilon_high = 0\.28 bounds the ratio itself.*1\.28 is what") as caught:
        ak.cispo(epsilon_high=0.28)
    assert len(caught) == 1 and caught[0].filename == __file__  # who called it, not the package's own line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ak.cispo(epsilon_high=1.0)
