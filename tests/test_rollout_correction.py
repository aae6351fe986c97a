"""rollout_correction: by hand, beside the reference in fp64 at every level and mode, and where there is nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from host_reads import NoHostReads

import reference
from a3po_kernels import dapo, grpo, logprob_policy_loss, rollout_correction

LEVELS, MODES = ("token", "sequence", "geometric"), ("truncate", "mask", "icepop")
CHOICES = [(level, mode, "k1") for level in LEVELS for mode in MODES]
CHOICES += [(level, "mask", estimator) for level in (*LEVELS, "max") for estimator in ("k2", "k3")]
# Sums of under a hundred fp64 numbers below 1e3 in another order; chi2 of e^40 loses 16 digits like everything.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def batch(seed=0, rollouts=6, length=9, scale=0.4, dtype=torch.float64):
    """(trainer, rollout, mask, lengths), padded; NaN where no token is; one rollout has no row, one no token."""
    generator = torch.Generator().manual_seed(seed)
    trainer = -3 * torch.rand(rollouts, length, generator=generator, dtype=torch.float64)
    rollout = trainer + scale * torch.randn(rollouts, length, generator=generator, dtype=torch.float64)
    trainer, rollout = (x - rollout.clamp(min=0.0) for x in (trainer, rollout))
    lengths = torch.randint(1, length + 1, (rollouts,), generator=generator)
    lengths[0], lengths[1] = length, 0
    mask = (torch.arange(length) < lengths[:, None]) & (torch.rand(rollouts, length, generator=generator) > 0.15)
    mask[2] = False
    trainer, rollout = trainer.masked_fill(~mask, math.nan), rollout.masked_fill(~mask, math.nan)
    return trainer.to(dtype), rollout.to(dtype), mask, lengths.tolist()


def logprobs_of(x):
    """(trainer, rollout), log-probs whose difference is exactly x."""
    return x.clamp(max=0.0), -x.clamp(min=0.0)


def pack(values, lengths):
    return torch.cat([row[:n] for row, n in zip(values, lengths, strict=True)])


def ends(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def numbers(metrics):
    return {name: value.item() for name, value in metrics.items()}


def choice(level, mode, estimator, low, high):
    """The options of one of CHOICES: with k2 and k3 the two ratios' larger estimate of a token is the bound.

    Of three times the log-ratio where a whole rollout must stay below it: else hardly one does.
    """
    options = {"level": level, "mode": mode, "estimator": estimator, "low": low, "high": high}
    if estimator == "k1":
        return options
    x = max(abs(math.log(bound)) for bound in (low, high) if bound is not None)
    x *= 3 if level in ("sequence", "max") else 1
    return options | {"low": None, "high": x * x / 2 if estimator == "k2" else math.expm1(x) - x}


def test_by_hand():
    """Ratios 1/2, 2, 4 and 1/8, 1: products 4 and 1/8, geometric means 4^(1/3) and 8^(-1/2)."""
    trainer, rollout = logprobs_of(torch.tensor([[0.5, 2.0, 4.0], [0.125, 1.0, 7.0]]).double().log())
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])

    def weights(**options):
        found = rollout_correction(trainer, rollout, mask, **options)
        return found.weights.tolist(), found.keep.int().tolist()

    kept = [[1, 1, 1], [1, 1, 0]]
    cases = [
        ({"high": 2.0}, [[0.5, 2, 2], [0.125, 1, 0]], kept),
        ({"low": 0.5, "high": 3.0}, [[0.5, 2, 3], [0.5, 1, 0]], kept),
        ({"mode": "icepop", "low": 0.5, "high": 2.0}, [[0.5, 2, 0], [0, 1, 0]], kept),
        ({"mode": "mask", "low": 0.5, "high": 2.0}, [[0.5, 2, 0], [0, 1, 0]], [[1, 1, 0], [0, 1, 0]]),
        ({"level": "sequence", "high": 3.0}, [[3, 3, 3], [0.125, 0.125, 0]], kept),
        ({"level": "sequence", "mode": "mask", "low": 0.2, "high": 9.0}, [[4, 4, 4], [0, 0, 0]], [[1, 1, 1], [0] * 3]),
        ({"level": "sequence", "mode": "icepop", "high": 3.0}, [[0, 0, 0], [0.125, 0.125, 0]], kept),
        ({"level": "geometric", "high": 1.5}, [[1.5] * 3, [8**-0.5, 8**-0.5, 0]], kept),
        ({"veto": 0.2, "high": 2.0}, [[0.5, 2, 2], [0, 0, 0]], [[1, 1, 1], [0] * 3]),
        ({"veto": 0.125, "high": 2.0}, [[0.5, 2, 2], [0.125, 1, 0]], kept),  # not below it
        ({"high": None, "low": 1.0}, [[1, 2, 4], [1, 1, 0]], kept),
        ({"batch_normalize": True, "high": 4.0}, [[2.5 / 7.625, 10 / 7.625, 20 / 7.625], [5 / 61, 5 / 7.625, 0]], kept),
        # Over rollouts: (4 + 1/8) / 2.
        (
            {"batch_normalize": True, "level": "sequence", "high": 5.0},
            [[4 / 2.0625] * 3, [0.125 / 2.0625, 0.125 / 2.0625, 0]], kept,
        ),
    ]  # fmt: skip
    for options, expected, expected_keep in cases:
        found, keep = weights(**options)
        for got, want in zip(found, expected, strict=True):
            assert got == pytest.approx(want, rel=1e-12), options
        assert keep == expected_keep, options
    metrics = numbers(rollout_correction(trainer, rollout, mask, mode="mask", low=0.5, high=2.0, veto=0.2).metrics)
    log = math.log(2)
    hand = {
        "kept": 2 / 5, "rollouts_kept": 0.0, "vetoed": 0.5, "eff_sample_size": 2.5**2 / (5 * 4.25), "weight_mean": 0.5,
        "weight_max": 2.0, "weight_min": 0.0, "weight_rollout_mean": 2.5 / 6, "ratio_mean": 7.625 / 5, "ratio_max": 4.0,
        "weight_std": math.sqrt(4.25 / 5 - 0.25), "ratio_min": 0.125, "fraction_high": 0.2, "fraction_low": 0.2,
        "kl": log / 5, "logp_difference_mean": 7 * log / 5, "logp_difference_max": 3 * log,
        "k3_kl": (7.625 - 5 + log) / 5, "chi2_token": (0.25 + 4 + 16 + 1 / 64 + 1) / 5 - 1,
        "chi2_seq": (16 + 1 / 64) / 2 - 1, "batch_norm_factor": 1.0,
        "ratio_std": math.sqrt((0.25 + 4 + 16 + 1 / 64 + 1) / 5 - 1.525**2), "estimate_mean": log / 5,
        "estimate_max": 3 * log,
    }  # fmt: skip
    assert metrics == pytest.approx(hand, rel=1e-12)


def test_estimators_by_hand():
    """Log-ratios 1, -2 and 3, 0: k2 is 1/2, 2 and 9/2, 0; k3 is e - 2, e^-2 + 1 and e^3 - 4, 0. Inclusive bounds."""
    x, e = torch.tensor([[1.0, -2.0], [3.0, 0.0]], dtype=torch.float64), math.e
    trainer, rollout = logprobs_of(x)
    k2, k3 = [[0.5, 2.0], [4.5, 0.0]], [[e - 2, e**-2 + 1], [e**3 - 4, 0.0]]
    for estimator, each in (("k2", k2), ("k3", k3)):
        for level, unit in (
            ("token", each), ("sequence", [[sum(row)] * 2 for row in each]), ("max", [[max(row)] * 2 for row in each]),
            ("geometric", [[sum(row) / 2] * 2 for row in each]),
        ):  # fmt: skip
            for high in (0.5, 0.75, 2.0, 2.3, 2.6, 5.0, 17.0):
                found = rollout_correction(
                    trainer, rollout, level=level, mode="mask", estimator=estimator, high=high, veto=1e-9
                )
                keep = [[value <= high for value in row] for row in unit]
                assert found.keep.tolist() == keep, (estimator, level, high)
                ratio = {"sequence": x.sum(1, True), "geometric": x.mean(1, True)}.get(level, x)
                expected = ratio.exp().expand(2, 2) * torch.tensor(keep)
                assert torch.allclose(found.weights, expected, rtol=1e-14, atol=0)
                flat = [value for row in unit for value in row]
                shares = {
                    "estimate_mean": sum(flat) / 4, "estimate_max": max(flat), "fraction_low": 0.0,
                    "fraction_high": sum(value > high for value in flat) / 4,
                }  # fmt: skip
                assert {name: found.metrics[name].item() for name in shares} == pytest.approx(shares, rel=1e-14)


@pytest.mark.parametrize("scale", [0.4, 15.0])
@pytest.mark.parametrize("level, mode, estimator", CHOICES)
def test_reference(level, mode, estimator, scale):
    """Every bound, veto and normalisation; with the scale of 15, exponents beyond the clamp."""
    rejected = rollouts = 0
    bounds = [(None, 1.3), (0.8, None), (0.7, 1.4), (0.999, 1.001)]
    for seed, (low, high), veto, normal in itertools.product(range(2), bounds, (None, 0.5), (False, True)):
        trainer, rollout, mask, _ = batch(seed, scale=scale)
        options = choice(level, mode, estimator, low, high) | {"veto": veto, "batch_normalize": normal}
        got = rollout_correction(trainer, rollout, mask, **options)
        weights, keep, metrics = reference.rollout_correction(trainer, rollout, mask, **options)
        assert torch.allclose(got.weights, weights, **CLOSE) and torch.equal(got.keep, keep), options
        assert got.metrics.keys() == metrics.keys()
        assert numbers(got.metrics) == pytest.approx(metrics, rel=1e-11, abs=1e-12), options
        assert not got.weights[~keep].any() and not got.weights.requires_grad
        rejected += int((mask & ~keep).sum())
        rollouts = max(rollouts, int(keep.any(1).sum()))
    assert rejected, "nothing was rejected: the batch tests too little"
    assert rollouts > 1 or scale > 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", (*LEVELS, "max"))
def test_packed_is_padded(level, dtype):
    for chosen in CHOICES:
        if chosen[0] != level:
            continue
        trainer, rollout, mask, lengths = batch(3, dtype=dtype)
        options = choice(*chosen, 0.7, 1.3) | {"veto": 0.3, "batch_normalize": True}
        padded = rollout_correction(trainer, rollout, mask.int(), **options)
        packed = rollout_correction(
            pack(trainer, lengths), pack(rollout, lengths), pack(mask, lengths), cu_seqlens=ends(lengths), **options
        )
        assert padded.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert padded.weights.shape == mask.shape and padded.keep.dtype == torch.bool
        assert torch.equal(pack(padded.weights, lengths), packed.weights)
        assert torch.equal(pack(padded.keep, lengths), packed.keep)
        assert numbers(padded.metrics) == pytest.approx(numbers(packed.metrics), rel=1e-12)
        again = rollout_correction(trainer, rollout, mask, **options)
        assert torch.equal(again.weights, padded.weights) and numbers(again.metrics) == numbers(padded.metrics)


@pytest.mark.parametrize("level", LEVELS)
def test_strides_and_gradients(level):
    """Transposed, expanded and differentiable inputs give the same bits, and no gradient."""
    trainer, rollout, mask, _ = batch(5, dtype=torch.float32)
    plain = rollout_correction(trainer, rollout, mask, level=level)
    odd = rollout_correction(
        trainer.t().contiguous().t().requires_grad_(), rollout.repeat_interleave(2, 1)[:, ::2], mask, level=level
    )
    assert torch.equal(plain.weights, odd.weights) and not odd.weights.requires_grad
    assert not any(value.requires_grad or value.ndim for value in odd.metrics.values())


@pytest.mark.parametrize("level, mode, estimator", CHOICES)
def test_nothing(level, mode, estimator):
    """No rollout, no row, no token: empty or zero weights and metrics of 0."""
    options = choice(level, mode, estimator, 0.5, 2.0) | {"veto": 0.1, "batch_normalize": True}
    nan = torch.full((2, 3), math.nan)
    cases = [
        (torch.zeros(0), torch.zeros(0), None, torch.tensor([0])),
        (torch.zeros(0), torch.zeros(0), None, torch.tensor([0, 0, 0])),
        (torch.zeros(0, 4), torch.zeros(0, 4), None, None),
        (torch.zeros(3, 0), torch.zeros(3, 0), None, None),
        (nan, nan, torch.zeros(2, 3), None),
    ]
    for trainer, rollout, mask, cu_seqlens in cases:
        weights, keep, metrics = rollout_correction(trainer, rollout, mask, cu_seqlens=cu_seqlens, **options)
        assert weights.shape == keep.shape == trainer.shape and not weights.any() and not keep.any()
        assert numbers(metrics) == {name: float(name == "batch_norm_factor") for name in metrics}


@pytest.mark.parametrize("level, mode, estimator", CHOICES)
def test_nan_at_a_token_is_not_quiet(level, mode, estimator):
    """Its weight, or its rollout's, is NaN, whatever bound or veto would reject its rollout; the mean and kl too."""
    trainer, rollout, mask, _ = batch(7)
    mask[0] = True
    trainer[0], rollout[0] = -1.0, -1.0
    trainer[0, 1] = -50.0  # below the veto
    for broken in (trainer, rollout):
        given = [x.clone() for x in (trainer, rollout)]
        given[0 if broken is trainer else 1][0, 4] = math.nan
        options = choice(level, mode, estimator, 0.9, 1.1) | {"veto": 0.1}
        found = rollout_correction(*given, mask, **options)
        assert found.weights[0, 4].isnan() and found.keep[0, 4]
        assert found.metrics["weight_mean"].isnan() and found.metrics["kl"].isnan() and found.metrics["k3_kl"].isnan()
        assert found.metrics["eff_sample_size"].isnan() and found.metrics["weight_max"].isnan()
        assert found.metrics["estimate_mean"].isnan() and found.metrics["estimate_max"].isnan()
        others = rollout_correction(trainer, rollout, mask, **options)
        assert torch.equal(found.weights[1:], others.weights[1:])
        assert rollout_correction(*given, mask, batch_normalize=True, **options).weights[mask].isnan().all()
        loss = logprob_policy_loss(
            trainer, torch.ones(len(mask)).double(), objective=dapo(), mask=found.keep,
            importance_weights=found.weights,
        ).loss  # fmt: skip
        assert loss.isnan()


