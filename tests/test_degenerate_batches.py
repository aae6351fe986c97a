"""Batches of nothing, or of NaN wherever no token is: every call, every preset, loss and gradients finite or 0."""

from __future__ import annotations

import itertools

import pytest
import torch
from batches import INTERPRETED, PRESETS

import a3po_kernels as ak

H, V = 4, 9
NAN = float("nan")

# What a batch is, and the calls that get it.
KINDS = ("all masked", "all ignored", "empty rollouts", "no rollouts", "no rows", "NaN elsewhere", "no advantage")
CALLS = (
    "policy_loss two-stage", "policy_loss one-launch", "linear_policy_loss one-pass", "linear_policy_loss recompute",
    "linear_policy_loss active", "logprob_policy_loss",
)  # fmt: skip

CASES = list(itertools.product(KINDS, CALLS, PRESETS))
if INTERPRETED:  # a preset in turn for each kind and call, of which the first and the last ways launch other kernels
    CASES = [(kind, call, PRESETS[i % 12]) for i, (kind, call) in enumerate(itertools.product(KINDS, CALLS[1:4]))]


def build(kind, device):
    """(hidden [N, H], targets, advantages [S], keywords) of packed rollouts."""
    generator = torch.Generator().manual_seed(0)
    ends = {"empty rollouts": [0, 0, 6, 6], "no rollouts": [0], "no rows": [0, 0, 0]}.get(kind, [0, 3, 6])
    rows, rollouts = ends[-1], len(ends) - 1
    hidden = 0.01 * torch.randn(rows, H, generator=generator)  # log-probs near -log V, as the old ones: no ratio clips
    targets = torch.randint(0, V, (rows,), generator=generator)
    advantages = torch.tensor([1.0, -1.0, 0.5])[:rollouts]
    mask = torch.ones(rows, dtype=torch.bool)
    per_token = -torch.full((4, rows), V).log()
    if kind == "all masked":
        mask[:] = False
    elif kind == "all ignored":
        targets[:] = -100
    elif kind == "NaN elsewhere":
        mask[1:4] = False
    elif kind == "no advantage":
        advantages = torch.zeros(rollouts)
    nowhere = ~mask | (targets == -100)
    hidden[nowhere], per_token[:, nowhere] = NAN, NAN
    old, reference, proxy, entropy = per_token.to(device)
    keywords = {
        "old_logprobs": old, "ref_logprobs": reference, "old_entropy": -entropy, "min_p_logprobs": proxy,
        "mask": mask.to(device), "cu_seqlens": torch.tensor(ends, device=device), "max_length": 5,
    }  # fmt: skip
    return hidden.to(device), targets.to(device), advantages.to(device), keywords


@pytest.mark.parametrize(("kind", "call", "name"), CASES)
def test_nothing_is_nan(kind, call, name, backend, device):
    hidden, targets, advantages, keywords = build(kind, device)
    objective = getattr(ak, name)()
    function, _, way = call.partition(" ")
    if name != "lp_reg":
        del keywords["min_p_logprobs"]
    if name == "lp_reg" or name == "fork_tokens" or name == "gspo":
        way = {"one-launch": "two-stage", "one-pass": "auto"}.get(way, way)
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    options = {"objective": objective, "backend": backend, **keywords}
    if function == "linear_policy_loss":
        leaf = hidden.requires_grad_()
        options |= {"statistics": "active"} if way == "active" else {"route": way}
        out = ak.linear_policy_loss(leaf, weight, targets, advantages, **options)
    elif function == "policy_loss":
        leaf = (hidden @ weight.detach().t()).requires_grad_()
        out = ak.policy_loss(leaf, targets, advantages, route=way, **options)
    else:
        options["mask"] = keywords["mask"] & (targets != -100)  # it gets no targets
        leaf = keywords["old_logprobs"].clone().requires_grad_()
        out = ak.logprob_policy_loss(leaf, advantages, entropy=keywords["old_entropy"], **options)
    out.loss.backward()
    assert leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all() and out.loss.isfinite()
    # Without a clamp the metrics are finite too: no token has a log ratio to the reference of more than a few nats.
    assert all(value.isfinite() for value in out.metrics.values())
    learns = kind == "NaN elsewhere" or kind == "empty rollouts"
    assert learns or (out.loss == 0 and not leaf.grad.any())
    if function == "linear_policy_loss":
        assert weight.grad.isfinite().all() and (learns or not weight.grad.any())
    if learns and name in ("dapo", "grpo", "a3po", "w_reinforce"):
        assert leaf.grad.any()
    assert out.metrics["token_count"] == (keywords["mask"] & (targets != -100)).sum()
