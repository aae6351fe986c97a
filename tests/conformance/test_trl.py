"""TRL's GRPOTrainer loss and log-prob helpers, as published, on the same tensors.

Where TRL differs from SPEC.md by design, a test states the difference: rollouts without a token, log ratios beyond 20,
KL of tokens that the entropy mask drops, the entropy mask's count.
"""

from __future__ import annotations

import math
from collections import defaultdict
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import a3po_kernels

trl = pytest.importorskip("trl")
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import entropy_from_logits, selective_log_softmax  # noqa: E402

pytestmark = pytest.mark.trl

ROLLOUTS, LENGTH, VOCABULARY, MAX_LENGTH = 4, 9, 50, 16
# fp32 on both sides: a log-prob near 8 carries a few roundings of 2^-21 = 5e-7 into the ratio; the loss averages terms
# below 3 of either sign, and the gradient of a logit is a token's share (at most 1) of a ratio below 3, times p.
LOSS, GRADIENT = 3e-6, 1e-6


def batch(seed=0, lengths=(9, 4, 1, 7)):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ROLLOUTS, LENGTH, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROLLOUTS, LENGTH), generator=generator)
    current = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    noise = torch.randn(3, ROLLOUTS, LENGTH, generator=generator)
    lengths = torch.tensor(lengths)
    return SimpleNamespace(
        logits=logits,
        targets=targets,
        mask=(torch.arange(LENGTH) < lengths[:, None]).int(),
        advantages=torch.tensor([1.2, -0.7, 0.0, -1.5]),
        old=current + 0.3 * noise[0],
        ref=current + 0.2 * noise[1],
        correction=(0.3 * noise[2]).exp(),
    )


