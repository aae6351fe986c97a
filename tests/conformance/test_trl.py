"""TRL's GRPOTrainer loss and log-prob helpers, as published, on the same tensors."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import a3po_kernels

trl = pytest.importorskip("trl")
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import entropy_from_logits, selective_log_softmax  # noqa: E402

pytestmark = pytest.mark.trl

ROLLOUTS, LENGTH, VOCABULARY, MAX_LENGTH = 4, 9, 50, 16
# fp32 on both sides: losses of a few terms below 3, each with some roundings of 1e-7.
LOSS, GRADIENT = 3e-6, 1e-6


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(ROLLOUTS, LENGTH, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROLLOUTS, LENGTH), generator=generator)
    current = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    noise = torch.randn(3, ROLLOUTS, LENGTH, generator=generator)
    lengths = torch.tensor([9, 4, 1, 7])
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
    data, *, loss_type="grpo", level="token", beta=0.0, delta=None, low=0.2, high=0.28, correct=False, items=None
):
    """(loss, gradient of the logits) of the trainer's own _compute_loss on a stand-in trainer."""
    logits = data.logits.clone().requires_grad_()

    def statistics(*args, **kwargs):
        return selective_log_softmax(logits, data.targets), entropy_from_logits(logits).detach(), None

    args = SimpleNamespace(
        delta=delta, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        steps_per_generation=1, entropy_target=0.0,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, gather_for_metrics=lambda x: x,
        sync_gradients=True,
    )  # fmt: skip
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=statistics, aux_loss_enabled=False, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level=level, beta=beta, args=args, loss_type=loss_type,
        epsilon_low=low, epsilon_high=high, use_vllm=correct, vllm_importance_sampling_correction=correct,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, accelerator=accelerator,
        max_completion_length=MAX_LENGTH, _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(ROLLOUTS, 2, dtype=torch.long), "prompt_mask": torch.ones(ROLLOUTS, 2),
        "completion_ids": data.targets, "completion_mask": data.mask, "advantages": data.advantages,
        "old_per_token_logps": data.old, "ref_per_token_logps": data.ref,
        "importance_sampling_ratio": data.correction,
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
    assert torch.allclose(theirs[0], ours[0].loss, atol=LOSS, rtol=0)
    assert torch.allclose(theirs[1], ours[1], atol=GRADIENT, rtol=0)


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


@pytest.mark.parametrize("delta", [1.3, 2.0])
def test_two_sided_clipping(delta):
    data = batch(1)
    theirs = trl_loss(data, loss_type="bnpo", delta=delta, low=0.1, high=0.1)
    objective = a3po_kernels.grpo(aggregation="token-mean", delta=delta, epsilon_low=0.1, epsilon_high=0.1)
    assert_same(theirs, our_loss(data, objective))


@pytest.mark.parametrize("bound", [0.02, 0.5])
def test_sequence_level(bound):
    """GSPO: TRL differentiates through the mean, as we do."""
    data = batch(2)
    theirs = trl_loss(data, loss_type="grpo", level="sequence", low=bound, high=bound)
    assert_same(theirs, our_loss(data, a3po_kernels.gspo(epsilon_low=bound, epsilon_high=bound)))


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


def test_high_entropy_mask():
    """Without ties, and where n * ratio is whole, TRL's quantile with >= marks one token more than the ratio asks for.

    The quantile interpolates at position (n - 1)(1 - ratio), so from n = 21 and ratio .2 it takes 5, and from n = 20 4.
    """
    entropies = torch.rand(1, 21, generator=torch.Generator().manual_seed(5))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(gather=lambda x: x, pad_across_processes=lambda x, **_: x, num_processes=1),
    )
    for length, theirs_count, ours_count in ((20, 4, 4), (21, 5, 4)):
        mask = torch.arange(21)[None, :] < length
        theirs = GRPOTrainer.get_high_entropy_mask(trainer, entropies, mask, 0.8).bool()
        ours = a3po_kernels.select_tokens(entropies, mask, ratio=0.2, side="high", scope="batch")
        assert theirs.sum() == theirs_count and ours.sum() == ours_count
        assert bool((theirs | ~ours).all()), "what we select, TRL selects"
