"""The specification written down: slow, literal PyTorch that runs in float64. Imports nothing from a3po_kernels.

Every formula is the naive one and every gradient comes from autograd through it; the one exception,
`logits_gradient`, is the closed form of the specification, here to be compared with autograd.
"""

from .advantages import estimated_advantages, multi_reward_advantages
from .loss import PolicyLossOutput, policy_loss
from .objectives import (
    Cispo,
    Clip,
    Constant,
    CosineDecay,
    Dppo,
    ExponentialDecay,
    Gmpo,
    LinearDecay,
    MinPRegularizer,
    Nothing,
    Objective,
    OffPolicyMask,
    PolarityWeights,
    Ratio,
    Reinforce,
    Sapo,
    TokenRule,
    Topr,
    Vespo,
)
from .presets import (
    a3po,
    cispo,
    clip_cov,
    dapo,
    dppo,
    dr_grpo,
    fork_tokens,
    gmpo,
    grpo,
    gspo,
    gspo_token,
    kl_cov,
    lp_reg,
    luspo,
    nsr,
    psr,
    sapo,
    topr,
    vespo,
    w_reinforce,
)
from .rollout_correction import rollout_correction
from .selection import group_advantages, select_tokens
from .statistics import TokenStats, logits_gradient, min_p_token_logprobs, token_logprobs

__all__ = [
    "Cispo", "Clip", "Constant", "CosineDecay", "Dppo", "ExponentialDecay", "Gmpo", "LinearDecay", "MinPRegularizer",
    "Nothing", "Objective", "OffPolicyMask", "PolarityWeights", "PolicyLossOutput", "Ratio", "Reinforce", "Sapo",
    "TokenRule", "TokenStats", "Topr", "Vespo", "a3po", "cispo", "clip_cov", "dapo", "dppo", "dr_grpo",
    "estimated_advantages", "fork_tokens", "gmpo", "group_advantages", "grpo", "gspo", "gspo_token", "kl_cov",
    "logits_gradient", "lp_reg", "luspo", "min_p_token_logprobs", "multi_reward_advantages", "nsr", "policy_loss",
    "psr", "rollout_correction", "sapo", "select_tokens", "token_logprobs", "topr", "vespo", "w_reinforce",
]  # fmt: skip