def test_infinite_log_probs():
    """A token that one policy gives no probability: the clamp's ratio, not 0 * inf."""
    trainer = torch.tensor([[-math.inf, -1.0]], dtype=torch.float64)
    rollout = torch.full((1, 2), -1.0, dtype=torch.float64)
    assert rollout_correction(trainer, rollout).weights.tolist() == [[math.exp(-20.0), 1.0]]
    assert rollout_correction(rollout, trainer, high=1e9).weights.tolist() == [[math.exp(20.0), 1.0]]
    found = rollout_correction(trainer, rollout, veto=1e-4)
    assert not found.keep.any() and not found.weights.any() and found.metrics["vetoed"] == 1.0
    for given, k3 in (((trainer, rollout), math.exp(-20) + 19), ((rollout, trainer), math.exp(20) - 21)):
        for estimator, most in (("k2", 200.0), ("k3", k3)):
            for level, share in (("token", 1.0), ("sequence", 1.0), ("max", 1.0), ("geometric", 0.5)):
                options = {"level": level, "mode": "mask", "estimator": estimator}
                for high, kept in ((most * share * (1 + 1e-12), True), (most * share * (1 - 1e-12), False)):
                    found = rollout_correction(*given, high=high, **options)
                    assert found.keep.tolist() == [[kept, kept or level == "token"]], (options, high)
                    assert found.metrics["estimate_max"].item() == pytest.approx(most * share, rel=1e-14)


