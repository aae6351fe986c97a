"""plan_rows: which rows it names, that the loss with it is the loss without, and that a wrong one is never silent."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED, PRESETS, keywords_for, random_batch

import a3po_kernels
from a3po_kernels import Objective, PolarityWeights, TokenRule, dapo, linear_policy_loss, plan_rows

WIDTH = 8


def linear_inputs(seed, device, *, active=None, per_token=False):
    """A batch, and hidden states and weight in the place of its logits."""
    batch = random_batch(seed, rollouts=6, device=device, per_token=per_token)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*batch.targets.shape, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(37, WIDTH, generator=generator, dtype=torch.float64)
    if active is not None:
        batch.advantages = batch.advantages * (torch.arange(6, device=device) < active)
    return batch, hidden.to(device), weight.to(device)


def run(batch, hidden, weight, objective, backend, **options):
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    output = linear_policy_loss(
        *leaves, batch.targets, batch.advantages, objective=objective, backend=backend, **batch.keywords, **options
    )
    gradients = torch.autograd.grad(output.loss, leaves) if output.loss.requires_grad else (None, None)
    return output, gradients


@pytest.mark.parametrize("route", ["auto", "recompute"])
@pytest.mark.parametrize("statistics", ["all", "active"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_same_with_a_plan(name, statistics, route, backend, device):
    if INTERPRETED and ((route, statistics) != ("auto", "all") or name in ("grpo", "dr_grpo", "nsr", "cispo", "sapo")):
        pytest.skip("the interpreter is slow")
    batch, hidden, weight = linear_inputs(PRESETS.index(name), device, active=3)
    batch.keywords = keywords_for(name, batch.keywords)
    objective = getattr(a3po_kernels, name)()
    plan = plan_rows(batch.keywords["mask"], batch.advantages, objective=objective)
    options = {"route": route, "statistics": statistics}
    expected, gradients = run(batch, hidden, weight, objective, backend, **options)
    output, found = run(batch, hidden, weight, objective, backend, plan=plan, **options)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.logprobs, expected.logprobs, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    for key in expected.metrics:
        torch.testing.assert_close(output.metrics[key], expected.metrics[key], rtol=1e-10, atol=1e-12)


def test_which_rows():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    advantages = torch.tensor([1.0, 0.0, -1.0, 2.0])

    def rows(objective, advantages=advantages, **options):
        plan = plan_rows(mask, advantages, objective=objective, **options)
        assert plan.row_count == (plan.count if plan.rows is None else len(plan.rows))
        rest = [] if plan.rest is None else plan.rest.tolist()
        return (list(range(plan.count)) if plan.rows is None else plan.rows.tolist()), rest

    assert rows(dapo()) == ([0, 1, 6, 7, 8], [3])
    assert rows(a3po_kernels.psr()) == ([0, 1], [3, 6, 7, 8])
    assert rows(a3po_kernels.nsr(), polarity=torch.tensor([-1, -1, 1, 0])) == ([0, 1], [3, 6, 7, 8])
    assert rows(dapo(entropy_coef=0.1)) == ([0, 1, 3, 6, 7, 8], [])
    assert rows(a3po_kernels.fork_tokens()) == ([0, 1, 3, 6, 7, 8], [])
    per_token = torch.tensor([[0.0, 1.0, 5.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    assert rows(dapo(), per_token) == ([1, 8], [0, 3, 6, 7])
    assert rows(a3po_kernels.a3po(), per_token) == ([0, 1, 6, 7, 8], [3]), "whole rollouts, where rules look at them"
    packed = torch.tensor([1, 1, 0, 1, 1, 1])
    plan = plan_rows(packed, torch.tensor([1.0, 0.0]), objective=dapo(), cu_seqlens=torch.tensor([0, 3, 6]))
    assert plan.rows.tolist() == [0, 1] and plan.rest.tolist() == [3, 4, 5] and plan.boundaries == (0, 2, 2)


MIXED = {
    "polarity beside a current rule": (
        PolarityWeights(1.0, 0.0, 0.0), TokenRule(metric="entropy", source="current", side="high", selected_scale=2.0),
    ),
    "current rule beside an old rule over the batch": (
        TokenRule(metric="entropy", source="current", side="high", ratio=0.5, selected_scale=2.0),
        TokenRule(metric="probability", source="old", side="low", ratio=0.4, rest_scale=0.0, scope="batch"),
    ),
    "a later polarity": (
        TokenRule(metric="entropy", source="current", side="low", ratio=0.5, rest_scale=0.0), PolarityWeights(1, 0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rules", MIXED)
@pytest.mark.parametrize("budget", [None, 12 * 296, 296])
def test_rules_of_mixed_kinds(rules, budget, backend, device, monkeypatch):
    """Whatever the chunks and the plan, the gradient is that of recomputation from all rows."""
    if INTERPRETED and budget != 12 * 296:
        pytest.skip("the interpreter is slow")
    objective = Objective(shaping=MIXED[rules])
    batch, hidden, weight = linear_inputs(4, device, active=4)
    batch.keywords.pop("min_p_logprobs")
    expected, gradients = run(batch, hidden, weight, objective, backend, route="recompute", compaction="none")
    plan = plan_rows(batch.keywords["mask"], batch.advantages, objective=objective)
    for options in ({}, {"plan": plan}, {"compaction": "none"}):
        output, found = run(batch, hidden, weight, objective, backend, max_chunk_bytes=budget, **options)
        torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["fork_tokens", "a3po"])
def test_fewer_rows_by_number_alone(name, backend, device, monkeypatch):
    """On a GPU the rows that a rule keeps are bounded by their number: the way it goes there, taken here."""
    from a3po_kernels.losses import one_pass

    seen: list = []
    real = one_pass._with_gradient

    def watched(d_logp, d_entropy, most):
        kept = real(d_logp, d_entropy, most)
        seen.append((int((d_logp != 0).sum()), most, None if kept is None else kept.numel()))
        return kept

    batch, hidden, weight = linear_inputs(2, device)
    batch.keywords = keywords_for(name, batch.keywords)
    rule = TokenRule(metric="entropy", source="current", side="high", ratio=0.3, rest_scale=0.0)
    objective = a3po_kernels.fork_tokens() if name == "fork_tokens" else Objective(shaping=(rule,))
    _, expected = run(batch, hidden, weight, objective, backend, route="recompute")
    monkeypatch.setattr(one_pass, "_with_gradient", watched)
    monkeypatch.setattr(one_pass, "_counts_freely", lambda device: False)
    _, found = run(batch, hidden, weight, objective, backend, route="one-pass")
    assert seen and all(moving <= most == kept for moving, most, kept in seen), seen
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_rollouts_ratio_keeps_every_row(backend, device, monkeypatch):
    """The gradient of a rollout's ratio reaches the tokens that a rule drops: their number bounds nothing then."""
    from a3po_kernels.losses import one_pass

    batch, hidden, weight = linear_inputs(2, device)
    batch.keywords.pop("min_p_logprobs")
    rule = TokenRule(metric="entropy", source="current", side="high", ratio=0.3, rest_scale=0.0)
    objective = Objective(shaping=(rule,), ratio_level="sequence")
    _, expected = run(batch, hidden, weight, objective, backend, route="recompute")
    monkeypatch.setattr(one_pass, "_counts_freely", lambda device: False)
    _, found = run(batch, hidden, weight, objective, backend, route="one-pass")
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_chunks_of_whole_rollouts_hold_the_last(backend, device):
    """Every row, two padded rollouts a chunk: the last one is in the last chunk."""
    batch, hidden, weight = linear_inputs(6, device)
    batch.keywords = keywords_for("gspo", batch.keywords)
    batch.keywords["mask"] = torch.ones_like(batch.keywords["mask"])
    filled = {name: x.nan_to_num(0.5) for name, x in batch.keywords.items() if x.is_floating_point()}
    batch.keywords.update({name: -x.abs() if "logprobs" in name else x for name, x in filled.items()})
    objective = a3po_kernels.gspo(entropy_coef=0.1)
    _, expected = run(batch, hidden, weight, objective, backend, route="recompute")
    options = {"compaction": "none", "max_chunk_bytes": 22 * 37 * 8}
    _, found = run(batch, hidden, weight, objective, backend, route="one-pass", **options)
    assert expected[0][-1].any()
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_wrong_plan_is_refused(backend, device):
    batch, hidden, weight = linear_inputs(1, device)
    batch.keywords.pop("min_p_logprobs")
    mask = batch.keywords["mask"]

    def loss(plan, objective=None, **options):
        return run(batch, hidden, weight, objective or dapo(), backend, plan=plan, validate=True, **options)

    with pytest.raises(ValueError, match="made of another batch"):
        loss(plan_rows(mask, torch.zeros_like(batch.advantages), objective=dapo()))
    fewer = mask.clone()
    fewer[2] = False  # a rollout without an advantage: no gradient is missing, but its statistics are
    with pytest.raises(ValueError, match="made of another batch"):
        loss(plan_rows(fewer, batch.advantages, objective=dapo()))
    with pytest.raises(ValueError, match="another objective"):
        loss(plan_rows(mask, batch.advantages, objective=a3po_kernels.grpo()))
    with pytest.raises(ValueError, match="plan must be of 66 rows in 6 rollouts; got one of 22 in 2"):
        loss(plan_rows(mask[:2], batch.advantages[:2], objective=dapo()))
    # The same rows in other rollouts: whole ones would be cut.
    ends = torch.tensor([0, 10, 20, 30, 40, 50, 66], device=device)
    other = plan_rows(mask.flatten(), batch.advantages, objective=dapo(), cu_seqlens=ends)
    with pytest.raises(ValueError, match="made of another batch"):
        loss(other)
    with pytest.raises(TypeError, match="plan must be a RowPlan"):
        loss(mask)
    plan = plan_rows(mask, batch.advantages, objective=dapo())
    with pytest.raises(ValueError, match="give one"):
        loss(plan, compaction="none")
    with pytest.raises(TypeError, match="objective must be an Objective"):
        plan_rows(mask, batch.advantages, objective=None)
    with pytest.raises(ValueError, match="advantages must have shape"):
        plan_rows(mask, batch.advantages[:3], objective=dapo())


