"""The reference's DPPO, GMPO, GSPO-token, VESPO, TOPR and their parts against numbers worked out by hand.

Each formula is named with the paper or the code that it is of; the rules are in test_reference_rules.py.
"""

import math

import pytest
import torch
from reference_examples import F64, INF, NAN, close, random_logits, rollout_loss

import reference as ref

LOG2, LOG_HALF = math.log(2), math.log(0.5)
TV, KL = ref.Dppo(), ref.Dppo("kl", 0.05, 0.05)
CAP = ref.Dppo(ratio_cap=1.1)

# --- DPPO (2602.04879, verl's dppo_tv and dppo_kl): -sg(min(r, cap)) A l M; p = .5 unless it is said otherwise ---

# KL of Bernoulli(.25) to Bernoulli(.5), r = 2: .25 log .5 + .75 log(.75 / .5) = .131; of .4, r = 1.25: .0201.


@pytest.mark.parametrize(
    ("surrogate", "p", "advantage", "ratio", "kept", "cap"),
    [
        (TV, 0.5, 2.0, 1.25, 1, 0),  # p - po = .5 - .4 = .1
        (TV, 0.5, 2.0, 2.0, 0, 0),  # .5 - .25 = .25 > .2
        (TV, 0.5, 2.0, 0.55, 1, 0),  # .5 - .909: a good token that became rarer is never cut
        (TV, 0.5, -2.0, 0.55, 0, 0),  # -.409 < -.2
        (TV, 0.5, -2.0, 2.0, 1, 0),
        (TV, 0.02, 2.0, 10.0, 1, 0),  # .02 - .002: the ratio alone does not matter
        (KL, 0.5, 2.0, 2.0, 0, 0),
        (KL, 0.5, 2.0, 1.25, 1, 0),
        (KL, 0.5, 2.0, 0.55, 1, 0),  # p <= po
        (KL, 0.5, -2.0, 0.55, 0, 0),
        (KL, 0.5, -2.0, 2.0, 1, 0),  # p >= po
        (CAP, 0.5, 2.0, 1.25, 1, 1),  # min(1.25, 1.1)
        (CAP, 0.5, 2.0, 2.0, 0, 0),  # cut, so the cap is not at work
        (ref.Dppo(delta_high=0.3), 0.5, 2.0, 2.0, 1, 0),
        (ref.Dppo(delta_low=0.5), 0.5, -2.0, 0.55, 1, 0),
    ],
)
def test_dppo_by_hand(surrogate, p, advantage, ratio, kept, cap):
    weight = 1.1 if cap else ratio
    out, grad = rollout_loss(ref.Objective(surrogate=surrogate), [[p]], [advantage], [[ratio]])
    close(out.loss, -kept * weight * advantage * math.log(p))
    close(grad, [[-kept * weight * advantage]])
    assert out.metrics["clip_fraction_low"] == (not kept and advantage < 0)
    assert out.metrics["clip_fraction_high"] == (not kept and advantage > 0)
    assert out.metrics["dual_clip_fraction"] == cap


def test_dppo_at_its_bound_and_without_an_advantage():
    # p - po = .5 - .25 = .25 and .25 - .5 = -.25, with a bound on either side. A = 0: no loss, and no clip is counted.
    for bound, kept in ((0.25 - 1e-9, 0), (0.25 + 1e-9, 1)):
        objective = ref.dppo(delta_low=bound, delta_high=bound)
        close(rollout_loss(objective, [[0.5]], [1.0], [[2.0]])[0].loss, -kept * 2 * LOG_HALF)
        close(rollout_loss(objective, [[0.25]], [-1.0], [[0.5]])[0].loss, kept * 0.5 * math.log(0.25))
    out, grad = rollout_loss(ref.dppo(), [[0.2]], [0.0], [[0.25]])
    assert out.loss == 0 and grad == 0 and out.metrics["clip_fraction_low"] == 0
    # On-policy both divergences are 0: REINFORCE with r = 1.
    for divergence in ("tv", "kl"):
        close(rollout_loss(ref.dppo(divergence), [[0.5]], [2.0])[0].loss, -2 * LOG_HALF)


