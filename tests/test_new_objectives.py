"""DPPO, VESPO, GMPO, GSPO-token, LUSPO, TOPR, KL-Cov and Clip-Cov against the reference in fp64, on every route."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import INTERPRETED, NEW_PRESETS, assert_outputs, preset, random_batch, run, unlikely
from test_linear_policy_loss import linear_batch, run_ours, run_reference

import a3po_kernels as ak
import reference

OVERRIDES = {
    "dppo": (
        {}, {"divergence": "kl", "delta_low": 0.02, "delta_high": 0.01}, {"delta_low": 0.005, "delta_high": 0.002},
        {"ratio_cap": 1.05, "kl_coef": 0.1, "kl_estimator": "k3-ratio"}, {"aggregation": "seq-mean-token-mean"},
    ),
    "vespo": (
        {}, {"k_positive": 0.5, "lambda_positive": 0.7, "k_negative": 1.5, "lambda_negative": 0.2},
        {"kl_coef": 0.1, "entropy_coef": 0.02}, {"aggregation": "seq-mean-token-sum"},
    ),
    "gmpo": (
        {}, {"epsilon_low": 0.1, "epsilon_high": 0.2}, {"epsilon_low": 0.0, "epsilon_high": 0.0},
        {"kl_coef": 0.1, "kl_estimator": "k2", "entropy_coef": 0.02, "aggregation": "token-mean"},
    ),
    "gspo_token": (
        {}, {"epsilon_low": 0.01, "epsilon_high": 0.02}, {"dual_clip": 1.01, "epsilon_low": 0.5},
        {"delta": 1.02, "kl_coef": 0.1, "entropy_coef": 0.02},
    ),
    "luspo": ({}, {"epsilon_low": 0.01, "epsilon_high": 0.02, "kl_coef": 0.1}, {"delta": 1.02}),
    "topr": ({}, {"level": "geometric"}, {"level": "token", "entropy_coef": 0.02}, {"log_ratio_coef": 0.3}),
    "kl_cov": ({}, {"ratio": 0.3, "penalty": 1.5}, {"ratio": 0.2, "kl_coef": 0.1, "entropy_coef": 0.02}),
    "clip_cov": (
        {}, {"low": 0.1, "high": 2.0, "epsilon_low": 0.05, "epsilon_high": 0.1}, {"dual_clip": 1.1, "low": 0.0},
        {"kl_coef": 0.1, "entropy_coef": 0.02},
    ),
}  # fmt: skip
CASES = [(name, number) for name in NEW_PRESETS for number in range(len(OVERRIDES[name]))]
FIRST = [(name, 0) for name in NEW_PRESETS]
VARIANTS = ("padded", "packed", "per-token", "unweighted", "by rollout", "on-policy", "transformed", "long")


def pair(name, number=0, **more):
    return preset(name, **{**OVERRIDES[name][number], **more})


def make_batch(name, variant, device):
    batch = random_batch(
        NEW_PRESETS.index(name) + 3, device=device, per_token=variant == "per-token",
        rollouts=13 if variant == "long" else 5,
    )  # fmt: skip
    del batch.keywords["min_p_logprobs"]
    if variant in ("unweighted", "on-policy"):
        del batch.keywords["importance_weights"]
    if variant == "by rollout":  # importance weights
        batch.keywords["importance_weights"] = torch.tensor([0.7, 1.6, 0.9, 1.1, 0.4], device=device).double()
    if variant == "on-policy":
        del batch.keywords["old_logprobs"], batch.keywords["old_entropy"]
    return batch.packed() if variant == "packed" else batch


def compare(batch, objectives, backend, tolerance=1e-12, ours_only=None, **keywords):
    """ours_only: options of the package's call that do not change the result."""
    output, gradient = run(ak, batch, objectives[0], backend=backend, **keywords, **(ours_only or {}))
    expected, truth = run(reference, batch, objectives[1], double=True, **keywords)
    assert_outputs(output, [gradient], expected, [truth], tolerance)
    return output, gradient


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name, number", CASES)
def test_presets(name, number, variant, backend, device):
    if INTERPRETED and (variant != "padded" or number):
        pytest.skip("the interpreter is slow: the first of each preset, padded")
    keywords = {"step": 3}
    if variant == "transformed":
        keywords |= {"temperature": 0.7, "softcap": 4.0, "logit_scale": 1.3, "denominator": 12.5}
    compare(make_batch(name, variant, device), pair(name, number), backend, **keywords)


