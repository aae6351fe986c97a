"""Liger-Kernel's Triton GRPO loss in the interpreter, beside ours in the interpreter and in PyTorch.

Avoided, since Liger is known to be wrong or silent there: advantages per token, LUSPO, the sequence level with
bias-corrected KL, and rollouts without a token.
"""

from __future__ import annotations

import os

import pytest
import torch

import a3po_kernels

pytest.importorskip("liger_kernel")

pytestmark = [
    pytest.mark.trl,
    pytest.mark.interpreter,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]

ROLLOUTS, LENGTH, VOCABULARY, MAX_LENGTH = 2, 5, 300, 8
CASES = {
    "grpo": ("grpo", {}),
    "bnpo": ("grpo", {"aggregation": "token-mean"}),
    "dapo": ("dapo", {"epsilon_high": 0.2}),
    "dr_grpo": ("dr_grpo", {}),
    "cispo": ("cispo", {"epsilon_high": 1.1}),
    "sapo": ("sapo", {}),
}


@pytest.mark.parametrize("ours", ["torch", "triton"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", CASES)
def test_loss_types(loss_type, beta, ours):
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(ROLLOUTS, LENGTH + 1, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (ROLLOUTS, LENGTH), generator=generator)
    scaled = logits[:, :-1] / 0.9
    current = torch.log_softmax(scaled, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    old = current + 0.3 * torch.randn(ROLLOUTS, LENGTH, generator=generator)
    reference = current + 0.2 * torch.randn(ROLLOUTS, LENGTH, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    advantages = torch.tensor([1.3, -0.8])
    high = 1.1 if loss_type == "cispo" else 0.2

    theirs = logits.clone().requires_grad_()
    loss, _ = triton_grpo_loss(
        theirs, old, reference, targets, advantages, mask, temperature=0.9, beta=beta, eps_low=0.2, eps_high=high,
        inplace=False, loss_type=loss_type, max_completion_length=MAX_LENGTH, reduce=True,
    )  # fmt: skip
    loss.backward()

    mine = logits.clone().requires_grad_()
    name, overrides = CASES[loss_type]
    output = a3po_kernels.policy_loss(
        mine[:, :-1], targets, advantages, objective=getattr(a3po_kernels, name)(kl_coef=beta, **overrides),
        old_logprobs=old, ref_logprobs=reference, mask=mask, temperature=0.9, max_length=MAX_LENGTH, backend=ours,
    )  # fmt: skip
    output.loss.backward()
    # fp32 on both sides: a loss of eight terms below 3, and gradients below 1.
    assert torch.allclose(output.loss, loss, atol=3e-6, rtol=0)
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-6, rtol=0)
