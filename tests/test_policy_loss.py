"""policy_loss against the reference in fp64: every preset, spelling, dtype and option."""

from __future__ import annotations

import pytest
import torch
from batches import DTYPES, INTERPRETED, PRESETS, keywords_for, largest_error, preset, random_batch, run, unlikely

import a3po_kernels
import reference
from a3po_kernels.ops.tokens import normalizer

# fp64: both compute in fp64, only the order of sums differs. Otherwise statistics are fp32 from the given logits; the
# reference gets the same logits in fp64. log-probs of about 5 nats carry a rounding of 3e-7, and sums of 40 such terms
# of weight below 3 stay within 1e-5. A gradient is rounded once more, to the logits' dtype, at magnitudes below 1.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
OPTIONS = {
    "plain": {},
    "transform": {"temperature": 0.7, "softcap": 4.0, "logit_scale": 1.3},
    "regularised": {"objective": {"kl_coef": 0.07, "entropy_coef": 0.02}},
}


def compare(name, batch, dtype, backend, overrides=None, **keywords):
    ours, theirs = preset(name, **(overrides or {}))
    batch.keywords = keywords_for(name, batch.keywords)
    output, gradient = run(a3po_kernels, batch, ours, backend=backend, **keywords)
    expected, expected_gradient = run(reference, batch, theirs, double=True, **keywords)
    tolerance = LOSS_TOLERANCE[dtype]
    assert largest_error(output.loss, expected.loss) <= tolerance
    assert largest_error(output.logprobs, expected.logprobs) <= tolerance
    assert largest_error(output.entropy, expected.entropy) <= tolerance
    assert largest_error(output.weights, expected.weights) <= tolerance
    assert largest_error(gradient, expected_gradient) <= GRADIENT_TOLERANCE[dtype]
    assert set(output.metrics) == set(expected.metrics)
    for key, value in expected.metrics.items():
        value = torch.as_tensor(value)
        assert largest_error(output.metrics[key], value) <= tolerance * max(1.0, abs(value.item())), key
    assert output.logprobs.shape == batch.targets.shape
    assert not output.logprobs.requires_grad and not output.entropy.requires_grad and not output.weights.requires_grad
    return output, gradient


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spelling", ["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, dtype, spelling, options, backend, device):
    if INTERPRETED and (dtype is torch.float16 or (dtype is not torch.float32 and options != "regularised")):
        pytest.skip("the interpreter is slow: fp32 in full, fp64 and bf16 in part")
    keywords = dict(OPTIONS[options])
    overrides = keywords.pop("objective", {})
    batch = random_batch(PRESETS.index(name), dtype=dtype, device=device)
    batch = batch.packed() if spelling == "packed" else batch
    if name == "dr_grpo" and spelling == "packed":
        keywords["max_length"] = 11
    compare(name, batch, dtype, backend, overrides, step=30, **keywords)


