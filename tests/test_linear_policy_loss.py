"""linear_policy_loss against the reference in fp64: every preset, both routes, chunks that do and do not divide."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED, PRESETS, keywords_for, largest_error, preset, random_batch

import a3po_kernels
import reference

WIDTH = 6
# fp64 against fp64 in another order of sums.
TOLERANCE = 1e-11
PARAMETERS = ("hidden", "weight", "bias", "lora A", "lora B")


def linear_batch(seed, *, active=None, dtype=torch.float64, device="cpu", vocabulary=37, padding=3, per_token=False):
    """A random batch whose logits are a head's; `active`: the share of rollouts with an advantage."""
    batch = random_batch(seed, dtype=torch.float64, device=device, vocabulary=vocabulary, per_token=per_token)
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(*batch.targets.shape, WIDTH).to(device)
    hidden[batch.logits.isnan().any(-1)] = torch.nan  # rows that are no token
    columns = vocabulary + padding
    parameters = [hidden, 0.5 * normal(columns, WIDTH), normal(columns), normal(2, WIDTH), 0.3 * normal(columns, 2)]
    parameters = [x.to(device=device, dtype=dtype) for x in parameters]
    if active is not None:
        kept = round(active * batch.advantages.shape[0])
        signs = torch.tensor([1.0, -1.0], device=device).repeat(batch.advantages.shape[0])[: batch.advantages.shape[0]]
        batch.advantages = signs.double() * (torch.arange(batch.advantages.shape[0], device=device) < kept)
    return batch, parameters


def plain_logits(parameters, vocabulary):
    hidden, weight, bias, a, b = parameters
    return (hidden @ (weight + 0.5 * b @ a).T + bias)[..., :vocabulary]


def run_reference(batch, parameters, objective, vocabulary, **keywords):
    leaves = [x.detach().cpu().double().requires_grad_() for x in parameters]
    # NaN in a hidden state that is no token must not reach the products of the comparison.
    hidden = leaves[0].nan_to_num() if batch.keywords["mask"] is not None else leaves[0]
    moved = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in
             {**batch.keywords, **keywords}.items()}  # fmt: skip
    logits = plain_logits([hidden, *leaves[1:]], vocabulary)
    output = reference.policy_loss(logits, batch.targets.cpu(), batch.advantages.cpu(), objective=objective, **moved)
    return output, torch.autograd.grad(output.loss, leaves, allow_unused=True)


def run_ours(batch, parameters, objective, vocabulary, **keywords):
    leaves = [x.detach().clone().requires_grad_() for x in parameters]
    hidden, weight, bias, a, b = leaves
    output = a3po_kernels.linear_policy_loss(
        hidden, weight, batch.targets, batch.advantages, objective=objective, bias=bias, vocab_size=vocabulary,
        lora=(a, b, 0.5), **{**batch.keywords, **keywords},
    )  # fmt: skip
    return output, torch.autograd.grad(output.loss * 1.5, leaves)


def compare(name, batch, parameters, backend, overrides=None, tolerance=TOLERANCE, statistics="all", **keywords):
    ours, theirs = preset(name, **(overrides or {}))
    batch.keywords = keywords_for(name, batch.keywords)
    keywords = {key: value for key, value in keywords.items() if value is not None}
    linear = {key: keywords.pop(key) for key in ("route", "max_chunk_bytes", "compaction") if key in keywords}
    expected, gradients = run_reference(batch, parameters, theirs, 37, **keywords)
    output, found = run_ours(batch, parameters, ours, 37, backend=backend, statistics=statistics, **linear, **keywords)
    assert largest_error(output.loss, expected.loss) <= tolerance
    for part, mine, truth in zip(PARAMETERS, found, gradients, strict=True):
        assert largest_error(mine, 1.5 * truth) <= tolerance, part
    if statistics == "all":
        for part in ("logprobs", "entropy", "weights"):
            assert largest_error(getattr(output, part), getattr(expected, part)) <= tolerance, part
        for key, value in expected.metrics.items():
            assert largest_error(output.metrics[key], torch.as_tensor(value)) <= tolerance, key
    return output


