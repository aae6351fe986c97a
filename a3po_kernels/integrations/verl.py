"""verl 0.9: this package's objectives as policy losses, and its head in place of verl's fused ones.

Loading it through verl's hook for external modules registers every preset and puts the head in place:

    VERL_USE_EXTERNAL_MODULES=a3po_kernels.integrations.verl python -m verl.trainer.main_ppo \\
        actor_rollout_ref.actor.policy_loss.loss_mode=a3po actor_rollout_ref.model.use_fused_kernels=True ...

A preset whose name verl has taken (gspo, cispo, sapo) is registered as a3po_gspo and so on; verl's stay as they are.

use_fused_kernels=True calls the head whatever fused_kernel_options.impl_backend says: 'torch', verl's default, and
'liger' call FusedLinearForPPO, 'triton' and the Megatron engine linear_cross_entropy, and both are replaced. Not
replaced: what the VeOmni engine's models compute themselves, and Kimi-VL, whose forward verl leaves as it is. verl's
forwards hand over the head's weight alone: they leave a bias, a softcap and a logit scale out, with either head.

The Megatron engine may split the head over tensor-parallel ranks, with and without sequence parallelism: see
linear_cross_entropy and install_head.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, register_policy_loss
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel import linear_cross_entropy as verl_head

from ..losses.logprobs import logprob_policy_loss
from ..named_objectives import CovarianceCandidates, as_objective, presets
from ..objectives import Cispo, Clip, Dppo, Gmpo, Objective, Sapo, TokenRule
from ..ops.linear_token_logprobs import linear_token_logprobs
from ._main_grad import keep_gradient
from ._steps import OptimizerSteps
from ._verl_megatron import FUSED, OVERLAP, AfterImport, grad_hidden, guard_overlap, replace_fused_forward

__all__ = ["install_head", "linear_cross_entropy", "register_objective", "set_step", "training_step"]

_AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


_steps = OptimizerSteps()


def training_step() -> int:
    """The step at which schedules stand in this process."""
    return _steps.step


def set_step(step: int) -> None:
    """Sets the training step, for a run that resumes; verl passes none to its policy losses, so it is counted here.

    It counts optimizer steps that follow a policy loss. The environment variable A3PO_INITIAL_STEP sets its start.

    Raises:
        ValueError: step is no integer of at least 0.
    """
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer of at least 0; got {step!r}")
    _steps.step = step


def _denominator(mode: str, mask: Tensor, info: dict[str, Any]) -> Tensor | float | None:
    """verl's divisor of a sum over this micro-batch, from its global batch info, or None for this micro-batch's own."""
    ranks = info.get("dp_size") or 1
    if mode == "token-sum":
        return 1.0 / ranks
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count = info.get(name)
    if count is None:
        if ranks > 1:
            raise ValueError(f"{name} is required when dp_size > 1")
        if mode != "seq-mean-token-sum-norm":
            return None
        # verl counts the rollouts that have a token.
        count = (mask != 0).any(-1).sum()
    horizon = 1.0
    if mode == "seq-mean-token-sum-norm":
        horizon = info.get("loss_scale_factor") or mask.shape[-1]
    return count * (horizon / ranks)


def _with_bounds(objective: Objective, config: Any) -> Objective:
    """The objective with the clipping bounds, dual clip and temperatures of verl's actor configuration."""
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    surrogate = objective.surrogate
    if isinstance(surrogate, Clip) and objective.low_probability is None:
        # verl's GSPO and Clip-Cov have no dual clip.
        covariance = any(isinstance(getattr(r, "metric", None), CovarianceCandidates) for r in objective.shaping)
        dual = None if objective.ratio_level != "token" or covariance else config.get("clip_ratio_c", 3.0)
        surrogate = Clip(low, high, dual, surrogate.delta)
    elif isinstance(surrogate, Cispo):
        surrogate = Cispo(1.0 + high, low)
    elif isinstance(surrogate, Sapo):
        surrogate = Sapo(config.tau_pos, config.tau_neg)
    elif isinstance(surrogate, Dppo):
        surrogate = Dppo(surrogate.divergence, low, high, config.get("clip_ratio_c", 3.0))
    elif isinstance(surrogate, Gmpo):
        surrogate = Gmpo(low, high)
    shaping = tuple(
        replace(rule, metric=replace(rule.metric, clip=surrogate))
        if isinstance(rule, TokenRule) and isinstance(rule.metric, CovarianceCandidates) and isinstance(surrogate, Clip)
        else rule
        for rule in objective.shaping
    )
    return replace(objective, surrogate=surrogate, shaping=shaping)