@pytest.mark.parametrize("aggregation", a3po_kernels.objectives.AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 12.5, "tensor"])
@pytest.mark.parametrize("name", ["a3po", "fork_tokens", "gspo"])
def test_aggregations(name, aggregation, denominator, backend, device):
    batch = random_batch(7, dtype=torch.float32, device=device)
    denominator = torch.tensor(31.0, device=device) if denominator == "tensor" else denominator
    compare(name, batch, torch.float32, backend, {"aggregation": aggregation}, denominator=denominator)


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("grpo", {"dual_clip": 1.1}),
        ("grpo", {"delta": 1.15}),
        ("dapo", {"epsilon_low": 0.05, "epsilon_high": 0.02, "kl_coef": 0.1, "kl_estimator": "k1"}),
        ("dapo", {"kl_coef": 0.1, "kl_estimator": "k2"}),
        ("dapo", {"kl_coef": 0.1, "kl_estimator": "k3-ratio"}),
        *(("grpo", {"kl_coef": 0.1, "kl_estimator": x, "kl_clamp": 0.15}) for x in ("k1", "k2", "k3", "k3-ratio")),
        ("gspo", {"epsilon_low": 0.01, "epsilon_high": 0.01, "entropy_coef": -0.1}),
        ("cispo", {"epsilon_high": 1.05, "epsilon_low": 0.02}),
        ("sapo", {"tau_positive": 3.0, "tau_negative": 5.0}),
        ("w_reinforce", {"positive_weight": 0.0, "negative_weight": 0.7}),
        ("fork_tokens", {"ratio": 0.5, "rounding": "ceil", "normalize_over": "all", "entropy_coef": 0.3}),
        ("lp_reg", {"quantile": 0.9, "beta": 0.3}),
        ("lp_reg", {"quantile": 0.9, "epsilon_low": 0.05, "epsilon_high": 0.05, "dual_clip": 1.1}),
        ("a3po", {"rho": 3.0, "alpha": 0.1, "ratio": 0.34}),
        ("a3po", {"metric": "entropy"}),
        ("a3po", {"source": "current"}),
        ("a3po", {"metric": "entropy", "source": "current"}),
    ],
)
def test_overrides(name, overrides, backend, device):
    batch = random_batch(11, rollouts=13, dtype=torch.float64, device=device)
    compare(name, batch, torch.float64, backend, overrides, step=5)


@pytest.mark.parametrize("name", ["dapo", "gspo", "sapo", "cispo", "lp_reg"])
def test_extreme_ratios(name, backend, device):
    """Log ratios beyond the clamp of 20 have no gradient; Lp-Reg's penalty is clamped at 10, and has none there."""
    batch = unlikely(random_batch(37, dtype=torch.float64, device=device), 40.0)
    batch.keywords["old_logprobs"][:, ::2] += 30.0
    batch.keywords["old_logprobs"][1] -= 50.0
    batch.keywords["min_p_logprobs"] += 4.0
    batch.advantages = batch.advantages / 1e6  # e^20 is 5e8: keeps the sums within the tolerance
    del batch.keywords["importance_weights"]
    overrides = {"quantile": 1.0} if name == "lp_reg" else {}
    _, gradient = compare(name, batch, torch.float64, backend, overrides)
    assert gradient.isfinite().all()


def test_k3_overflows_and_a_clamp_holds_it(backend, device):
    """Of log ratios of 100 to the reference fp32 makes an infinite k3; kl_clamp bounds it, and counts the tokens."""
    batch = unlikely(random_batch(5, dtype=torch.float32, device=device), 110.0)
    batch.keywords["ref_logprobs"] = batch.keywords["old_logprobs"].float()
    batch.keywords["ref_logprobs"][0, ::2] += 100.0
    keywords = {"old_logprobs": None, "min_p_logprobs": None, "backend": backend}
    free, _ = run(a3po_kernels, batch, a3po_kernels.grpo(kl_coef=0.1), **keywords)
    assert free.loss.isinf() and free.metrics["kl_clamped_fraction"] == 0
    ours, theirs = preset("grpo", kl_coef=1e-6, kl_clamp=20.0)
    held, gradient = run(a3po_kernels, batch, ours, **keywords)
    del keywords["backend"]
    expected, truth = run(reference, batch, theirs, double=True, **keywords)
    assert 0 < expected.metrics["kl_clamped_fraction"] < 1
    for name in ("kl", "kl_clamped_fraction"):
        torch.testing.assert_close(held.metrics[name].cpu().double(), expected.metrics[name], rtol=1e-6, atol=0)
    torch.testing.assert_close(held.loss.cpu().double(), expected.loss, rtol=1e-5, atol=1e-6)
    assert largest_error(gradient, truth) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3.0, 0.0])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_divisors_that_are_none(aggregation, value, backend, device):
    """Where values are not read a divisor that cannot be gives NaN, never a quiet 0; 0 itself is empty and gives 0."""
    counts = torch.tensor([3.0, 0.0, 2.0], device=device)
    scale = normalizer(counts, aggregation, torch.tensor(value, device=device), 0.0, backend)
    has_tokens = scale[counts > 0]
    assert not has_tokens.any() if value == 0.0 else has_tokens.isnan().all()