def test_binary_kl_by_hand():
    # Bernoulli(.25) to Bernoulli(.5): .25 log(.25/.5) + .75 log(.75/.5) = .130812; the bound lies on either side.
    value = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert abs(value - 0.130812) < 1e-6
    for bound, kept in ((value - 1e-6, False), (value + 1e-6, True)):
        out, _ = rollout_loss(ref.dppo("kl", bound, bound), [[0.5]], [1.0], [[2.0]])
        assert bool(out.loss != 0) == kept


# --- GMPO (2507.20673, verl's geo_mean, TRL's gmpo) ---


def test_gmpo_by_hand():
    # Rollout 0, A = 2: log ratios .2, .6 (clipped at .4), -.9 (not clipped: A > 0): mean -.1, R = e^-.1.
    # Rollout 1, A = -1: log ratios -.5 (clipped at -.4), .8 (not): mean .2, R = e^.2.
    ratio = torch.tensor([[0.2, 0.6, -0.9], [-0.5, 0.8, NAN]], dtype=F64).exp()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    out, grad = rollout_loss(ref.gmpo(), [[0.5, 0.4, 0.3], [0.5, 0.6, 0.5]], [2.0, -1.0], ratio, mask=mask)
    r0, r1 = math.exp(-0.1), math.exp(0.2)
    close(out.loss, (-2 * r0 + r1) / 2)
    # d(-2 R0)/dl_t = -2 R0 / 3 of the tokens that are not clipped, halved by the mean over rollouts.
    close(grad, [[-r0 / 3, 0, -r0 / 3], [0, r1 / 4, 0]])
    m = out.metrics
    close(m["ratio_mean"], (3 * r0 + 2 * r1) / 5)
    close(m["ratio_max"], r1)
    assert m["clip_fraction_high"] == 0.2 and m["clip_fraction_low"] == 0.2 and m["active_fraction"] == 0.6
    # Advantages per token: -A_t R, and a token of A = 0 is clipped above alone, as one of A > 0 is: mean (.4 - .9)/2.
    out, grad = rollout_loss(ref.gmpo(), [[0.5, 0.5]], [[0.0, 3.0]], [[math.exp(0.6), math.exp(-0.9)]])
    close(out.loss, -3 * math.exp(-0.25) / 2)
    close(grad, [[0, -3 * math.exp(-0.25) / 4]])
    assert out.metrics["clip_fraction_high"] == 0


def test_gmpo_beyond_the_clamp_has_no_gradient():
    # A mean of -25 without a bound in its way (A > 0): R = e^-20, held there.
    out, grad = rollout_loss(ref.gmpo(), [[0.5]], [2.0], [[math.exp(-25)]])
    close(out.loss, -2 * math.exp(-20))
    assert grad == 0


# --- the rollout's ratio with each token's own derivative (GSPO-token, 2507.18071, verl's gspo) ---


def test_gspo_token_by_hand():
    # Log ratios log 1.2, log 1.2, log .9: s = 1.296^(1/3); advantages 2, -1, 0 of the tokens, mean over 3 tokens.
    s = 1.296 ** (1 / 3)
    out, grad = rollout_loss(ref.gspo_token(), [[0.5, 0.4, 0.3]], [[2.0, -1.0, 0.0]], [[1.2, 1.2, 0.9]])
    close(out.loss, (-2 * s + s) / 3)
    close(grad, [[-2 * s / 3, s / 3, 0]])  # GSPO would give each the mean of the three
    close(out.metrics["ratio_mean"], s)
    # One advantage per rollout: GSPO's own gradient.
    p, r = [[0.5, 0.4, 0.3]], [[1.2, 1.2, 0.9]]
    token, sequence = (rollout_loss(preset(), p, [2.0], r) for preset in (ref.gspo_token, ref.gspo))
    close(token[0].loss, sequence[0].loss)
    close(token[1], sequence[1])
    # Above the bound for A > 0: clipped. A mean of 25: e^20 and slope 0.
    assert rollout_loss(ref.gspo_token(), [[0.5, 0.5]], [1.0], [[1.5, 1.5]])[1].eq(0).all()
    out, grad = rollout_loss(ref.gspo_token(), [[0.5]], [-1.0], [[math.exp(25)]])
    close(out.loss, math.exp(20))
    assert grad == 0