def _needs_more_than_logprobs(objective: Objective) -> str | None:
    """What an objective reads that verl's hook does not pass, if anything."""
    if objective.low_probability is not None:
        return "the min-p proxy of the old policy"
    if objective.entropy_coef or any(isinstance(r, TokenRule) and r.metric == "entropy" for r in objective.shaping):
        return "the policy's entropy"
    if any(isinstance(r, TokenRule) and not r.reads_policy for r in objective.shaping):
        return "scores of the caller's"
    return "the reference policy's log-probs" if objective.kl_coef else None


def register_objective(name: str, objective: Objective | str, *, bounds_from_config: bool = True) -> Callable[..., Any]:
    """Registers an objective, or a preset by its name, as verl's policy loss `name` and returns the function.

    The function has verl's signature. Aggregation is verl's loss_agg_mode with its global batch info (SAPO's is
    seq-mean-token-mean, as in verl), and with `bounds_from_config` the clipping bounds, clip_ratio_c and tau_pos and
    tau_neg of the actor's configuration replace the objective's own. KL and entropy terms are verl's (kl_loss_coef,
    entropy_coeff). Token weights come from old_log_prob and the sign of the advantages. Where verl gives a count, of
    all tokens or rollouts, that is the divisor, with normalize_over "selected" too.

    Args:
        name: what policy_loss.loss_mode calls it.
        objective: an Objective, or a preset's name.
        bounds_from_config: False leaves the objective's own bounds.

    Raises:
        ValueError: for an objective that reads what verl does not pass: an entropy, a min-p proxy, a KL term.
    """
    objective = as_objective(objective)
    missing = _needs_more_than_logprobs(objective)
    if missing is not None:
        raise ValueError(f"{name} reads {missing}, which verl's policy losses do not receive")

    def policy_loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        if config is None:
            raise ValueError("config must be verl's ActorConfig; got None")
        if loss_agg_mode not in _AGGREGATIONS:
            raise ValueError(f"loss_agg_mode must be one of {', '.join(_AGGREGATIONS)}; got {loss_agg_mode!r}")
        chosen = _with_bounds(objective, config) if bounds_from_config else objective
        mode = "seq-mean-token-mean" if isinstance(chosen.surrogate, Sapo) else loss_agg_mode
        chosen = replace(chosen, aggregation="token-mean" if mode == "token-sum" else mode)
        out = logprob_policy_loss(
            log_prob, advantages.expand_as(log_prob), objective=chosen, old_logprobs=old_log_prob, mask=response_mask,
            importance_weights=None if rollout_is_weights is None else rollout_is_weights.expand_as(log_prob),
            denominator=_denominator(mode, response_mask, config.global_batch_info), step=_steps.step,
        )  # fmt: skip
        _steps.pending |= log_prob.requires_grad
        names = {
            "actor/ppo_kl": out.metrics["approx_kl"],
            "actor/pg_clipfrac": out.metrics["clip_fraction_low"] + out.metrics["clip_fraction_high"],
            "actor/pg_clipfrac_lower": out.metrics["dual_clip_fraction"],
            "actor/active_fraction": out.metrics["active_fraction"],
        }
        if chosen.shaping:
            names["actor/selected_fraction_positive"] = out.metrics["selected_fraction_positive"]
            names["actor/selected_fraction_negative"] = out.metrics["selected_fraction_negative"]
            names["actor/weight_beta"] = out.metrics["weight"]
        values = torch.stack([value.float() for value in names.values()]).tolist()
        return out.loss, dict(zip(names, values, strict=True))

    policy_loss.__name__ = policy_loss.__qualname__ = f"compute_policy_loss_{name}"
    return register_policy_loss(name)(policy_loss)


