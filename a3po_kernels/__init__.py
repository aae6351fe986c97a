"""Fused loss heads for reinforcement learning with verifiable rewards: logits to loss, gradient and metrics."""

from .losses.advantages import group_advantages, multi_reward_advantages
from .losses.denominator import global_denominator
from .losses.linear import LinearPolicyLoss, linear_policy_loss
from .losses.logits import PolicyLoss, policy_loss
from .losses.logprobs import logprob_policy_loss
from .losses.rollout_correction import RolloutCorrection, rollout_correction
from .losses.rows import RowPlan, plan_rows
from .losses.stages import PolicyLossOutput
from .named_objectives import (
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
    presets,
    psr,
    sapo,
    topr,
    vespo,
    w_reinforce,
)
from .objectives import (
    Cispo,
    Clip,
    CustomSurrogate,
    Dppo,
    Gmpo,
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
from .ops.linear_min_p import linear_min_p_token_logprobs
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.min_p import min_p_token_logprobs
from .ops.select_tokens import select_tokens
from .ops.token_logprobs import TokenStats, token_logprobs
from .planning import estimate_memory
from .schedules import Constant, CosineDecay, ExponentialDecay, LinearDecay

__version__ = "0.2.0"

__all__ = [
    "Cispo",
    "Clip",
    "Constant",
    "CosineDecay",
    "CustomSurrogate",
    "Dppo",
    "ExponentialDecay",
    "Gmpo",
    "LinearDecay",
    "LinearPolicyLoss",
    "MinPRegularizer",
    "Nothing",
    "Objective",
    "OffPolicyMask",
    "PolarityWeights",
    "PolicyLoss",
    "PolicyLossOutput",
    "Ratio",
    "Reinforce",
    "RolloutCorrection",
    "RowPlan",
    "Sapo",
    "TokenRule",
    "TokenStats",
    "Topr",
    "Vespo",
    "a3po",
    "cispo",
    "clip_cov",
    "dapo",
    "dppo",
    "dr_grpo",
    "estimate_memory",
    "fork_tokens",
    "global_denominator",
    "gmpo",
    "group_advantages",
    "grpo",
    "gspo",
    "gspo_token",
    "kl_cov",
    "linear_min_p_token_logprobs",
    "linear_policy_loss",
    "linear_token_logprobs",
    "logprob_policy_loss",
    "lp_reg",
    "luspo",
    "min_p_token_logprobs",
    "multi_reward_advantages",
    "nsr",
    "plan_rows",
    "policy_loss",
    "presets",
    "psr",
    "rollout_correction",
    "sapo",
    "select_tokens",
    "token_logprobs",
    "topr",
    "vespo",
    "w_reinforce",
]
