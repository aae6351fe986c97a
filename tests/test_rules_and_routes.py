"""Rules by functions and quantiles where a route, a chunk or the row bound of a GPU could make them another rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from batches import INTERPRETED, largest_error, random_batch, run
from torch._subclasses.fake_tensor import FakeTensorMode

import a3po_kernels as ak
from a3po_kernels.losses import one_pass

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter is slow; what is tested is not in a kernel")


def linear(batch, objective, **options):
    """(output, gradient of the hidden states) of linear_policy_loss on logits that are hidden @ I."""
    hidden = batch.logits.clone().requires_grad_()
    weight = torch.eye(hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    keywords = {k: v for k, v in {**batch.keywords, **options}.items() if k != "min_p_logprobs"}
    out = ak.linear_policy_loss(hidden, weight, batch.targets, batch.advantages, objective=objective, **keywords)
    out.loss.backward()
    return out, hidden.grad


def test_a_quantile_keeps_any_number_of_rows(backend, device, monkeypatch):
    """As on a GPU, where a chunk's rows are bounded by what the rules may keep: a quantile of 0.2 keeps 80 %."""
    monkeypatch.setattr(one_pass, "_counts_freely", lambda device: False)
    rule = ak.TokenRule(metric="entropy", source="current", side="high", scope="batch", quantile=0.2, rest_scale=0.0)
    objective = ak.Objective(shaping=(rule,), surrogate=ak.Clip(0.2, 0.28))
    batch = random_batch(3, rollouts=6, dtype=torch.float64, device=device)
    expected, truth = linear(batch, objective, route="recompute", backend=backend)
    found, gradient = linear(batch, objective, route="one-pass", backend=backend)
    assert found.route == "one-pass" and truth.any(-1).sum() > 0.3 * found.metrics["token_count"]
    assert largest_error(found.loss, expected.loss) < 1e-12 and largest_error(gradient, truth) < 1e-12


def centred(t):
    return t.old_logprobs - t.batch_mean(t.old_logprobs) * t.position.to(t.old_logprobs.dtype)


def test_a_function_reads_the_whole_batch(backend, device):
    """Beside a rule on the current policy, whose rollouts could be cut apart, it is not given a chunk of the batch."""
    rules = (
        ak.TokenRule(metric=centred, side="low", ratio=0.5, selected_scale=3.0),
        ak.TokenRule(metric="entropy", source="current", side="high", ratio=0.3, selected_scale=2.0),
    )
    batch = random_batch(5, rollouts=7, dtype=torch.float64, device=device)
    objective = ak.Objective(shaping=rules)
    expected, truth = linear(batch, objective, route="recompute", backend=backend)
    for options in ({}, {"max_chunk_bytes": 8 * 37 * 12}, {"statistics": "active"}):
        found, gradient = linear(batch, objective, backend=backend, **options)
        assert largest_error(found.loss, expected.loss) < 1e-12 and largest_error(gradient, truth) < 1e-12
        assert torch.equal(found.weights, expected.weights) or "statistics" in options


def test_vespo_takes_a_rollouts_weight_once(backend, device):
    """[S] importance weights are of the rollout: a factor of its ratio, not of each token's."""
    logits = torch.randn(1, 50, 7, dtype=torch.float64, device=device)
    targets = torch.zeros(1, 50, dtype=torch.long, device=device)
    logp = torch.log_softmax(logits, -1)[..., 0]
    advantages = torch.ones(1, dtype=torch.float64, device=device)
    weight = torch.full_like(advantages, 0.9)
    out = ak.policy_loss(
        logits, targets, advantages, objective=ak.vespo(), old_logprobs=logp, importance_weights=weight,
        backend=backend,
    )  # fmt: skip
    factor = math.exp(3.0 + 2.0 * math.log(0.9) - 3.0 * 0.9)
    assert largest_error(out.loss, -factor * logp.mean()) < 1e-12


def test_an_entropy_that_was_not_given_is_not_zero(backend, device):
    rule = ak.TokenRule(metric=lambda t: t.entropy, source="current")
    with pytest.raises(ValueError, match="reads entropy, which was not given"):
        ak.logprob_policy_loss(
            -torch.rand(2, 5, device=device), torch.ones(2, device=device), objective=ak.Objective(shaping=(rule,)),
            backend=backend,
        )  # fmt: skip


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 1.0])
def test_quantiles(quantile, backend, device):
    """torch.quantile's, ties and infinities included, and without values: nothing is read on the host."""
    score = torch.tensor([[1.0, 2.0, 2.0, math.inf], [2.0, -math.inf, 5.0, 0.0]], dtype=torch.float64, device=device)
    rule = ak.TokenRule(metric="mine", side="high", scope="batch", quantile=quantile, selected_scale=3.0)
    objective = ak.Objective(shaping=(rule,))
    logits, targets = torch.randn(2, 4, 7, device=device).double(), torch.zeros(2, 4, dtype=torch.long, device=device)
    options = {"objective": objective, "scores": {"mine": score}, "backend": backend}
    weights = ak.policy_loss(logits, targets, torch.ones(2, device=device), **options).weights
    finite = score.clamp(-1e300, 1e300)
    bound = torch.quantile(finite, quantile)
    assert torch.equal(weights == 3.0, finite >= bound)
    with FakeTensorMode():
        fakes = (torch.randn(2, 4, 7).double(), torch.zeros(2, 4, dtype=torch.long), torch.ones(2))
        options = {"objective": objective, "scores": {"mine": torch.randn(2, 4).double()}}
        assert ak.policy_loss(*fakes, **options).weights.shape == (2, 4)


def test_a_surrogate_may_read_scores_and_rollouts(backend, device):
    batch = random_batch(4, dtype=torch.float64, device=device)
    score = torch.rand(batch.targets.shape, dtype=torch.float64, device=device)

    def function(t):
        return -t.advantages * t.logprobs * t.scores["mine"] * (1 + t.rollout % 2)

    objective = ak.Objective(surrogate=ak.CustomSurrogate(function))
    keywords = {"min_p_logprobs": None, "backend": backend}
    out, gradient = run(ak, batch, objective, scores={"mine": score}, **keywords)
    weights = score * (1 + torch.arange(len(score), device=device) % 2).unsqueeze(-1)
    importance = batch.keywords["importance_weights"] * weights
    plain = ak.Objective(surrogate=ak.Reinforce())
    expected, truth = run(ak, batch, plain, **keywords, importance_weights=importance)
    assert largest_error(out.loss, expected.loss) < 1e-12 and largest_error(gradient, truth) < 1e-12


def test_a_replaced_token_is_the_rollouts_still(backend, device):
    """Other tokens' surrogate sees the weights and advantages of the batch, replaced tokens' among them."""

    def function(t):
        return -t.rollout_mean(t.advantages) * t.logprobs

    batch = random_batch(4, dtype=torch.float64, device=device, per_token=True)
    batch.advantages = batch.advantages.masked_fill(batch.logits.isnan().any(-1), 0.0)
    surrogate = ak.CustomSurrogate(function, "rollout")
    rule = ak.TokenRule(metric="probability", side="low", ratio=0.3, replacement=ak.Nothing())
    plain = ak.Objective(surrogate=surrogate)
    replaced = replace(plain, shaping=(rule,))
    keywords = {"min_p_logprobs": None, "backend": backend}
    _, truth = run(ak, batch, plain, **keywords)
    out, gradient = run(ak, batch, replaced, **keywords)
    moved = gradient.any(-1)
    assert 0 < moved.sum() < truth.any(-1).sum() and out.loss.isfinite()
    assert largest_error(gradient[moved], truth[moved]) < 1e-12
