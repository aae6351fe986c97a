"""fp16 and a loss scaler: no factor that comes in backward may be missed by a gradient that is formed in forward."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED, PRESETS
from torch import nn

import a3po_kernels
from a3po_kernels import dapo, policy_loss


def test_fp16_keeps_two_stages(backend, device):
    """A loss scaler's factor comes in backward: formed before it, small gradients would be 0 in fp16."""
    logits = torch.randn(2, 8, 64, device=device).half().requires_grad_()
    targets = torch.randint(0, 64, (2, 8), device=device)
    arguments = (logits, targets, torch.tensor([1.0, -1.0], device=device))
    with pytest.raises(ValueError, match="fp16"):
        policy_loss(*arguments, objective=dapo(), route="one-launch", backend=backend)
    output = policy_loss(*arguments, objective=dapo(), denominator=1e6, backend=backend)
    (output.loss * 2.0**20).backward()
    exact = logits.detach().double().requires_grad_()
    truth = policy_loss(exact, *arguments[1:], objective=dapo(), denominator=1e6, backend=backend)
    (truth.loss * 2.0**20).backward()
    assert output.route == "two-stage"
    assert (logits.grad.double() - exact.grad).norm() < 1e-3 * exact.grad.norm()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("denominator", [1.0, 4096.0, 1e6])
@pytest.mark.parametrize("name", PRESETS)
def test_fp16_head_in_one_pass(name, denominator, scale, backend, device):
    """The chunk's gradient is of order one whatever the divisor: dHidden is as exact as recomputation's."""
    if INTERPRETED and (scale == 1.0 or name not in ("dapo", "gspo", "grpo")):
        pytest.skip("the interpreter is slow")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 16, 32, generator=generator).half().to(device)
    weight = (torch.randn(500, 32, generator=generator) / 6 + 0.25).half().to(device)
    targets = torch.randint(0, 500, (2, 16), generator=generator).to(device)
    advantages = torch.tensor([1.0, -0.5], device=device)

    def gradients(dtype, route):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        output = a3po_kernels.linear_policy_loss(
            *leaves, targets, advantages, objective=getattr(a3po_kernels, name)(), denominator=denominator,
            route=route, backend=backend,
        )  # fmt: skip
        # In fp32: what fp16 cannot hold at the end is the caller's affair, not the head's.
        factor = torch.tensor(scale if scale > 1 else 1024.0, device=device)
        return torch.autograd.grad(output.loss * factor, leaves)

    exact = gradients(torch.float64, "one-pass")
    found = gradients(torch.float16, "one-pass")
    compared = 0
    for mine, truth in zip(found, exact, strict=True):
        if 6e-5 < truth.abs().max() < 6e4:  # fp16's normal numbers
            # Elements below them have steps of 6e-8.
            assert (mine.double() - truth).norm() < 4e-3 * truth.norm() + 6e-8 * truth.numel() ** 0.5
            compared += 1
    assert compared or denominator == 1.0 or name in ("gspo", "lp_reg")


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["grpo", "gspo", "sapo", "fork_tokens"])
def test_long_rollouts_beside_short_ones(name, adapted, backend, device):
    """Divided by its rollout's tokens, a long one's gradient is thousands of times smaller: fp16 must hold both."""
    if INTERPRETED:
        pytest.skip("the interpreter is slow; what is tested is not in a kernel")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 4096, 16, generator=generator).half().to(device)
    weight = (torch.randn(2000, 16, generator=generator) / 4 + 0.25).half().to(device)
    bias = torch.randn(2000, generator=generator).half().to(device)
    a, b = torch.randn(4, 16, generator=generator).half(), (torch.randn(2000, 4, generator=generator) / 8).half()
    targets = torch.randint(0, 2000, (2, 4096), generator=generator).to(device)
    mask = torch.ones(2, 4096, dtype=torch.bool, device=device)
    mask[0, 1:] = False
    # A batch's selection, whose divisor is known in the chunk alone; of every token, so that no rounding decides it.
    own = {"ratio": 1.0} if name == "fork_tokens" else {}
    objective = getattr(a3po_kernels, name)(aggregation="seq-mean-token-mean", **own)

    def gradients(dtype, route):
        leaves = [x.to(device, dtype).clone().requires_grad_() for x in (hidden, weight, bias, a, b)]
        options = {"bias": leaves[2], "lora": (*leaves[3:], 0.5) if adapted else None}
        output = a3po_kernels.linear_policy_loss(
            *leaves[:2], targets, torch.ones(2, device=device), objective=objective, mask=mask, route=route,
            backend=backend, **options,
        )  # fmt: skip
        assert output.route == route
        d_hidden, *rest = torch.autograd.grad(output.loss * 1024.0, leaves[: 5 if adapted else 3])
        return [d_hidden[0, :1], d_hidden[1], *rest]

    exact = gradients(torch.float64, "recompute")
    once, twice = gradients(torch.float16, "one-pass"), gradients(torch.float16, "recompute")
    for one, two, truth in zip(once, twice, exact, strict=True):
        # As exact as where the scaler's factor is in the tile; 2e-4 of rounding to fp16 in the sums of either.
        assert (one.double() - truth).norm() < 1.2 * (two.double() - truth).norm() + 2e-4 * truth.norm()


class _Policy(nn.Module):
    """A backbone in front of a head."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.head = nn.Linear(32, 3000, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            self.head.weight.add_(0.25)


@pytest.mark.parametrize(("denominator", "scale"), [(1.0, 2.0**10), (4096.0, 2.0**16), (1e6, 2.0**24)])
@pytest.mark.parametrize("name", PRESETS)
def test_grad_scaler_under_autocast(name, denominator, scale, backend, device):
    """The gradients of a whole model, unscaled by GradScaler, are as near to the truth as plain PyTorch's."""
    if INTERPRETED:
        pytest.skip("the interpreter is slow; what is tested is not in a kernel")
    generator = torch.Generator().manual_seed(1)
    model = _Policy(generator).to(device)
    inputs = torch.randn(2, 24, 16, generator=generator).to(device)
    targets = torch.randint(0, 3000, (2, 24), generator=generator).to(device)
    advantages = torch.tensor([1.0, -0.5], device=device)
    mask = (torch.arange(24) < torch.tensor([[24], [5]])).to(device)
    options = {"objective": getattr(a3po_kernels, name)(), "mask": mask, "denominator": denominator, "backend": backend}

    def gradients(kind):
        model.zero_grad()
        scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=kind != "exact")
        wide = model.double() if kind == "exact" else model.float()
        with torch.autocast(device.type, torch.float16, enabled=kind != "exact"):
            hidden = wide.backbone(inputs.to(next(wide.parameters()).dtype))
            if kind == "logits":
                loss = policy_loss(wide.head(hidden), targets, advantages, **options).loss
            else:
                loss = a3po_kernels.linear_policy_loss(hidden, wide.head.weight, targets, advantages, **options).loss
        optimizer = torch.optim.SGD(wide.parameters(), lr=0.0)
        scaler.scale(loss).backward()
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
        return [parameter.grad.double().clone() for parameter in wide.parameters()]

    exact, logits, linear = (gradients(kind) for kind in ("exact", "logits", "linear"))
    for plain, mine, truth in zip(logits, linear, exact, strict=True):
        assert (mine - truth).norm() <= 1.5 * (plain - truth).norm() + 1e-3 * truth.norm()
        assert (mine - truth).norm() < 0.05 * truth.norm() or not truth.any()