@pytest.mark.parametrize("entry", ["logits", "linear"])
def test_temperature_of_rows_that_are_no_token(entry, backend, device):
    """What a row without a token holds never matters, its temperature included."""
    batch = random_batch(8, dtype=torch.float64, device=device)
    tokens = batch.keywords["mask"] & (batch.targets != -100)
    keywords = {"old_logprobs": batch.keywords["old_logprobs"], "mask": batch.keywords["mask"]}

    def gradient(other):
        temperature = torch.full(tokens.shape, 0.8, dtype=torch.float64, device=device).masked_fill(~tokens, other)
        z = batch.logits.clone().requires_grad_()
        options = {"objective": a3po_kernels.dapo(entropy_coef=0.1), "temperature": temperature, "backend": backend}
        if entry == "logits":
            out = a3po_kernels.policy_loss(z, batch.targets, batch.advantages, **options, **keywords)
        else:
            weight = torch.eye(z.shape[-1], dtype=z.dtype, device=device)
            out = a3po_kernels.linear_policy_loss(z, weight, batch.targets, batch.advantages, **options, **keywords)
        out.loss.backward()
        return out.loss.detach(), z.grad

    expected = gradient(0.8)
    for other in (0.0, float("nan"), -1.0):
        for found, truth in zip(gradient(other), expected, strict=True):
            assert torch.equal(found, truth)


@pytest.mark.parametrize("quantile, replaced", [(0.19, 0), (0.2, 2), (0.1, 0)])
def test_lp_reg_needs_two_candidates(quantile, replaced, backend, device):
    """Of 10 tokens of negative advantage floor(10 q) are candidates, but one alone is none."""
    logits = torch.linspace(-0.5, 0.5, 10, device=device)[None, :, None] * torch.tensor([1.0, -1.0], device=device)
    targets = torch.zeros(1, 10, dtype=torch.long, device=device)
    proxy = torch.zeros(1, 10, device=device)  # log 1: above every log-prob

    def gradient(objective, **keywords):
        z = logits.clone().requires_grad_()
        a3po_kernels.policy_loss(
            z, targets, -torch.ones(1, device=device), objective=objective, backend=backend, **keywords
        ).loss.backward()
        return z.grad

    base = gradient(a3po_kernels.dapo(epsilon_low=1.0, epsilon_high=9.0))
    ours = gradient(a3po_kernels.lp_reg(quantile=quantile), min_p_logprobs=proxy)
    assert (base != ours).any(-1).sum() == replaced


def test_per_rollout_wins_where_both_fit(backend, device):
    """Three rollouts of 0, 2 and 1 tokens: three advantages are the rollouts', not the tokens'."""
    batch = random_batch(41, rollouts=3, length=1, dtype=torch.float64, device=device)
    batch.logits, batch.targets = torch.randn(3, 7, device=device).double(), torch.tensor([1, 2, 3], device=device)
    batch.advantages = torch.tensor([5.0, 1.0, -2.0], device=device).double()
    batch.keywords = {"cu_seqlens": torch.tensor([0, 0, 2, 3], device=device)}
    output, _ = compare("dapo", batch, torch.float64, backend)
    assert abs(output.loss.item()) < 1e-12, "-(1 + 1 - 2) / 3"


@pytest.mark.parametrize("name", ["a3po", "w_reinforce", "sapo", "lp_reg", "gspo"])
@pytest.mark.parametrize("spelling", ["padded", "packed"])
def test_per_token_advantages(name, spelling, backend, device):
    batch = random_batch(3, dtype=torch.float64, device=device, per_token=True)
    batch = batch.packed() if spelling == "packed" else batch
    compare(name, batch, torch.float64, backend)