@pytest.mark.parametrize("active", [0, 1])
def test_a_wrong_plan_is_nan_where_values_are_not_read(active, backend, device, monkeypatch):
    """As on a GPU: the loss and every gradient hold NaN rather than something wrong, even where no row is planned."""
    from a3po_kernels.losses import batch as reading
    from a3po_kernels.losses import linear

    for module in (linear, reading):
        monkeypatch.setattr(module, "reads_values", lambda *_: False)
    rows_of = linear._recomputed_rows
    monkeypatch.setattr(
        linear, "_recomputed_rows", lambda plan, *rest: (linear.GIVEN, linear.GIVEN, (plan.rows, plan.rows))
    )
    assert rows_of is not linear._recomputed_rows
    batch, hidden, weight = linear_inputs(1, device)
    batch.keywords.pop("min_p_logprobs")
    fewer = batch.advantages * (torch.arange(6, device=device) < active)
    plan = plan_rows(batch.keywords["mask"], fewer, objective=dapo())
    for route in ("auto", "recompute"):
        output, gradients = run(batch, hidden, weight, dapo(), backend, plan=plan, route=route)
        assert output.loss.isnan() and all(gradient.isnan().any() for gradient in gradients)


@pytest.mark.cuda
def test_synchronisations():
    """With a plan, or every row, the linear head waits for nothing; without one it waits once."""
    batch, hidden, weight = linear_inputs(1, torch.device("cuda"), active=3)
    batch.keywords.pop("min_p_logprobs")
    plan = plan_rows(batch.keywords["mask"], batch.advantages, objective=dapo())
    for options in ({"plan": plan}, {"compaction": "none"}, {"plan": plan, "route": "recompute"}):
        run(batch, hidden, weight, dapo(), "triton", **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(batch, hidden, weight, dapo(), "triton", **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for route in ("auto", "recompute"):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchroniz") as seen:
                run(batch, hidden, weight, dapo(), "triton", route=route)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert sum("called a synchronizing" in str(warning.message) for warning in seen) == 1