def test_what_the_cases_reach(backend, device):
    """Each bound and each selection is at work in some case above."""
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    reached = set()
    for name, number in CASES:
        output, _ = run(ak, make_batch(name, "long", device), pair(name, number)[0], backend=backend)
        reached |= {(name, key) for key, value in output.metrics.items() if value > 0}
        assert output.metrics["ratio_mean"] != 1
    both = {(name, f"clip_fraction_{side}") for name in ("dppo", "gmpo", "gspo_token", "luspo") for side in
            ("low", "high")}  # fmt: skip
    dual = {(name, "dual_clip_fraction") for name in ("dppo", "gspo_token", "clip_cov")}
    chosen = {(name, f"selected_fraction_{sign}") for name in ("kl_cov", "clip_cov") for sign in
              ("positive", "negative")}  # fmt: skip
    assert both | dual | chosen <= reached


@pytest.mark.parametrize("aggregation", ak.objectives.AGGREGATIONS)
@pytest.mark.parametrize("name", NEW_PRESETS)
def test_aggregations(name, aggregation, backend, device):
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    for denominator in (None, 7.5):
        objectives = pair(name, aggregation=aggregation)
        compare(make_batch(name, "per-token", device), objectives, backend, denominator=denominator)


@pytest.mark.parametrize("name", NEW_PRESETS)
def test_dropped_tokens(name, backend, device):
    """Within a rollout, and whole rollouts: they stay in the rollout's sums and means, and leave the loss."""
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    for variant in ("per-token", "padded"):
        for over in ("all", "selected"):
            objectives = [
                replace(x, shaping=(module.PolarityWeights(0.5, 0.0, 2.0), *x.shaping), normalize_over=over)
                for module, x in zip((ak, reference), pair(name, kl_coef=0.1), strict=True)
            ]
            compare(make_batch(name, variant, device), objectives, backend)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name, number", [*FIRST, ("dppo", 1), ("topr", 1), ("topr", 2)])
def test_extreme_ratios(name, number, weighted, backend, device):
    """Log ratios of +-30 and -50: finite, and held where the formula holds them; the squared one is not."""
    if INTERPRETED and (weighted or name not in ("dppo", "gmpo", "gspo_token")):
        pytest.skip("the interpreter is slow")
    batch = unlikely(make_batch(name, "padded" if weighted else "unweighted", device), 40.0)
    batch.keywords["old_logprobs"][:, ::2] += 30.0
    batch.keywords["old_logprobs"][:, 1::4] -= 60.0
    batch.keywords["old_logprobs"][1] -= 50.0
    batch.advantages = batch.advantages / 1e6  # e^20 is 5e8
    output, gradient = compare(batch, pair(name, number, log_ratio_coef=1e-3), backend)
    assert output.loss.isfinite() and gradient.isfinite().all()


def test_vespo_holds_each_log_ratio(backend, device):
    """At +-20 by token, before the sum: 30 and -25 cancel, where 5 would end the rollout's weight."""
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    batch = unlikely(make_batch("vespo", "unweighted", device), 40.0)
    first, second = (~batch.logits[0].isnan().any(-1)).nonzero().flatten()[:2]
    batch.keywords["old_logprobs"][0, first] -= 30.0
    batch.keywords["old_logprobs"][0, second] += 25.0
    _, gradient = compare(batch, pair("vespo"), backend)
    assert gradient[0, first].abs().max() > 1e-6


@pytest.mark.parametrize("name", NEW_PRESETS)
def test_nothing_to_learn(name, backend, device):
    """No row, no token, only empty rollouts: loss and gradient 0, never NaN."""
    if INTERPRETED and name not in ("dppo", "gmpo"):
        pytest.skip("the interpreter is slow")
    batch = make_batch(name, "padded", device)
    batch.keywords["mask"] = torch.zeros_like(batch.keywords["mask"])
    output, gradient = compare(batch, pair(name, kl_coef=0.1), backend)
    assert output.loss == 0 and not gradient.any()
    logits = torch.randn(0, 7, dtype=torch.float64, device=device, requires_grad=True)
    packed = {"cu_seqlens": torch.zeros(3, dtype=torch.int64, device=device), "max_length": 4}
    targets, advantages = torch.zeros(0, dtype=torch.int64, device=device), torch.ones(2, device=device)
    out = ak.policy_loss(logits, targets, advantages, objective=pair(name)[0], backend=backend, **packed)
    out.loss.backward()
    assert out.loss == 0 and logits.grad.shape == (0, 7)
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("name, number", CASES)
def test_routes_of_logits(name, number, backend, device):
    """One launch where a token's loss is its own, the same numbers; elsewhere a reason and two stages."""
    if INTERPRETED and (name, number) != ("dppo", 1):
        pytest.skip("the interpreter is slow")
    batch, objectives = make_batch(name, "padded", device), pair(name, number)
    own, _ = objectives
    replaces = any(getattr(rule, "replacement", None) is not None for rule in own.shaping)
    if own.ratio_level == "token" and not own.ratio_weights and not replaces:
        output, _ = compare(batch, objectives, backend, ours_only={"route": "one-launch"})
        assert output.route == "one-launch"
    else:
        with pytest.raises(ValueError, match="route='one-launch' is not possible here"):
            run(ak, batch, objectives[0], backend=backend, route="one-launch")
    output, _ = compare(batch, objectives, backend, ours_only={"route": "two-stage"})
    assert output.route == "two-stage"