def trl_loss(
    data, *, loss_type="grpo", level="token", beta=0.0, delta=None, low=0.2, high=0.28, correct=False, items=None,
    accumulation=1, generation=1, processes=1, quantile=1.0, bonus=0.0, off_policy=None, **args,
):  # fmt: skip
    """(loss, gradient of the logits) of the trainer's own _compute_loss on a stand-in trainer."""
    logits = data.logits.clone().requires_grad_()

    def statistics(*args, **kwargs):
        return selective_log_softmax(logits, data.targets), entropy_from_logits(logits), None

    args = SimpleNamespace(
        delta=delta, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        steps_per_generation=generation, entropy_target=0.0, **args,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        num_processes=processes, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x,
        pad_across_processes=lambda x, **_: x, sync_gradients=True,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=statistics, aux_loss_enabled=False, top_entropy_quantile=quantile,
        off_policy_mask_threshold=off_policy, importance_sampling_level=level, beta=beta, args=args,
        loss_type=loss_type, epsilon_low=low, epsilon_high=high, use_vllm=correct,
        vllm_importance_sampling_correction=correct,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=accumulation,
        accelerator=accelerator, max_completion_length=MAX_LENGTH, _entropy_bonus_enabled=bonus != 0,
        entropy_coef=bonus, use_adaptive_entropy=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    trainer.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
    trainer.get_gamma_weights = GRPOTrainer.get_gamma_weights
    inputs = {
        "prompt_ids": torch.zeros(ROLLOUTS, 2, dtype=torch.long), "prompt_mask": torch.ones(ROLLOUTS, 2),
        "completion_ids": data.targets, "completion_mask": data.mask, "advantages": data.advantages,
        "old_per_token_logps": data.old, "ref_per_token_logps": data.ref,
        "importance_sampling_ratio": data.correction if correct else None,
        "num_items_in_batch": torch.tensor(float(items or data.mask.sum())),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach(), logits.grad, trainer._metrics["train"]


def our_loss(data, objective, **keywords):
    logits = data.logits.clone().requires_grad_()
    output = a3po_kernels.policy_loss(
        logits, data.targets, data.advantages, objective=objective, old_logprobs=data.old, ref_logprobs=data.ref,
        mask=data.mask, **keywords,
    )  # fmt: skip
    output.loss.backward()
    return output, logits.grad


def assert_same(theirs, ours):
    torch.testing.assert_close(ours[0].loss, theirs[0], atol=LOSS, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1], atol=GRADIENT, rtol=0)


CASES = {
    "grpo": ("grpo", {}),
    "bnpo": ("grpo", {"aggregation": "token-mean"}),
    "dr_grpo": ("dr_grpo", {}),
    "dapo": ("dapo", {}),
    "cispo": ("cispo", {}),
    "sapo": ("sapo", {}),
}


@pytest.mark.parametrize("correct", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", CASES)
def test_loss_types(loss_type, beta, correct):
    data = batch()
    name, overrides = CASES[loss_type]
    high = 1.1 if loss_type == "cispo" else 0.28
    if loss_type not in ("sapo",):
        overrides = {**overrides, "epsilon_high": high}
    objective = getattr(a3po_kernels, name)(kl_coef=beta, **overrides)
    keywords = {"importance_weights": data.correction} if correct else {}
    items = None
    if loss_type in ("dapo", "cispo"):
        items = 33  # tokens of the whole accumulation window
        keywords["denominator"] = float(items)
    if loss_type == "dr_grpo":
        keywords["max_length"] = MAX_LENGTH
    theirs = trl_loss(data, loss_type=loss_type, beta=beta, high=high, correct=correct, items=items)
    ours = our_loss(data, objective, **keywords)
    assert_same(theirs, ours)
    metrics = ours[0].metrics
    assert theirs[2]["entropy"][0] == pytest.approx(metrics["entropy"].item(), abs=1e-5)
    if beta:
        assert theirs[2]["kl"][0] == pytest.approx(metrics["kl"].item(), abs=1e-5)
    if loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        assert theirs[2]["clip_ratio/low_mean"][0] == pytest.approx(metrics["clip_fraction_low"].item(), abs=1e-6)
        assert theirs[2]["clip_ratio/high_mean"][0] == pytest.approx(metrics["clip_fraction_high"].item(), abs=1e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("delta", [1.05, 1.3, 2.0])
def test_two_sided_clipping(delta, loss_type):
    """delta below 1 + epsilon_high, too."""
    data = batch(1)
    theirs = trl_loss(data, loss_type=loss_type, delta=delta, low=0.1, high=0.1)
    name, overrides = CASES[loss_type]
    objective = getattr(a3po_kernels, name)(delta=delta, epsilon_low=0.1, epsilon_high=0.1, **overrides)
    assert_same(theirs, our_loss(data, objective, max_length=MAX_LENGTH))


@pytest.mark.parametrize("correct", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("delta", [None, 1.1])
@pytest.mark.parametrize("bound", [0.02, 0.5])
def test_sequence_level(bound, delta, beta, correct):
    """GSPO: TRL differentiates through the mean, as we do; padding is outside both means."""
    data = batch(2)
    theirs = trl_loss(data, level="sequence", low=bound, high=bound, delta=delta, beta=beta, correct=correct)
    objective = a3po_kernels.gspo(epsilon_low=bound, epsilon_high=bound, delta=delta, kl_coef=beta)
    keywords = {"importance_weights": data.correction} if correct else {}
    assert_same(theirs, our_loss(data, objective, **keywords))


@pytest.mark.parametrize("loss_type", ["bnpo", "cispo", "sapo"])
def test_on_policy_and_advantages_per_token(loss_type):
    data = batch(6)
    data.old = None
    data.advantages = torch.randn(ROLLOUTS, LENGTH, generator=torch.Generator().manual_seed(7))
    name, overrides = CASES[loss_type]
    theirs = trl_loss(data, loss_type=loss_type, high=1.28 if loss_type == "cispo" else 0.2)
    assert_same(theirs, our_loss(data, getattr(a3po_kernels, name)(**overrides)))


def test_normalizers_of_accumulation_and_ranks():
    """dapo: tokens of the generation batch, rescaled to one accumulation window of one rank; grpo: / accumulation."""
    data = batch(8)
    window = {"accumulation": 2, "generation": 4, "processes": 2}
    theirs = trl_loss(data, loss_type="dapo", items=500, **window)
    assert_same(theirs, our_loss(data, a3po_kernels.dapo(), denominator=500 / 2 * 2 / 4))
    theirs = trl_loss(data, loss_type="grpo", **window)
    assert_same(theirs, our_loss(data, a3po_kernels.grpo(epsilon_high=0.28), denominator=ROLLOUTS * 2))


def test_rollouts_without_a_token():
    """TRL averages over all rollouts, we over those with a token: `denominator` gives TRL's mean. dr_grpo agrees."""
    data = batch(9, lengths=(9, 0, 3, 7))
    for loss_type in ("grpo", "sapo"):
        name, overrides = CASES[loss_type]
        objective = getattr(a3po_kernels, name)(**overrides)
        theirs = trl_loss(data, loss_type=loss_type, high=0.2)
        assert_same(theirs, our_loss(data, objective, denominator=ROLLOUTS))
        ours = our_loss(data, objective)
        assert_same([3 / 4 * ours[0].loss, 3 / 4 * ours[1]], (SimpleNamespace(loss=theirs[0]), theirs[1]))
    theirs = trl_loss(data, loss_type="dr_grpo", high=0.2)
    assert_same(theirs, our_loss(data, a3po_kernels.dr_grpo(), max_length=MAX_LENGTH))


def test_log_ratios_beyond_20():
    """TRL exponentiates any log ratio; ours stops at 20, without a gradient, as verl's does."""
    data = batch(10, lengths=(1, 0, 0, 0))
    data.advantages = -torch.ones(ROLLOUTS)
    current = torch.log_softmax(data.logits, -1).gather(-1, data.targets.unsqueeze(-1)).squeeze(-1)
    data.old = current - 25.0
    theirs, ours = trl_loss(data, loss_type="bnpo"), our_loss(data, a3po_kernels.dapo())
    assert theirs[0].log().item() == pytest.approx(25.0, abs=1e-5) and theirs[1].abs().max() > 0
    assert ours[0].loss.log().item() == pytest.approx(20.0, abs=1e-5) and ours[1].abs().max() == 0


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_top_entropy_tokens(beta):
    """top_entropy_quantile is fork_tokens over all tokens, but TRL keeps the dropped tokens' KL, and we drop it."""
    data = batch(11, lengths=(9, 4, 1, 6))  # 20 tokens, of which either rule selects 4
    theirs = trl_loss(data, loss_type="bnpo", quantile=0.2, beta=beta)
    ours = our_loss(data, a3po_kernels.fork_tokens(normalize_over="all", kl_coef=beta))
    assert (ours[0].weights != 0).sum() == 4
    logits = data.logits.clone().requires_grad_()
    gap = data.ref - selective_log_softmax(logits, data.targets)
    dropped = data.mask * (ours[0].weights == 0)
    difference = beta * ((gap.exp() - gap - 1) * dropped).sum() / data.mask.sum()
    difference.backward()
    assert bool(difference > 1e-4) == (beta > 0)
    assert_same((theirs[0] - difference.detach(), theirs[1] - logits.grad), ours)


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo"])
def test_entropy_bonus(loss_type):
    """TRL's bonus is a mean over the micro-batch's tokens whatever the loss's denominator; ours shares the latter."""
    data, items = batch(12), 42
    theirs = trl_loss(data, loss_type=loss_type, bonus=0.05, items=items)
    tokens = data.mask.sum().item()
    coefficient = 0.05 if loss_type == "bnpo" else 0.05 * items / tokens
    keywords = {} if loss_type == "bnpo" else {"denominator": items}
    assert_same(theirs, our_loss(data, a3po_kernels.dapo(entropy_coef=coefficient), **keywords))


@pytest.mark.parametrize("correct", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_vespo(beta, correct):
    """The correction is in the rollout's ratio; TRL has it 1 at padding, which it does not mask there."""
    data = batch(13)
    data.correction = torch.where(data.mask.bool(), data.correction, 1.0)
    constants = {"k_pos": 1.0, "lambda_pos": 2.0, "k_neg": 3.0, "lambda_neg": 1.5}
    theirs = trl_loss(
        data, loss_type="vespo", beta=beta, correct=correct, items=33,
        **{f"vespo_{name}": value for name, value in constants.items()},
    )  # fmt: skip
    objective = a3po_kernels.vespo(1.0, 2.0, 3.0, 1.5, kl_coef=beta)
    keywords = {"importance_weights": data.correction} if correct else {}
    assert_same(theirs, our_loss(data, objective, denominator=33.0, **keywords))
    wrong = our_loss(data, a3po_kernels.vespo(1.0, 2.0, 3.0, 2.0, kl_coef=beta), denominator=33.0, **keywords)
    assert (wrong[1] - theirs[1]).abs().max() > 100 * GRADIENT


def test_vespo_by_default_and_far_off_policy():
    """TRL's constants are ours; ratios beyond its clamps, a correction of 0, and a rollout that the weight ends."""
    from trl import GRPOConfig

    fields = {name: GRPOConfig.__dataclass_fields__[f"vespo_{name}"].default for name in
              ("k_pos", "lambda_pos", "k_neg", "lambda_neg")}  # fmt: skip
    data = batch(14)
    data.correction = torch.where(data.mask.bool(), data.correction, 1.0)
    data.correction[3, 2] = 0.0
    data.logits[0, 0, data.targets[0, 0]] -= 45.0
    data.old[0, 0] -= 5.0
    data.old[1] -= 30.0
    theirs = trl_loss(
        data, loss_type="vespo", correct=True, **{f"vespo_{name}": value for name, value in fields.items()}
    )
    assert theirs[0].isfinite()
    assert_same(theirs, our_loss(data, a3po_kernels.vespo(), importance_weights=data.correction))


@pytest.mark.parametrize("correct", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("bound", [0.02, 0.5])
def test_luspo(bound, beta, correct):
    """A sum over a rollout's tokens, 5 times their mean: five times the tolerance."""
    data = batch(15)
    theirs = trl_loss(data, loss_type="luspo", level="sequence", low=bound, high=bound, beta=beta, correct=correct)
    objective = a3po_kernels.luspo(epsilon_low=bound, epsilon_high=bound, kl_coef=beta)
    keywords = {"importance_weights": data.correction} if correct else {}
    ours = our_loss(data, objective, **keywords)
    assert_same([x / 5 for x in theirs[:2]], (SimpleNamespace(loss=ours[0].loss / 5), ours[1] / 5))
    # TRL's default level only warns: PPO's clip on the token's ratio, summed.
    theirs = trl_loss(data, loss_type="luspo", low=bound, high=bound)
    objective = a3po_kernels.dapo(epsilon_low=bound, epsilon_high=bound, aggregation="seq-mean-token-sum")
    ours = our_loss(data, objective)
    assert_same([x / 5 for x in theirs[:2]], (SimpleNamespace(loss=ours[0].loss / 5), ours[1] / 5))


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo", "cispo"])
def test_off_policy_mask(loss_type, level, beta):
    """One of the two negative rollouts is masked; its KL and its place in the mean stay."""
    data = batch(16)
    current = torch.log_softmax(data.logits, -1).gather(-1, data.targets.unsqueeze(-1)).squeeze(-1)
    drift = ((data.old - current) * data.mask).sum(-1) / data.mask.sum(-1)
    threshold = 0.1
    data.old = data.old + threshold - drift[[1, 3]].mean()
    name, overrides = CASES[loss_type]
    objective = getattr(a3po_kernels, name)(
        kl_coef=beta, ratio_level=level, ratio_weights=(a3po_kernels.OffPolicyMask(threshold),), **overrides
    )
    high = {"grpo": 0.2, "dapo": 0.28, "sapo": 0.28, "cispo": 1.28}[loss_type]
    theirs = trl_loss(data, loss_type=loss_type, level=level, beta=beta, high=high, correct=True, off_policy=threshold)
    assert_same(theirs, our_loss(data, objective, importance_weights=data.correction))
    free = trl_loss(data, loss_type=loss_type, level=level, beta=beta, high=high, correct=True)
    assert (free[1] - theirs[1]).abs().max() > 100 * GRADIENT


def test_a_wrong_parameter_is_noticed():
    data = batch(3)
    theirs = trl_loss(data, loss_type="bnpo", high=0.28)
    ours = our_loss(data, a3po_kernels.dapo(epsilon_high=0.26))
    assert (theirs[1] - ours[1]).abs().max() > 100 * GRADIENT


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_statistics(temperature):
    data = batch(4)
    stats = a3po_kernels.token_logprobs(data.logits, data.targets, temperature=temperature)
    scaled = data.logits / temperature
    assert torch.allclose(stats.logprobs, selective_log_softmax(scaled, data.targets), atol=2e-6, rtol=0)
    assert torch.allclose(stats.entropy, entropy_from_logits(scaled), atol=2e-6, rtol=0)


@pytest.mark.parametrize("count", [10, 17, 20, 21, 26, 101])
def test_high_entropy_mask(count):
    """Without ties TRL marks n - ceil((n - 1)(1 - ratio)) tokens, we floor(n ratio): by design, up to one fewer.

    TRL's threshold is torch.quantile, which interpolates at position (n - 1)(1 - ratio), and it takes what is >= that.
    """
    entropies = torch.rand(1, 120, generator=torch.Generator().manual_seed(5))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda x: x, pad_across_processes=lambda x, **_: x, num_processes=1),
    )
    mask = torch.arange(120)[None, :] < count
    theirs = GRPOTrainer.get_high_entropy_mask(trainer, entropies, mask, 0.8).bool()
    ours = a3po_kernels.select_tokens(entropies, mask, ratio=0.2, side="high", scope="batch")
    assert theirs.sum() == count - math.ceil(Fraction(count - 1) * 4 / 5)
    assert ours.sum() == count // 5
    assert bool((theirs | ~ours).all()), "what we select, TRL selects"
    if count % 5 == 0:
        assert torch.equal(theirs, ours)