def test_luspo_by_hand():
    # TRL's luspo (2602.05261): the mean over rollouts of n_s times GSPO's loss: (-3 * 2 s - 1 * 1.2) / 2.
    s = 1.296 ** (1 / 3)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    ratio = [[1.2, 1.2, 0.9], [2.0, NAN, NAN]]
    out, grad = rollout_loss(ref.luspo(epsilon_low=0.2), torch.full((2, 3), 0.5), [2.0, 1.0], ratio, mask=mask)
    close(out.loss, (-6 * s - 1.2) / 2)
    close(grad, [[-s] * 3, [0] * 3])


# --- the squared log ratio (Kimi-K2.5 2602.02276, prime-rl's kl_tau, verl's dro with beta / 2) ---


def test_log_ratio_term_by_hand():
    # p = .5, r = 2: 3 (-A l) + c log(2)^2 = -6 log .5 + .3 log(2)^2; the importance weight 3 leaves the latter alone.
    objective = ref.Objective(surrogate=ref.Reinforce(), log_ratio_coef=0.3)
    out, grad = rollout_loss(objective, [[0.5]], [2.0], [[2.0]], importance_weights=torch.tensor([3.0]))
    close(out.loss, -6 * LOG_HALF + 0.3 * LOG2**2)
    close(grad, [[-6 + 0.6 * LOG2]])
    # It is not clamped, and it is the token's own where the ratio is the rollout's: d = 30 and -30, of mean 0.
    objective = ref.gspo(log_ratio_coef=0.5)
    out, grad = rollout_loss(objective, [[0.5, 0.5]], [0.0], [[math.exp(30), math.exp(-30)]])
    close(out.loss, 0.5 * 900)
    close(grad, [[15, -15]])
    # A dropped token has no such term; on-policy it is 0 without a slope.
    polarity = torch.tensor([1, -1])
    out, grad = rollout_loss(ref.psr(log_ratio_coef=1.0), [[0.5]] * 2, [0.0, 0.0], [[2.0]] * 2, polarity=polarity)
    close(out.loss, LOG2**2)
    close(grad, [[2 * LOG2], [0]])
    out, grad = rollout_loss(ref.dapo(log_ratio_coef=1.0), [[0.5]], [0.0])
    assert out.loss == 0 and grad == 0


# --- Ratio and Nothing (2505.22617) ---


def test_ratio_and_nothing_by_hand():
    # KL-Cov's loss of a token (2505.22617): -A r + c |d|; p = .5, r = 2 and .5.
    objective = ref.Objective(surrogate=ref.Ratio(0.3))
    out, grad = rollout_loss(objective, [[0.5, 0.5]], [2.0], [[2.0, 0.5]], importance_weights=torch.tensor([3.0]))
    close(out.loss, 3 * (-4 - 1 + 0.6 * LOG2) / 2)
    close(grad, [[3 * (-4 + 0.3) / 2, 3 * (-1 - 0.3) / 2]])
    out, grad = rollout_loss(objective, [[0.5]], [2.0])  # on-policy: |0| has slope 0
    close(out.loss, -2.0)
    close(grad, [[-2.0]])
    out, grad = rollout_loss(ref.Objective(surrogate=ref.Nothing(), entropy_coef=1.0), [[0.5]], [2.0], [[4.0]])
    close(out.loss, -LOG2)
    assert grad == 0 and out.metrics["clip_fraction_high"] == 0
    # Of the rollout's ratio r = 1 (2 and .5), |d| is still the token's own.
    objective = ref.Objective(surrogate=ref.Ratio(0.3), ratio_level="sequence")
    out, grad = rollout_loss(objective, [[0.5, 0.5]], [2.0], [[2.0, 0.5]])
    close(out.loss, -2 + 0.3 * LOG2)
    close(grad, [[(-2 + 0.3) / 2, (-2 - 0.3) / 2]])


# --- ratio weights ---