def test_polarity_overrides_the_sign(backend, device):
    batch = random_batch(5, dtype=torch.float64, device=device)
    polarity = torch.tensor([-1, 1, 1, 0, -1], device=device)
    for name in ("a3po", "psr", "nsr"):
        compare(name, batch, torch.float64, backend, polarity=polarity)
    compare("a3po", batch, torch.float64, backend, polarity=torch.randn(5, 11, device=device).sign())


@pytest.mark.parametrize("name", ["dapo", "a3po", "gspo", "lp_reg", "fork_tokens"])
def test_on_policy(name, backend, device):
    batch = random_batch(13, dtype=torch.float64, device=device)
    for key in ("old_logprobs", "old_entropy", "min_p_logprobs"):
        del batch.keywords[key]
    output, _ = compare(name, batch, torch.float64, backend)
    assert output.metrics["ratio_mean"].item() == 1.0 and output.metrics["ratio_max"].item() == 1.0


def test_reinforce_and_composed_rules(backend, device):
    """A composition that no preset makes: polarity weights, then a keep rule, then a boost, on REINFORCE with KL."""

    def composed(module):
        return module.Objective(
            shaping=(
                module.PolarityWeights(0.5, 1.5, 0.25),
                module.TokenRule(None, "entropy", "current", "high", 0.6, 1.0, 0.0, scope="batch"),
                module.TokenRule(-1, "probability", "old", "high", 0.5, module.CosineDecay(3.0, 40), 0.9),
            ),
            surrogate=module.Reinforce(),
            kl_coef=0.1,
            normalize_over="selected",
            aggregation="seq-mean-token-mean",
        )

    batch = random_batch(17, dtype=torch.float64, device=device)
    del batch.keywords["min_p_logprobs"]
    output, gradient = run(a3po_kernels, batch, composed(a3po_kernels), backend=backend, step=10)
    expected, expected_gradient = run(reference, batch, composed(reference), double=True, step=10)
    assert largest_error(output.loss, expected.loss) < 1e-12
    assert largest_error(output.weights, expected.weights) < 1e-12
    assert largest_error(gradient, expected_gradient) < 1e-12


def test_spellings_agree_to_the_bit(backend, device):
    """Padded and packed give the same per-token outputs to the bit, and the same loss to rounding."""
    batch = random_batch(19, dtype=torch.float32, device=device)
    objective = a3po_kernels.a3po()
    del batch.keywords["min_p_logprobs"]
    padded, _ = run(a3po_kernels, batch, objective, backend=backend)
    packed, _ = run(a3po_kernels, batch.packed(), objective, backend=backend)
    rows = torch.cat([torch.arange(n) + i * 11 for i, n in enumerate(batch.lengths)]).to(device)
    for name in ("logprobs", "entropy", "weights"):
        assert torch.equal(getattr(padded, name).flatten()[rows], getattr(packed, name)), name
    assert largest_error(padded.loss, packed.loss) < 1e-6


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_padded(shape, backend, device):
    logits = torch.zeros(*shape, 7, device=device, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.long, device=device)
    output = a3po_kernels.policy_loss(
        logits, targets, torch.zeros(shape[0], device=device), objective=a3po_kernels.a3po(), backend=backend
    )
    output.loss.backward()
    assert output.loss.item() == 0.0 and logits.grad.shape == logits.shape
    assert output.metrics["token_count"].item() == 0.0


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_to_learn(name, backend, device):
    """All tokens masked, or all rollouts empty: loss 0 and gradient 0, never NaN."""
    objective, _ = preset(name)
    logits = torch.randn(4, 9, device=device, requires_grad=True)
    targets = torch.full((4,), -100, device=device)
    ends = torch.tensor([0, 0, 4, 4], device=device)
    output = a3po_kernels.policy_loss(
        logits,
        targets,
        torch.ones(3, device=device),
        objective=objective,
        cu_seqlens=ends,
        max_length=4,
        backend=backend,
    )
    output.loss.backward()
    assert output.loss.item() == 0.0 and not logits.grad.any()
    assert all(value.isfinite() for value in output.metrics.values())