# 37 columns of 8 bytes: a row of logits is 296 bytes; 12 tokens, a row, or a few columns of a few rows.
BUDGETS = {"everything": None, "12 rows": 12 * 296, "7 rows": 7 * 296, "a row": 296, "a tile": 100}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("route", ["auto", "recompute"])
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, route, budget, backend, device):
    if INTERPRETED and budget not in ("everything", "7 rows"):
        pytest.skip("the interpreter is slow")
    batch, parameters = linear_batch(PRESETS.index(name), device=device)
    output = compare(name, batch, parameters, backend, step=30, route=route, max_chunk_bytes=BUDGETS[budget])
    assert output.route in ("one-pass", "recompute")
    if route == "recompute":
        assert output.route == "recompute"
    elif name in ("grpo", "dapo", "a3po", "cispo", "psr") or budget == "everything":
        assert output.route == "one-pass"
    elif name in ("lp_reg", "fork_tokens") or (name == "gspo" and budget in ("a row", "a tile", "7 rows")):
        assert output.route == "recompute", "what a coefficient depends on lies in other chunks"


@pytest.mark.parametrize("compaction", ["exact", "none"])
@pytest.mark.parametrize("statistics", ["all", "active"])
@pytest.mark.parametrize("active", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("route", ["auto", "recompute"])
@pytest.mark.parametrize("name", PRESETS)
def test_active_rows(name, route, active, statistics, compaction, backend, device):
    if INTERPRETED and (compaction, route) != ("none", "auto"):
        pytest.skip("the interpreter is slow")
    batch, parameters = linear_batch(PRESETS.index(name), active=active, device=device)
    compare(
        name, batch, parameters, backend, step=3, route=route, max_chunk_bytes=3000, compaction=compaction,
        statistics=statistics,
    )  # fmt: skip


@pytest.mark.parametrize("spelling", ["padded", "packed"])
@pytest.mark.parametrize("statistics", ["all", "active"])
@pytest.mark.parametrize(
    "name, overrides",
    [
        ("grpo", {"kl_coef": 0.07, "entropy_coef": 0.02}), ("a3po", {"metric": "entropy", "source": "current"}),
        ("a3po", {"source": "current"}), ("gspo", {"epsilon_low": 0.01, "epsilon_high": 0.01, "entropy_coef": -0.1}),
        ("fork_tokens", {"normalize_over": "all"}), ("dr_grpo", {}), ("psr", {"kl_coef": 0.1}),
        ("lp_reg", {"quantile": 0.9}), ("w_reinforce", {"positive_weight": 0.0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("budget", [None, 12 * 296, 6 * 296])
def test_overrides(name, overrides, statistics, spelling, budget, backend, device):
    if INTERPRETED and (budget is None or statistics == "active"):
        pytest.skip("the interpreter is slow")
    for per_token in (False, True):
        batch, parameters = linear_batch(11, device=device, active=None if per_token else 0.6, per_token=per_token)
        if spelling == "packed":
            batch.logits = parameters[0]
            batch = batch.packed()
            parameters = [batch.logits, *parameters[1:]]
        keywords = {"max_length": 11} if name == "dr_grpo" else {}
        compare(
            name, batch, parameters, backend, overrides, max_chunk_bytes=budget, statistics=statistics, temperature=0.7,
            softcap=4.0, logit_scale=1.3, denominator=17.0, **keywords,
        )  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("budget", [None, 12 * 296, 300])
def test_on_policy(name, budget, backend, device):
    batch, parameters = linear_batch(5, device=device)
    batch.keywords = {"mask": batch.keywords["mask"], "ref_logprobs": batch.keywords["ref_logprobs"]}
    output = compare(name, batch, parameters, backend, {"kl_coef": 0.05}, max_chunk_bytes=budget)
    if name == "a3po":
        assert output.route == ("recompute" if budget == 300 else "one-pass")