def test_off_policy_mask_by_hand():
    # DeepSeek-V3.2 (2512.02556) eq. 9, TRL's get_off_policy_mask: mean(lo - l) = log 2 in both rollouts, above .5 and
    # below .7. Only A < 0 is masked, and its place in the denominator stays; so do the KL and the squared log ratio.
    p, a, r = [[0.5, 0.5]] * 2, [[2.0, 2.0], [-1.0, 4.0]], [[0.25, 1.0]] * 2
    keep = ref.Objective(surrogate=ref.Reinforce(), ratio_weights=[ref.OffPolicyMask(0.7)])
    mask = ref.Objective(surrogate=ref.Reinforce(), ratio_weights=[ref.OffPolicyMask(0.5)], log_ratio_coef=1.0)
    close(rollout_loss(keep, p, a, r)[0].loss, -(2 + 2 - 1 + 4) * LOG_HALF / 4)
    out, grad = rollout_loss(mask, p, a, r)
    far = math.log(0.25)
    close(out.loss, (-(2 + 2 + 4) * LOG_HALF + 2 * far**2) / 4)
    close(grad, [[(-2 + 2 * far) / 4, -0.5], [2 * far / 4, -1]])
    # The raw advantage decides, before shaping: A = -1 of weight 0 is dropped; A = +1 is not masked.
    both = ref.w_reinforce(0.1, 1.0, ratio_weights=[ref.OffPolicyMask(0.5)], epsilon_low=0.9)
    close(rollout_loss(both, [[0.5]], [1.0], [[0.25]])[0].loss, -0.1 * 0.25)
    assert rollout_loss(both, [[0.5]], [-1.0], [[0.25]])[0].loss == 0


def gamma(k, lam, log_w):
    return math.exp(lam + k * log_w - lam * math.exp(log_w))


def test_vespo_by_hand():
    # 2602.10693, TRL's get_gamma_weights: rollout 0, A = 2: w = 2 * .9; rollout 1, A = -1: w = .5.
    mask = torch.tensor([[1, 1], [1, 0]])
    p, r = [[0.5, 0.5], [0.5, 0.5]], [[2.0, 0.9], [0.5, NAN]]
    out, grad = rollout_loss(ref.vespo(), p, [2.0, -1.0], r, mask=mask)
    positive, negative = gamma(2, 3, math.log(1.8)), gamma(3, 2, math.log(0.5))
    close(out.loss, (-4 * positive + negative) * LOG_HALF / 3)
    close(grad, [[-2 * positive / 3] * 2, [negative / 3, 0]])
    # Importance weights 3 and 0 become part of w, log 3 + log 1e-8, and are not multiplied on. A = 0 is positive.
    weights = torch.tensor([[3.0, 0.0], [3.0, NAN]], dtype=F64)
    out, grad = rollout_loss(ref.vespo(), p, [2.0, -1.0], r, mask=mask, importance_weights=weights)
    positive, negative = gamma(2, 3, math.log(1.8 * 3e-8)), gamma(3, 2, math.log(1.5))
    close(grad, [[-2 * positive / 3] * 2, [negative / 3, 0]])
    # A weight per rollout is one factor of w, not one of each of its tokens.
    _, grad = rollout_loss(ref.vespo(), p, [2.0, -1.0], r, mask=mask, importance_weights=torch.tensor([0.5, 3.0]))
    close(grad, [[-2 * gamma(2, 3, math.log(0.9)) / 3] * 2, [gamma(3, 2, math.log(1.5)) / 3, 0]])
    # phi(1) = 1; a ratio of e^-60 is held at 1e-8 by token (e^-20) and by rollout; one of e^30 gives e^-inf = 0.
    close(rollout_loss(ref.vespo(), [[0.5]], [2.0], [[1.0]])[0].loss, -2 * LOG_HALF)
    _, grad = rollout_loss(ref.vespo(1.0, 0.5), [[0.5]], [2.0], [[math.exp(-60)]])
    close(grad, [[-2 * gamma(1, 0.5, math.log(1e-8))]])
    assert rollout_loss(ref.vespo(), [[0.5]], [2.0], [[math.exp(30)]])[1] == 0
    # Log ratios are held at +-20 by token first: -30 and 17 make -3.
    _, grad = rollout_loss(ref.vespo(), [[0.5, 0.5]], [2.0], [[math.exp(-30), math.exp(17)]])
    close(grad, [[-gamma(2, 3, -3.0)] * 2])
    # A = 0 is positive, as the penalty of Ratio shows, which does not come with A.
    objective = ref.Objective(surrogate=ref.Ratio(0.3), ratio_weights=[ref.Vespo()])
    close(rollout_loss(objective, [[0.5]], [0.0], [[0.5]])[0].loss, 0.3 * LOG2 * gamma(2, 3, math.log(0.5)))
    # Per token: k and lambda by each token's own sign, w the rollout's.
    out, grad = rollout_loss(ref.vespo(), [[0.5, 0.5]], [[1.0, -1.0]], [[2.0, 0.9]])
    close(grad, [[-gamma(2, 3, math.log(1.8)) / 2, gamma(3, 2, math.log(1.8)) / 2]])


