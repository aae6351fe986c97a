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
    ExponentialDecay,
    LinearDecay,
    MinPRegularizer,
    Objective,
    PolarityWeights,
    Reinforce,
    Sapo,
    TokenRule,
)
from .presets import (
    a3po,
    cispo,
    dapo,
    dr_grpo,
    fork_tokens,
    grpo,
    gspo,
    lp_reg,
    nsr,
    psr,
    sapo,
    w_reinforce,
)
from .rollout_correction import rollout_correction
from .selection import group_advantages, select_tokens
from .statistics import TokenStats, logits_gradient, min_p_token_logprobs, token_logprobs

__all__ = [
    "Cispo", "Clip", "Constant", "CosineDecay", "ExponentialDecay", "LinearDecay", "MinPRegularizer", "Objective",
    "PolarityWeights", "PolicyLossOutput", "Reinforce", "Sapo", "TokenRule", "TokenStats", "a3po", "cispo", "dapo",
    "dr_grpo", "estimated_advantages", "fork_tokens", "group_advantages", "grpo", "gspo", "logits_gradient", "lp_reg",
    "min_p_token_logprobs", "multi_reward_advantages", "nsr", "policy_loss", "psr", "rollout_correction", "sapo",
    "select_tokens", "token_logprobs", "w_reinforce",
]  # fmt: skip