def _check_whole(name: str, weight: Tensor) -> None:
    """Raises ValueError for a weight that FSDP2 or tensor parallelism has split."""
    if isinstance(weight, DTensor):
        raise ValueError(
            f"{name} is a DTensor ({weight.placements}), a slice of the head: FSDP2 has wrapped an untied head by "
            "itself, and verl's fused forwards read its weight from outside; use strategy=fsdp or a tied head"
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """linear_cross_entropy of verl 0.9.1 (verl.utils.kernel) by linear_token_logprobs, on any device.

    verl gives it neither mask nor advantages: no rows can be planned (see plan_rows), and on a GPU forward waits once.

    Args:
        hidden: [..., H]; weight: [V, H]; labels: [...]: hidden's row i predicts labels[i].
        temperature: what the logits are divided by.
        reduction: "none", "sum" or "mean" of the log-probs over all rows.
        dist_process_group: the tensor-parallel group, whose ranks hold equal parts [V / tp, H] of the head in rank
            order, and the same rows and labels (of the whole vocabulary). Each rank's dHidden is then its part of a
            sum that is left to the caller, as verl's kernel leaves it: under sequence parallelism the gather of the
            hidden states sums in backward. Called by verl's forward for Megatron-Core below 0.18 without sequence
            parallelism, where nothing else does, it sums; from 0.18 on the output processor does (install_head).

    Returns:
        (log-probs of the labels, fp32, [N] or reduced to 0-d; entropy, fp32 [N]), nats, rows flattened as in verl, the
        same on all ranks.

    Raises:
        ValueError: a DTensor as weight, an unknown reduction.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean'; got {reduction!r}")
    _check_whole("weight", weight)
    keep_gradient(weight)
    stats = linear_token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), temperature=temperature,
        tp_group=dist_process_group, grad_hidden=None if dist_process_group is None else grad_hidden.get(),
    )  # fmt: skip
    logprobs = stats.logprobs
    if reduction != "none":
        logprobs = logprobs.sum() if reduction == "sum" else logprobs.mean()
    return logprobs, stats.entropy


_CHUNK_SIZE = inspect.signature(FusedLinearForPPO).parameters["chunk_size"].default


def _fused_linear_for_ppo(
    self: FusedLinearForPPO, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """FusedLinearForPPO.forward by linear_token_logprobs, for each of its impl_backends.

    A chunk_size that is not verl's default bounds the tile of logits to the bytes of so many rows in fp32.

    Args:
        hidden_states: [..., H]; vocab_weights: [V, H]; input_ids: [...]: row i predicts input_ids[i].
        temperature: what the logits are divided by, a number.

    Returns:
        (log-probs of input_ids, entropy), fp32 [...], nats. verl's torch backend rounds the logits and the entropy to
        the dtype of hidden_states.

    Raises:
        ValueError: input_ids of another shape; a DTensor as vocab_weights.
    """
    if input_ids.shape != hidden_states.shape[:-1]:
        raise ValueError(f"input_ids must have shape {list(hidden_states.shape[:-1])}; got {list(input_ids.shape)}")
    _check_whole("vocab_weights", vocab_weights)
    bound = None if self.chunk_size == _CHUNK_SIZE else 4 * self.chunk_size * vocab_weights.shape[0]
    stats = linear_token_logprobs(
        hidden_states, vocab_weights, input_ids, temperature=temperature, max_chunk_bytes=bound
    )
    return stats.logprobs, stats.entropy


def install_head() -> None:
    """Puts our head in the place of verl's: linear_cross_entropy, and the forward of the class FusedLinearForPPO.

    The function is replaced in its own module and in those of verl that have imported it, under whatever name; the
    class stays the class it is, so that who has imported it, or holds an instance, calls our head too. The Megatron
    engine's output processor is replaced when its module is imported, by one that sums dHidden over the tensor-parallel
    ranks whether sequence parallelism is on or off.
    """
    FusedLinearForPPO.forward = _fused_linear_for_ppo
    AfterImport(FUSED, replace_fused_forward).install()
    AfterImport(OVERLAP, guard_overlap).install()
    theirs = verl_head.linear_cross_entropy
    if theirs is linear_cross_entropy:
        return
    for name, module in list(sys.modules.items()):
        if name.startswith("verl."):
            for alias in [key for key, value in vars(module).items() if value is theirs]:
                vars(module)[alias] = linear_cross_entropy


def _register_presets() -> None:
    for name, preset in presets.items():
        objective = preset()
        if _needs_more_than_logprobs(objective) is None:
            register_objective(f"a3po_{name}" if name in POLICY_LOSS_REGISTRY else name, objective)


_register_presets()
install_head()