def test_topr_by_hand():
    # 2503.14286 eq. 8: A >= 0 as it is; A < 0 times the rollout's ratio held within [0, 1]: .5 * .8 = .4, and 2 -> 1.
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]])
    p, r, a = torch.full((3, 2), 0.5), [[3.0, 3.0], [0.5, 0.8], [2.0, NAN]], [2.0, -1.0, -3.0]
    for level, tapered in (("sequence", [0.4, 0.4]), ("geometric", [math.sqrt(0.4)] * 2), ("token", [0.5, 0.8])):
        out, grad = rollout_loss(ref.topr(level), p, a, r, mask=mask)
        close(grad, [[-2 / 3] * 2, [tapered[0] / 3, tapered[1] / 3], [1, 0]])
        close(out.loss, (-4 + sum(tapered) + 3) * LOG_HALF / 3)
    bounded = ref.Objective(surrogate=ref.Reinforce(), ratio_weights=[ref.Topr("token", 0.6, 1.5)])
    close(rollout_loss(bounded, p, a, r, mask=mask)[1] * 5, [[-2, -2], [0.6, 0.8], [4.5, 0]])


def test_ratio_weights_multiply_the_surrogate_alone():
    # Topr's .5 times the importance weight 3 on -A l = log .5, not on the entropy or KL term.
    reference = torch.tensor([[0.25]], dtype=F64).log()
    objective = ref.topr("token", kl_coef=0.1, kl_estimator="k1")
    out, grad = rollout_loss(
        objective, [[0.5]], [-1.0], [[0.5]], ref_logprobs=reference, importance_weights=torch.tensor([3.0])
    )
    close(out.loss, 1.5 * LOG_HALF + 0.1 * LOG2)
    close(grad, [[1.5 + 0.1]])
    two = ref.Objective(surrogate=ref.Reinforce(), ratio_weights=[ref.Topr("token"), ref.OffPolicyMask(LOG2 / 2)])
    assert rollout_loss(two, [[0.5]], [-1.0], [[0.5]])[0].loss == 0


# --- the table, refusals, and autograd ---

NEW = {
    "dppo": (ref.Dppo("tv", 0.2, 0.2, None), "token", "token-mean", ()),
    "vespo": (ref.Reinforce(), "token", "token-mean", (ref.Vespo(2.0, 3.0, 3.0, 2.0),)),
    "gmpo": (ref.Gmpo(0.4, 0.4), "sequence", "seq-mean-token-mean", ()),
    "gspo_token": (ref.Clip(0.2, 0.2), "sequence-token", "seq-mean-token-mean", ()),
    "luspo": (ref.Clip(0.2, 0.2), "sequence", "seq-mean-token-sum", ()),
    "topr": (ref.Reinforce(), "token", "seq-mean-token-sum", (ref.Topr("sequence", 0.0, 1.0),)),
    "kl_cov": (ref.Ratio(), "token", "token-mean", ()),
    "clip_cov": (ref.Clip(0.2, 0.2), "token", "token-mean", ()),
}


def test_presets_are_the_table():
    for name, (surrogate, level, aggregation, weights) in NEW.items():
        objective = getattr(ref, name)()
        assert (objective.surrogate, objective.ratio_level, objective.aggregation) == (surrogate, level, aggregation)
        assert objective.ratio_weights == weights and objective.normalize_over == "all"
        assert objective.log_ratio_coef == objective.kl_coef == objective.entropy_coef == 0
        changed = getattr(ref, name)(kl_coef=0.1, entropy_coef=0.2, log_ratio_coef=0.3, aggregation="token-mean")
        assert (changed.kl_coef, changed.entropy_coef, changed.log_ratio_coef) == (0.1, 0.2, 0.3)
    rule = ref.kl_cov(0.1, 0.7).shaping[0]
    assert (rule.ratio, rule.replacement, rule.side, rule.scope) == (0.1, ref.Ratio(0.7), "high", "batch")
    assert ref.clip_cov().shaping[0].replacement == ref.Nothing() and ref.clip_cov().shaping[0].ratio == 0.0002