def test_in_a_loss():
    """weights and keep as the losses take them: icepop leaves the divisor, mask shrinks it."""
    trainer, rollout = logprobs_of(torch.tensor([[0.5, 1.0, 8.0]], dtype=torch.float64).log())
    mask = torch.ones(1, 3, dtype=torch.int64)
    for mode, expected in (("truncate", -(0.5 + 1 + 2) / 3), ("icepop", -1.5 / 3), ("mask", -1.5 / 2)):
        found = rollout_correction(trainer, rollout, mask, mode=mode)
        for objective in (dapo(), grpo()):
            loss = logprob_policy_loss(
                trainer, torch.ones(1).double(), objective=objective, mask=mask & found.keep,
                importance_weights=found.weights,
            ).loss  # fmt: skip
            assert loss.item() == pytest.approx(expected)


def test_no_host_reads():
    trainer, rollout, mask, lengths = batch(2)
    with pytest.raises(AssertionError), NoHostReads():
        mask.any().item()
    cu_seqlens = ends(lengths)
    for chosen in CHOICES:
        options = choice(*chosen, 0.5, 2.0)
        with NoHostReads():
            rollout_correction(trainer, rollout, mask, veto=0.1, batch_normalize=True, **options)
            rollout_correction(trainer.flatten(), rollout.flatten(), cu_seqlens=cu_seqlens, **options)


