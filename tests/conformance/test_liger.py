"""Liger-Kernel's Triton GRPO loss in the interpreter, beside ours in the interpreter and in PyTorch.

This file run as a program, under TRITON_INTERPRET=1, computes every case with the Triton kernels of both; the tests
start it once and compare. Avoided, since Liger is known to be wrong or silent there: advantages per token, LUSPO, the
sequence level with bias-corrected KL, and rollouts without a token.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import a3po_kernels

pytest.importorskip("liger_kernel")

pytestmark = pytest.mark.trl

ROLLOUTS, LENGTH, VOCABULARY, MAX_LENGTH, TEMPERATURE = 2, 5, 300, 8, 0.9
# fp32 on both sides, log-probs near 8 with a few roundings of 5e-7: a loss of eight terms below 3, gradients below 1.
# CISPO's terms hold the log-prob itself: its loss of 4.7 has as many roundings in proportion.
LOSS, GRADIENT, RELATIVE = 3e-6, 1e-6, 1e-6

LOSS_TYPES = {
    "grpo": ("grpo", {}),
    "bnpo": ("grpo", {"aggregation": "token-mean"}),
    "dapo": ("dapo", {"epsilon_high": 0.2}),
    "dr_grpo": ("dr_grpo", {}),
    "cispo": ("cispo", {"epsilon_high": 1.1}),
    "sapo": ("sapo", {}),
}
# Name -> loss type, keywords of Liger, of our preset and of our policy_loss; a string names a tensor of the batch.
CASES = {
    **{
        f"{name}-{beta}": (name, {"beta": beta}, {"kl_coef": beta}, {})
        for name in LOSS_TYPES
        for beta in (0.0, 0.04)
    },
    "delta": ("bnpo", {"delta": 1.1}, {"delta": 1.1}, {}),
    "corrected": ("grpo", {"vllm_is_ratio": "correction", "beta": 0.04}, {"kl_coef": 0.04},
                  {"importance_weights": "correction"}),
    "items": ("dapo", {"num_items_in_batch": 31.0}, {}, {"denominator": 31.0}),
    "on-policy": ("grpo", {"old_logp": None}, {}, {"old_logprobs": None}),
    "sequence": ("grpo", {"importance_sampling_level": "sequence"}, {"ratio_level": "sequence"}, {}),
    "sequence-kl": ("grpo", {"importance_sampling_level": "sequence", "beta": 0.04, "eps_low": 0.05, "eps_high": 0.05},
                    {"ratio_level": "sequence", "kl_coef": 0.04, "epsilon_low": 0.05, "epsilon_high": 0.05}, {}),
}  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(ROLLOUTS, LENGTH + 1, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROLLOUTS, LENGTH), generator=generator)
    scaled = logits[:, :-1] / TEMPERATURE
    current = torch.log_softmax(scaled, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    noise = torch.randn(2, ROLLOUTS, LENGTH, generator=generator)
    # Log ratios on either side of every bound, for a positive and for a negative advantage.
    log_ratio = torch.tensor([[0.4, -0.4, 0.1, -0.1, 0.0], [-0.4, 0.4, -0.1, 0.0, 0.0]])
    return {
        "logits": logits, "targets": targets, "old": current - log_ratio, "reference": current + 0.2 * noise[0],
        "correction": (0.3 * noise[1]).exp(), "advantages": torch.tensor([1.3, -0.8]),
        "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }  # fmt: skip


def fill(keywords: dict, data: dict) -> dict:
    """Keywords with the tensors that their strings name."""
    return {name: data.get(value, value) if isinstance(value, str) else value for name, value in keywords.items()}


def liger_loss(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    data = batch()
    loss_type, keywords, _, _ = CASES[case]
    logits = data["logits"].requires_grad_()
    options = {
        "old_logp": data["old"], "ref_logp": data["reference"], "completion_ids": data["targets"],
        "advantages": data["advantages"], "completion_mask": data["mask"], "temperature": TEMPERATURE, "beta": 0.0,
        "eps_low": 0.2, "eps_high": 1.1 if loss_type == "cispo" else 0.2, "inplace": False, "loss_type": loss_type,
        "max_completion_length": MAX_LENGTH, "reduce": True, **fill(keywords, data),
    }  # fmt: skip
    loss, _ = triton_grpo_loss(logits, **options)
    loss.backward()
    return loss.detach(), logits.grad


def our_loss(case: str, backend: str, **overrides) -> tuple[torch.Tensor, torch.Tensor]:
    data = batch()
    loss_type, _, preset, keywords = CASES[case]
    name, options = LOSS_TYPES[loss_type]
    logits = data["logits"].requires_grad_()
    keywords = {"old_logprobs": data["old"], **fill(keywords, data)}
    output = a3po_kernels.policy_loss(
        logits[:, :-1], data["targets"], data["advantages"], ref_logprobs=data["reference"], mask=data["mask"],
        objective=getattr(a3po_kernels, name)(**{**options, **preset, **overrides}), temperature=TEMPERATURE,
        max_length=MAX_LENGTH, backend=backend, **keywords,
    )  # fmt: skip
    output.loss.backward()
    return output.loss.detach(), logits.grad


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict:
    """{"liger", "triton"} -> case -> (loss, gradient), from a process that interprets Triton."""
    path = tmp_path_factory.mktemp("liger") / "results.pt"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, __file__, str(path)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(path)


@pytest.mark.parametrize("ours_in", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_same_loss_and_gradient(case, ours_in, interpreted):
    loss, gradient = interpreted["liger"][case]
    ours = interpreted["triton"][case] if ours_in == "triton" else our_loss(case, "torch")
    torch.testing.assert_close(ours[0], loss, atol=LOSS, rtol=RELATIVE)
    torch.testing.assert_close(ours[1], gradient, atol=GRADIENT, rtol=0)
    assert gradient[:, :-1].abs().max() > 1e-3


@pytest.mark.parametrize("wrong", [{"epsilon_low": 0.05}, {"epsilon_high": 0.05}, {"dual_clip": 1.3}])
def test_a_wrong_parameter_is_noticed(wrong, interpreted):
    _, gradient = interpreted["liger"]["bnpo-0.0"]
    ours = our_loss("bnpo-0.0", "torch", **wrong)
    assert (ours[1] - gradient).abs().max() > 100 * GRADIENT


if __name__ == "__main__":
    torch.save(
        {
            "liger": {case: liger_loss(case) for case in CASES},
            "triton": {case: our_loss(case, "triton") for case in CASES},
        },
        sys.argv[1],
    )