@pytest.mark.parametrize("name", ["dapo", "gspo", "cispo", "sapo", "lp_reg", "dppo", "gmpo", "vespo", "kl_cov"])
@pytest.mark.parametrize("what", ["old_logprobs", "advantages"])
def test_nan_is_in_the_gradient_too(name, what, backend, device):
    """A guard on gradient norms sees what a loss of NaN says: no row's gradient is 0 for being NaN."""
    if INTERPRETED and what == "advantages":
        pytest.skip("the interpreter is slow")
    batch = random_batch(17, rollouts=3, dtype=torch.float32, device=device, per_token=True)
    batch.advantages = batch.advantages.masked_fill(batch.logits.isnan().any(-1), 0.0)
    values = batch.advantages if what == "advantages" else batch.keywords[what]
    values[0, 1] = torch.nan
    assert not batch.logits[0, 1].isnan().any()
    objective = getattr(a3po_kernels, name)(**({"quantile": 0.3} if name == "lp_reg" else {}))
    keywords = {} if name == "lp_reg" else {"min_p_logprobs": None}
    out, gradient = run(a3po_kernels, batch, objective, backend=backend, **keywords)
    assert out.loss.isnan() and gradient[0, 1].isnan().all()


def test_zero_advantage_counts(backend, device):
    """A rollout of zero advantage keeps its place in the denominator and its KL and entropy terms."""
    batch = random_batch(23, rollouts=3, dtype=torch.float64, device=device)
    batch.advantages = torch.tensor([1.0, 0.0, -1.0], device=device).double()
    _, gradient = compare("dapo", batch, torch.float64, backend, {"kl_coef": 0.1})
    assert gradient[1].abs().sum() > 0
    _, gradient = compare("dapo", batch, torch.float64, backend)
    assert not gradient[1].any()


def test_broken_row_is_not_hidden(backend, device):
    """NaN in the logits of a token reaches the loss; the same row masked does not."""
    batch = random_batch(29, dtype=torch.float32, device=device)
    del batch.keywords["min_p_logprobs"]
    batch.keywords["mask"][0, 0], batch.targets[0, 0] = True, 1
    for key in ("old_logprobs", "ref_logprobs", "importance_weights", "old_entropy"):
        batch.keywords[key][0, 0] = -0.5 if "logprobs" in key else 0.5
    batch.logits[0, 0] = torch.nan
    output, _ = run(a3po_kernels, batch, a3po_kernels.dapo(), backend=backend)
    assert output.loss.isnan()
    batch.keywords["mask"][0, 0] = False
    output, gradient = run(a3po_kernels, batch, a3po_kernels.dapo(), backend=backend)
    assert output.loss.isfinite() and gradient.isfinite().all()


def test_rows_without_a_gradient_are_not_read(backend, device):
    """NaN logits of a rollout that shaping drops reach neither the loss nor the gradient, which is exactly 0 there."""
    batch = random_batch(43, rollouts=3, dtype=torch.float32, device=device)
    del batch.keywords["min_p_logprobs"]
    batch.logits[1] = torch.nan  # the rollout of negative advantage
    output, gradient = run(a3po_kernels, batch, a3po_kernels.psr(), backend=backend)
    assert output.loss.isfinite() and gradient[0].abs().sum() > 0 and not gradient[1].any()


def test_module_and_step_tensor(backend, device):
    """PolicyLoss is policy_loss; a step on the device gives the same weights as a number."""
    batch = random_batch(31, dtype=torch.float32, device=device)
    del batch.keywords["min_p_logprobs"]
    head = a3po_kernels.PolicyLoss(a3po_kernels.a3po(alpha=0.01), temperature=0.8, backend=backend)
    one = head(batch.logits, batch.targets, batch.advantages, step=40, **batch.keywords)
    two = head(batch.logits, batch.targets, batch.advantages, step=torch.tensor(40, device=device), **batch.keywords)
    assert torch.equal(one.loss, two.loss) and torch.equal(one.weights, two.weights)
    assert abs(one.metrics["weight"].item() - 1.6) < 1e-6
