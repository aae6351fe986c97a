"""Token rules by thresholds, quantiles, scores and functions, replacements and ratio weights, against the reference."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED, assert_outputs, random_batch, run
from test_linear_policy_loss import linear_batch, run_ours, run_reference

import a3po_kernels as ak
import reference

# -- objectives, each a function of the module whose parts it is made of ----------------------------------------------


def rule(**options):
    return lambda m: m.Objective(shaping=(m.TokenRule(**options),), kl_coef=0.05)


def surprise(t):
    return t.rollout_mean(t.logprobs) - t.logprobs


def drift(t):
    return t.logprobs - t.ref_logprobs + 0.1 * t.entropy


def old_drift(t):
    return t.old_logprobs * t.advantages + t.ref_logprobs


def places(t):
    """Distinct in a batch of up to 20 rollouts of up to 20 tokens."""
    return ((t.position * 7 + t.rollout * 11) % 401).to(t.weights.dtype) * (1 + t.step)


def mixture(t):
    return t.scores["mine"] * t.weights + t.polarity - t.batch_sum(t.advantages) * t.rollout_sum(t.ratio)


def second_choice(t):
    return t.log_ratio.abs() - 1e3 * t.selected.to(t.log_ratio.dtype)


RULES = {
    "threshold of a probability": rule(source="current", ratio=1.0, threshold=0.02, selected_scale=1.7),
    "threshold of an old probability": rule(ratio=0.7, side="high", threshold=0.004, rest_scale=0.0),
    "threshold of an entropy": rule(
        metric="entropy", source="current", side="high", ratio=1.0, threshold=2.2, rest_scale=0.0, scope="batch"
    ),
    "threshold of one polarity": rule(
        polarity=-1, metric="entropy", side="high", ratio=0.5, threshold=0.7, selected_scale=0.5
    ),
    "a threshold that nothing meets": rule(metric="entropy", ratio=1.0, threshold=-1.0, rest_scale=0.5),
    "quantile, high": rule(
        metric="entropy", source="current", side="high", quantile=0.8, scope="batch", rest_scale=0.0
    ),
    "quantile, low": rule(quantile=0.3, scope="batch", selected_scale=2.0, rest_scale=0.5),
    "quantile of one polarity": rule(polarity=1, source="current", quantile=0.5, scope="batch", rest_scale=0.3),
    "quantile 0": rule(quantile=0.0, scope="batch", selected_scale=2.0),
    "quantile 1": rule(quantile=1.0, side="high", scope="batch", selected_scale=2.0),
    "quantile and threshold": rule(
        metric="mine", quantile=0.3, threshold=0.2, side="high", scope="batch", selected_scale=2.0
    ),
    "score": rule(metric="mine", side="high", ratio=0.3, selected_scale=1.5),
    "score of the batch": rule(metric="mine", ratio=0.3, scope="batch", rounding="ceil", rest_scale=0.0),
    "threshold of a score": rule(metric="mine", side="high", ratio=1.0, threshold=0.3, selected_scale=1.5),
    "quantile of tied scores": rule(metric="tied", side="high", quantile=0.6, scope="batch", rest_scale=0.0),
    "quantile of infinite scores": rule(
        metric="infinite", side="high", quantile=0.6, scope="batch", selected_scale=2.0, rest_scale=0.5
    ),
    "quantile of scores below all": rule(metric="infinite", quantile=0.1, scope="batch", selected_scale=2.0),
    "quantile of scores with NaN": rule(metric="broken", side="high", quantile=0.9, scope="batch", selected_scale=2.0),
    "low quantile of scores with NaN": rule(metric="broken", quantile=0.5, scope="batch", rest_scale=0.0),
    "function of the rollout": rule(metric=surprise, source="current", side="high", ratio=0.3, selected_scale=2.0),
    "function of the reference": rule(metric=drift, source="current", ratio=0.4, scope="batch", rest_scale=0.0),
    "function of the old policy": rule(metric=old_drift, ratio=0.4, selected_scale=2.0),
    "function of places": rule(metric=places, ratio=0.4, scope="batch", selected_scale=2.0),
    "function and quantile": rule(metric=surprise, source="current", quantile=0.4, scope="batch", rest_scale=0.2),
    "function and threshold": rule(metric=surprise, source="current", side="high", ratio=1.0, threshold=0.0,
                                   selected_scale=1.3),
    "function of all": lambda m: m.Objective(shaping=(
        m.PolarityWeights(2.0, 0.5, 1.0),
        m.TokenRule(metric="mine", ratio=0.5, selected_scale=lambda step: 1.0 + 0.1 * step, rest_scale=0.7),
        m.TokenRule(metric=mixture, source="current", side="high", ratio=0.5, rest_scale=0.0, scope="batch"),
    ), entropy_coef=0.02),
    "function of what is selected": lambda m: m.Objective(shaping=(
        m.TokenRule(metric="mine", ratio=0.3, selected_scale=2.0),
        m.TokenRule(metric=second_choice, source="current", side="high", ratio=0.3, selected_scale=3.0),
    )),
}  # fmt: skip


def others(m):
    """Surrogates of one token, each with bounds that cut here."""
    return {
        "clip": m.Clip(0.1, 0.1, dual_clip=1.2), "cispo": m.Cispo(1.1, 0.1), "sapo": m.Sapo(2.0, 3.0),
        "reinforce": m.Reinforce(), "dppo-tv": m.Dppo("tv", 0.002, 0.002), "ratio": m.Ratio(0.7),
        "dppo-kl": m.Dppo("kl", 0.001, 0.001, ratio_cap=1.05), "nothing": m.Nothing(),
    }  # fmt: skip


def replacing(name, **fields):
    def build(m):
        first = m.TokenRule(metric="mine", ratio=0.5, scope="batch", replacement=others(m)[name], selected_scale=1.5)
        return m.Objective(shaping=(first,), kl_coef=0.05, **fields)

    return build


REPLACEMENTS = {
    **{name: replacing(name) for name in others(ak)},
    **{f"{name}, of the rollout": replacing(name, ratio_level="sequence") for name in ("clip", "ratio", "nothing")},
    **{f"{name}, by token": replacing(name, ratio_level="sequence-token") for name in ("clip", "sapo", "ratio")},
    "a later one wins": lambda m: m.Objective(surrogate=m.Reinforce(), shaping=(
        m.TokenRule(metric="mine", ratio=0.6, scope="batch", replacement=m.Ratio(0.7)),
        m.TokenRule(metric="mine", ratio=0.5, side="high", replacement=m.Clip(0.05, 0.05)),
        m.TokenRule(metric="tied", ratio=0.5, selected_scale=2.0),
        m.TokenRule(metric="mine", ratio=0.2, scope="batch", replacement=m.Nothing()),
    ), log_ratio_coef=0.3, entropy_coef=0.02),
    "of dropped tokens": lambda m: m.Objective(shaping=(
        m.TokenRule(metric="mine", ratio=0.5, scope="batch", replacement=m.Ratio(0.7)),
        m.TokenRule(metric="tied", ratio=0.5, side="high", rest_scale=0.0),
        m.PolarityWeights(1.0, 0.0, 1.0),
    ), normalize_over="selected", kl_coef=0.05),
    "on REINFORCE": lambda m: m.Objective(surrogate=m.Reinforce(), shaping=(
        m.TokenRule(metric=surprise, source="current", ratio=0.4, replacement=m.Dppo("tv", 0.002, 0.002)),
    )),
    "under ratio weights": lambda m: m.Objective(shaping=(
        m.TokenRule(metric="mine", ratio=0.4, scope="batch", replacement=m.Ratio(0.7)),
    ), ratio_weights=(m.Topr("geometric"),)),
}  # fmt: skip


def weighing(surrogate, *weights, **fields):
    """weights: functions of the module."""
    return lambda m: m.Objective(
        surrogate=others(m).get(surrogate, m.Clip()), ratio_weights=tuple(weight(m) for weight in weights), **fields
    )


def mask(m):
    return m.OffPolicyMask(0.01)


def vespo(m):
    return m.Vespo(0.5, 0.7, 1.5, 0.2)


def topr(level, *bounds):
    return lambda m: m.Topr(level, *bounds)


WEIGHTS = {
    "mask": weighing("clip", mask, kl_coef=0.05),
    "mask of none": weighing("clip", lambda m: m.OffPolicyMask(3.0)),
    "mask of the rollout's ratio": weighing("clip", mask, ratio_level="sequence"),
    "vespo on a clip": weighing("clip", vespo),
    "vespo on a penalty": weighing("ratio", vespo, log_ratio_coef=0.2),
    "vespo on cispo": weighing("cispo", vespo, entropy_coef=0.02),
    "topr": weighing("sapo", topr("sequence", 0.3, 0.9)),
    "topr, geometric": weighing("dppo-tv", topr("geometric", 0.9, 1.05)),
    "topr, token": weighing("reinforce", topr("token", 0.8, 1.2)),
    "topr of GSPO-token": weighing("clip", topr("token"), ratio_level="sequence-token"),
    "mask and topr": weighing("reinforce", mask, topr("sequence")),
    "vespo and mask": weighing("reinforce", vespo, mask),
    "mask and vespo": weighing("reinforce", mask, vespo),
    "topr and vespo": weighing("reinforce", topr("token", 0.5, 0.9), vespo),
    "vespo twice": weighing("reinforce", vespo, vespo),
    "mask on GMPO": lambda m: m.gmpo(ratio_weights=(mask(m),)),
    "mask on shaped advantages": lambda m: m.w_reinforce(0.0, 0.7, ratio_weights=(mask(m), vespo(m))),
}
LEVELS = {
    f"{name}, {level}": weighing(name, ratio_level=level, log_ratio_coef=0.2)
    for name in ("clip", "cispo", "sapo", "ratio") for level in ("sequence", "sequence-token")
} | {f"{name}, squared": weighing(name, log_ratio_coef=0.2) for name in others(ak)}  # fmt: skip
OBJECTIVES = {**RULES, **REPLACEMENTS, **WEIGHTS, **LEVELS}


def scored(batch):
    generator = torch.Generator().manual_seed(9)
    shape, hole = batch.targets.shape, batch.logits.isnan().any(-1)
    mine = torch.rand(shape, generator=generator, dtype=torch.float64).to(batch.logits.device)
    return {
        "mine": mine.masked_fill(hole, torch.nan), "tied": (mine * 4).floor().masked_fill(hole, torch.nan),
        "infinite": torch.where(mine < 0.15, -torch.inf, torch.where(mine > 0.4, torch.inf, mine)),
        "broken": torch.where((mine > 0.3) & (mine < 0.5), torch.nan, mine),
    }  # fmt: skip


def make_batch(name, variant, device):
    batch = random_batch(len(name), device=device, per_token=variant == "per-token")
    batch.keywords["scores"] = scored(batch)
    del batch.keywords["min_p_logprobs"]
    if variant == "unweighted":
        del batch.keywords["importance_weights"]
    return batch.packed() if variant == "packed" else batch


FEW = ("quantile, high", "function of all", "a later one wins", "dppo-kl", "vespo on a penalty", "topr")


@pytest.mark.parametrize("variant", ["padded", "packed", "per-token", "unweighted"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_composed(name, variant, backend, device):
    if INTERPRETED and (name not in FEW or variant != "padded"):
        pytest.skip("the interpreter is slow: a few, padded")
    batch, build = make_batch(name, variant, device), OBJECTIVES[name]
    output, gradient = run(ak, batch, build(ak), backend=backend, step=3)
    expected, truth = run(reference, batch, build(reference), double=True, step=3)
    assert_outputs(output, [gradient], expected, [truth])


@pytest.mark.parametrize("name", [*RULES, *REPLACEMENTS, *WEIGHTS])
def test_linear_routes(name, backend, device):
    """In chunks that hold neither the batch nor a rollout, and all at once; statistics of the active rows alone."""
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    build = OBJECTIVES[name]
    batch, parameters = linear_batch(len(name), device=device)
    batch.keywords["scores"] = scored(batch)
    del batch.keywords["min_p_logprobs"]
    expected, truths = run_reference(batch, parameters, build(reference), 37, step=3)
    truths = [1.5 * truth for truth in truths]
    small = {"max_chunk_bytes": 5 * 296}
    for options in ({}, small, {**small, "route": "recompute", "statistics": "active"}):
        output, found = run_ours(batch, parameters, build(ak), 37, backend=backend, step=3, **options)
        if "statistics" in options:
            output = expected._replace(loss=output.loss)
        assert_outputs(output, found, expected, truths, 1e-11)


# On-policy a rule of source "old" has no policy to read in, either.
ON_POLICY = [*(name for name in RULES if name != "function of the old policy"), "a later one wins", "vespo on a clip",
             "topr, token", "mask"]  # fmt: skip


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy(name, backend, device):
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    batch, build = make_batch(name, "per-token", device), OBJECTIVES[name]
    del batch.keywords["old_logprobs"], batch.keywords["old_entropy"]
    output, gradient = run(ak, batch, build(ak), backend=backend)
    expected, truth = run(reference, batch, build(reference), double=True)
    assert_outputs(output, [gradient], expected, [truth])


@pytest.mark.parametrize("name", [*RULES, *REPLACEMENTS])
def test_from_log_probs(name, backend, device):
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    batch, build = make_batch(name, "padded", device), OBJECTIVES[name]
    batch.keywords["mask"] = batch.keywords["mask"] & (batch.targets != -100)  # which the call is not told
    logits = batch.logits.clone().requires_grad_()
    stats = ak.token_logprobs(logits.nan_to_num(), batch.targets, backend=backend)
    output = ak.logprob_policy_loss(
        stats.logprobs, batch.advantages, objective=build(ak), entropy=stats.entropy, backend=backend, step=3,
        **batch.keywords,
    )  # fmt: skip
    output.loss.backward()
    expected, truth = run(reference, batch, build(reference), double=True, step=3)
    hole = batch.logits.isnan().any(-1)
    output = output._replace(
        logprobs=output.logprobs.masked_fill(hole, 0.0), entropy=output.entropy.masked_fill(hole, 0.0)
    )
    assert_outputs(output, [logits.grad], expected, [truth])


@pytest.mark.parametrize("read", ["logprobs", "entropy", "log_ratio", "ratio"])
def test_a_rule_of_the_old_policy_may_not_read_the_current_one(read, backend, device):
    def metric(t):
        return getattr(t, read)

    batch = make_batch("", "padded", device)
    with pytest.raises(ValueError, match="entropy" if read == "entropy" else "logprobs"):
        run(ak, batch, ak.Objective(shaping=(ak.TokenRule(metric=metric),)), backend=backend)


def test_a_score_that_is_not_given_is_named(backend, device):
    batch = make_batch("", "padded", device)
    objective = ak.Objective(shaping=(ak.TokenRule(metric="yours"),))
    with pytest.raises(ValueError, match="yours"):
        run(ak, batch, objective, backend=backend)
    with pytest.raises(ValueError, match="mine"):
        run(ak, batch, objective, backend=backend, scores={"yours": torch.rand(5, 11), "mine": torch.rand(4)})


def test_a_dppo_replacement_needs_the_ratio_of_the_token():
    rule = ak.TokenRule(replacement=ak.Dppo())
    for level in ("sequence", "sequence-token"):
        with pytest.raises(ValueError, match="ratio_level"):
            ak.Objective(shaping=(rule,), ratio_level=level)


def test_parts_that_do_not_go_together():
    """Refused when the objective is made, with the argument's name."""
    replacing = ak.TokenRule(replacement=ak.Reinforce())
    for call, word in (
        (lambda: ak.Objective(surrogate=ak.Gmpo()), "ratio_level"),
        (lambda: ak.Objective(surrogate=ak.Dppo(), ratio_level="sequence"), "ratio_level"),
        (lambda: ak.Objective(shaping=(replacing,), surrogate=ak.Gmpo(), ratio_level="sequence"), "replacement"),
        (lambda: ak.Objective(shaping=(replacing,), low_probability=ak.MinPRegularizer()), "low_probability"),
        (lambda: ak.gspo_token(kl_estimator="k3-ratio"), "k3-ratio"),
        (lambda: ak.TokenRule(quantile=0.5), "scope"),
        (lambda: ak.TokenRule(quantile=1.5, scope="batch"), "quantile"),
        (lambda: ak.TokenRule(threshold=float("nan")), "threshold"),
        (lambda: ak.Objective(log_ratio_coef=-1.0), "log_ratio_coef"),
        (lambda: ak.Topr("mean"), "level"),
        (lambda: ak.dppo("js"), "divergence"),
        (lambda: ak.kl_cov(penalty=-1.0), "penalty"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            call()
    for call, word in (
        (lambda: ak.TokenRule(replacement=ak.Gmpo()), "replacement"),
        (lambda: ak.TokenRule(metric=3), "metric"),
        (lambda: ak.Objective(ratio_weights=(0.5,)), "ratio_weights"),
        (lambda: ak.vespo(epsilon_low=0.1), "epsilon_low"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=word):
            call()