def test_bad_values_are_refused():
    objective, rule = ref.Objective, ref.TokenRule
    for call in (
        lambda: ref.dppo("js"), lambda: ref.dppo(delta_low=-0.1), lambda: ref.dppo(ratio_cap=0.0),
        lambda: ref.gmpo(epsilon_low=-1.0), lambda: ref.kl_cov(penalty=-0.1), lambda: ref.topr("mean"),
        lambda: ref.Topr(low=0.5, high=0.4), lambda: ref.vespo(k_positive=-1.0), lambda: ref.OffPolicyMask(NAN),
        lambda: objective(log_ratio_coef=-1.0), lambda: objective(log_ratio_coef=INF),
        lambda: objective(surrogate=ref.Gmpo()), lambda: objective(surrogate=ref.Gmpo(), ratio_level="sequence-token"),
        lambda: objective(surrogate=ref.Dppo(), ratio_level="sequence"), lambda: objective(ratio_level="rollout"),
        lambda: objective(shaping=[rule(replacement=ref.Dppo())], ratio_level="sequence"),
        lambda: objective([rule(replacement=ref.Ratio())], ref.Gmpo(), "sequence"),
        lambda: objective([rule(replacement=ref.Ratio())], low_probability=ref.MinPRegularizer()),
        lambda: ref.gspo_token(kl_estimator="k3-ratio"), lambda: ref.gmpo(kl_estimator="k3-ratio"),
        lambda: rule(quantile=1.5, scope="batch"), lambda: rule(quantile=0.5), lambda: rule(threshold=NAN),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            call()
    for call in (
        lambda: ref.dppo(epsilon_low=0.1), lambda: ref.vespo(dual_clip=3.0), lambda: rule(replacement=ref.Gmpo()),
        lambda: rule(replacement="clip"), lambda: rule(metric=3), lambda: objective(ratio_weights=[0.5]),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize(
    "objective",
    [
        ref.gmpo(entropy_coef=0.1),
        ref.Objective(surrogate=ref.Ratio(0.3), log_ratio_coef=0.2),
        ref.Objective(surrogate=ref.Ratio(0.3), ratio_level="sequence", kl_coef=0.1),
        ref.kl_cov(ratio=0.4),
        ref.clip_cov(low=0.0, ratio=0.4),
        ref.luspo(),
    ],
)
def test_gradcheck_of_the_loss(objective):
    """Where the gradient is the derivative: neither a stop-gradient nor GSPO-token's is in these."""
    z, targets = random_logits(2, 3, 4)
    noise = random_logits(2, 2, 3, seed=3, scale=0.3)[0]
    now = torch.log_softmax(z, -1).gather(-1, targets[..., None])[..., 0]
    kwargs = {
        "old_logprobs": now + noise[0], "ref_logprobs": now + noise[1],
        "mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }  # fmt: skip
    advantages = torch.tensor([1.3, -0.8], dtype=F64)

    def loss(x):
        return ref.policy_loss(x, targets, advantages, objective=objective, **kwargs).loss

    assert torch.autograd.gradcheck(loss, z.requires_grad_())


@pytest.mark.parametrize("name", NEW)
def test_nothing_to_sum_is_zero_not_nan(name):
    packed, masked = {"cu_seqlens": torch.tensor([0, 0, 0])}, {"mask": torch.zeros(2, 3)}
    for shape, kwargs in [((0, 4), packed), ((2, 3, 4), masked)]:
        z = torch.full(shape, NAN, dtype=F64, requires_grad=True)
        targets = torch.zeros(shape[:-1], dtype=torch.long)
        old = torch.full(targets.shape, NAN, dtype=F64)
        objective = getattr(ref, name)(kl_coef=0.1, log_ratio_coef=0.1)
        out = ref.policy_loss(
            z, targets, torch.tensor([NAN, 1.0]), objective=objective, old_logprobs=old, ref_logprobs=old, **kwargs
        )
        out.loss.backward()
        assert out.loss == 0 and z.grad.eq(0).all()
        assert all(value == 0 for key, value in out.metrics.items() if key != "weight")
