"""Fused loss heads for reinforcement learning with verifiable rewards: logits to loss, gradient and metrics."""

from .losses.advantages import group_advantages, multi_reward_advantages
from .losses.linear import LinearPolicyLoss, linear_policy_loss
from .losses.logits import PolicyLoss, policy_loss
from .losses.logprobs import logprob_policy_loss
from .losses.rollout_correction import RolloutCorrection, rollout_correction
from .losses.rows import RowPlan, plan_rows
from .losses.stages import PolicyLossOutput
from .named_objectives import (
    a3po,
    cispo,
    dapo,
    dr_grpo,
    fork_tokens,
    grpo,
    gspo,
    lp_reg,
    nsr,
    presets,
    psr,
    sapo,
    w_reinforce,
)
from .objectives import (
    Cispo,
    Clip,
    CustomSurrogate,
    MinPRegularizer,
    Objective,
    PolarityWeights,
    Reinforce,
    Sapo,
    TokenRule,
)
from .ops.linear_min_p import linear_min_p_token_logprobs
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.min_p import min_p_token_logprobs
from .ops.select_tokens import select_tokens
from .ops.token_logprobs import TokenStats, token_logprobs
from .planning import estimate_memory
from .schedules import Constant, CosineDecay, ExponentialDecay, LinearDecay

__version__ = "0.1.0"

__all__ = [
    "Cispo",
    "Clip",
    "Constant",
    "CosineDecay",
    "CustomSurrogate",
    "ExponentialDecay",
    "LinearDecay",
    "LinearPolicyLoss",
    "MinPRegularizer",
    "Objective",
    "PolarityWeights",
    "PolicyLoss",
    "PolicyLossOutput",
    "Reinforce",
    "RolloutCorrection",
    "RowPlan",
    "Sapo",
    "TokenRule",
    "TokenStats",
    "a3po",
    "cispo",
    "dapo",
    "dr_grpo",
    "estimate_memory",
    "fork_tokens",
    "group_advantages",
    "grpo",
    "gspo",
    "linear_min_p_token_logprobs",
    "linear_policy_loss",
    "linear_token_logprobs",
    "logprob_policy_loss",
    "lp_reg",
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
    "w_reinforce",
]