@pytest.mark.cuda
@pytest.mark.parametrize("level, mode, estimator", [chosen for chosen in CHOICES if chosen[1] == "mask"])
def test_no_synchronisation(level, mode, estimator):
    """On a GPU: no wait, the CPU's numbers, the same bits again, and in a captured graph."""
    trainer, rollout, mask, _ = batch(2, rollouts=40, length=700, dtype=torch.float32)
    given = [x.cuda() for x in (trainer, rollout, mask)]
    options = choice(level, mode, estimator, 0.5, 2.0) | {"veto": 0.1, "batch_normalize": True}
    first = rollout_correction(*given, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = rollout_correction(*given, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rollout_correction(*given, **options)
    graph.replay()
    host = rollout_correction(trainer, rollout, mask, **options)
    for other in (again, captured):
        assert torch.equal(first.weights, other.weights) and torch.equal(first.keep, other.keep)
        assert numbers(first.metrics) == numbers(other.metrics)
    assert torch.allclose(first.weights.cpu(), host.weights, rtol=1e-6) and torch.equal(first.keep.cpu(), host.keep)
    assert numbers(first.metrics) == pytest.approx(numbers(host.metrics), rel=1e-6)


GOOD = torch.zeros(2, 3)
K3 = {"mode": "mask", "estimator": "k3"}


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"level": "rollout"}, ValueError, "level must be one of token, sequence, geometric, max; got 'rollout'"),
        ({"estimator": "k4"}, ValueError, "estimator must be one of k1, k2, k3; got 'k4'"),
        ({"level": "max", "mode": "mask"}, ValueError, "level 'max' is of the estimators k2 and k3; got"),
        ({"estimator": "k2"}, ValueError, "estimator 'k2' decides what to reject: mode must be 'mask'; got 'truncate'"),
        ({"estimator": "k3", "mode": "icepop"}, ValueError, "mode must be 'mask'; got 'icepop'"),
        ({**K3, "low": 0.0}, ValueError, "low must be None with estimator 'k3', which is never below 0; got 0.0"),
        ({**K3, "high": None}, ValueError, "high must be a number with estimator 'k3'; got None"),
        ({**K3, "high": 0.0}, ValueError, "high must be positive and finite; got 0.0"),
        ({"mode": "clip"}, ValueError, "mode must be one of truncate, mask, icepop; got 'clip'"),
        ({"high": None}, ValueError, "low must be above 0 where high is None"),
        ({"high": None, "low": 0.0}, ValueError, "low must be above 0 where high is None"),
        ({"high": 0.0}, ValueError, "high must be positive and finite; got 0.0"),
        ({"high": math.inf}, ValueError, "high must be positive and finite; got inf"),
        ({"high": math.nan}, ValueError, "high must be positive"),
        ({"high": True}, TypeError, "high must be a number or None; got bool"),
        ({"high": "0.5_2.0"}, TypeError, "high must be a number or None; got str"),
        ({"low": -0.1}, ValueError, "low must be finite and at least 0; got -0.1"),
        ({"low": 2.5}, ValueError, "low must not be above high; got 2.5 and 2.0"),
        ({"veto": 0.0}, ValueError, r"veto must lie in \(0, 1\); got 0.0"),
        ({"veto": 1.0}, ValueError, r"veto must lie in \(0, 1\); got 1.0"),
        ({"batch_normalize": 1}, TypeError, "batch_normalize must be a bool; got int"),
        ({"logprobs_trainer": [0.0]}, TypeError, "logprobs_trainer must be a tensor; got list"),
        ({"logprobs_trainer": GOOD.long()}, TypeError, "logprobs_trainer must be a floating-point tensor"),
        ({"logprobs_trainer": GOOD[0]}, ValueError, r"logprobs_trainer must have shape \[B, T\]"),
        ({"logprobs_rollout": GOOD[:1]}, ValueError, r"logprobs_rollout must have shape \[2, 3\]; got \[1, 3\]"),
        ({"logprobs_rollout": GOOD.long()}, TypeError, "logprobs_rollout must be a floating-point tensor"),
        ({"mask": torch.ones(2, 1)}, ValueError, r"mask must have shape \[2, 3\]; got \[2, 1\]"),
        ({"mask": 2 * torch.ones(2, 3)}, ValueError, "mask must be bool or hold 0 and 1; got 2.0"),
        ({"cu_seqlens": torch.tensor([0, 3, 6])}, ValueError, "logprobs_trainer must have shape"),
    ],
)
def test_errors(given, error, words):
    arguments = {"logprobs_trainer": GOOD, "logprobs_rollout": GOOD, **given}
    with pytest.raises(error, match=words):
        rollout_correction(**arguments)