# 37 columns of 8 bytes: a row of logits is 296 bytes. "small": a few tokens, across rollouts' borders.
BUDGETS = {"everything": None, "small": 5 * 296}


@pytest.mark.parametrize("statistics", ["all", "active"])
@pytest.mark.parametrize("route, budget", [("auto", "everything"), ("auto", "small"), ("recompute", "small")])
@pytest.mark.parametrize("name, number", [*FIRST, ("dppo", 1), ("topr", 3), ("kl_cov", 1)])
def test_linear_routes(name, number, route, budget, statistics, backend, device):
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    for active in (None, 0.6):
        batch, parameters = linear_batch(NEW_PRESETS.index(name), device=device, active=active)
        del batch.keywords["min_p_logprobs"]
        ours, theirs = pair(name, number, kl_coef=0.05 if active is None else 0.0)
        expected, truths = run_reference(batch, parameters, theirs, 37, step=3)
        output, found = run_ours(
            batch, parameters, ours, 37, backend=backend, statistics=statistics, route=route, step=3,
            max_chunk_bytes=BUDGETS[budget],
        )  # fmt: skip
        assert output.route == route or route == "auto"
        truths = [1.5 * truth for truth in truths]
        if statistics == "all":
            assert_outputs(output, found, expected, truths, 1e-11)
        else:  # the statistics of rows that cannot move are not there
            assert_outputs(expected._replace(loss=output.loss), found, expected, truths, 1e-11)


@pytest.mark.parametrize("name, number", CASES)
def test_from_log_probs(name, number, backend, device):
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    for variant in ("packed", "per-token"):
        batch, (ours, theirs) = make_batch(name, variant, device), pair(name, number)
        batch.keywords["mask"] = batch.keywords["mask"] & (batch.targets != -100)  # which the call is not told
        logits = batch.logits.clone().requires_grad_()
        stats = ak.token_logprobs(logits.nan_to_num(), batch.targets, backend=backend)
        output = ak.logprob_policy_loss(
            stats.logprobs, batch.advantages, objective=ours, entropy=stats.entropy, backend=backend, step=3,
            **batch.keywords,
        )  # fmt: skip
        output.loss.backward()
        expected, truth = run(reference, batch, theirs, double=True, step=3)
        hole = batch.logits.isnan().any(-1)
        output = output._replace(
            logprobs=output.logprobs.masked_fill(hole, 0.0), entropy=output.entropy.masked_fill(hole, 0.0)
        )
        assert_outputs(output, [logits.grad], expected, [truth])


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_clip_cov_draws_among_more_candidates(share, backend, device):
    """Exactly k of them, whichever its hash takes; then the reference, told which, agrees. A seed draws others."""
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    options, drawn = {"low": 0.01, "high": 9.0, "epsilon_low": 0.9, "epsilon_high": 9.0}, []
    batch = make_batch("clip_cov", "per-token", device)
    every, _ = run(reference, batch, reference.clip_cov(ratio=1.0, **options), double=True)
    tokens, there = int(every.metrics["token_count"]), (every.logprobs != 0)
    for seed in range(3):
        objective = ak.clip_cov(ratio=share, seed=seed, **options)
        output, gradient = run(ak, batch, objective, backend=backend)
        chosen = (gradient.cpu() == 0).all(-1) & there
        assert chosen.sum() == int(share * tokens)
        theirs = reference.clip_cov(ratio=share, score="drawn", **options)
        expected, truth = run(reference, batch, theirs, double=True, scores={"drawn": chosen.double()})
        assert_outputs(output, [gradient], expected, [truth])
        again, _ = run(ak, batch, objective, backend=backend)
        assert torch.equal(again.loss, output.loss)
        drawn.append(chosen)
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