def test_wrong_offsets():
    flat = torch.zeros(4)
    for bad in ([0, 3], [1, 4], [0, 3, 2, 4]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to N = 4"):
            rollout_correction(flat, flat, cu_seqlens=torch.tensor(bad))


@pytest.mark.parametrize("level, estimator", [*itertools.product(LEVELS, ["k1"]), ("max", "k3"), ("sequence", "k2")])
def test_compiled(level, estimator):
    """torch.compile(fullgraph=True): the same bits."""
    trainer, rollout, mask, _ = batch(4, dtype=torch.float32)

    def call(trainer, rollout, mask):
        options = {"level": level, "mode": "mask", "estimator": estimator}
        return rollout_correction(trainer, rollout, mask, high=1.5, veto=0.3, batch_normalize=True, **options)

    torch._dynamo.reset()
    plain = call(trainer, rollout, mask)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(trainer, rollout, mask)
    assert torch.equal(plain.weights, compiled.weights) and torch.equal(plain.keep, compiled.keep)
    assert numbers(plain.metrics) == numbers(compiled.metrics)


@pytest.mark.parametrize("bad", [[0, 3], [1, 4], [0, 9]])
def test_wrong_offsets_unread(bad):
    """Where cu_seqlens are not read, as on a GPU, wrong ends give some result and index nothing out of bounds."""
    flat = torch.zeros(4)
    with NoHostReads():
        for chosen in CHOICES:
            found = rollout_correction(flat, flat, cu_seqlens=torch.tensor(bad), veto=0.5, **choice(*chosen, 0.5, 2.0))
            assert found.weights.shape == (4,)
