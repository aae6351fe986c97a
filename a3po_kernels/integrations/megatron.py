"""Megatron-Core 0.18 to 0.19: log-probs, entropy and the policy loss as GPTModel's output processor; no logits.

    from a3po_kernels.integrations.megatron import HeadContext, output_processor

    out = model(
        input_ids, position_ids, attention_mask, labels=labels, output_processor=output_processor,
        output_processor_context=HeadContext(dapo(), advantages, old_logprobs=old, mask=mask, temperature=0.7),
    )
    out.policy.loss, out.logprobs

labels [B, S] are the tokens that the rows predict, as for Megatron's own loss. What forward returns is a HeadOutput, on
the last pipeline stage. Nothing is imported from Megatron, whose GPTModel calls the function by keywords.

Tensor parallelism, with and without sequence parallelism: the group, and whether the hidden states are split along the
sequence, are read from the output layer. dHidden is summed over its group here, once and in fp32, as the layer's own
backward would do it; every rank has the same statistics and the same loss, and calls backward on it. The weight's
gradient is returned to autograd, from which Megatron's data parallelism takes it. With gradient_accumulation_fusion it
takes none once the layer's own backward has run (of multi-token prediction, or of a micro-batch with Megatron's loss),
unless the weight says zero_out_wgrad, which is therefore set here. The rows that pad the vocabulary are in the softmax,
as in Megatron; HeadContext(vocab_size=) leaves them out.

Context parallelism: out.policy.loss is this rank's part, and the parts' sum over the context-parallel ranks is the
loss. Megatron's schedule takes it as it is: of (loss, metrics) it multiplies the loss by context_parallel_size, and its
data parallelism averages gradients over these ranks too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..losses.linear import linear_policy_loss
from ..losses.stages import PolicyLossOutput
from ..objectives import Objective
from ..ops.linear_token_logprobs import linear_token_logprobs
from ..parallel.groups import check_group, group_rank, group_size
from ._main_grad import keep_gradient

__all__ = ["HeadContext", "HeadOutput", "output_processor"]

# What the output layer and Megatron's arguments say.
_READ_HERE = ("objective", "bias", "logit_scale", "tp_group", "vocab_start", "hidden_layout", "grad_hidden")


class HeadContext:
    """What output_processor is to compute of one micro-batch: Megatron hands it over as output_processor_context."""

    def __init__(self, objective: Objective | str | None = None, advantages: Tensor | None = None, **options: Any):
        """The arguments of linear_policy_loss; without an objective, of linear_token_logprobs.

        Args:
            objective, advantages: of the policy loss, both or neither.
            options: any other keyword of the function: temperature, vocab_size, old_logprobs, mask, denominator, ...
                Per-token tensors are [B, S] like labels, this rank's. With cu_seqlens [R + 1], the offsets of the
                rollouts in one packed row, B is 1 and they are [S]. Under context parallelism all are of the tokens
                here, and what is per rollout is given alike on all ranks. cp_group is then the model's own, and
                positions those of Megatron's load balancing (rank r holds chunks r and 2 cp - 1 - r of the 2 cp that
                each row of the batch is cut into), unless given; packed rollouts need positions where an order matters.
                Excepted are bias, logit_scale, tp_group, vocab_start, hidden_layout and grad_hidden, which are read
                from the model.

        Raises:
            ValueError: one of objective and advantages without the other. TypeError: an unknown option.
        """
        if (objective is None) != (advantages is None):
            raise ValueError("HeadContext takes objective and advantages, or neither; got one of them")
        call = linear_token_logprobs if objective is None else linear_policy_loss
        known = [name for name in call.__kwdefaults__ or () if name not in _READ_HERE]
        for name in options:
            if name not in known:
                raise TypeError(f"unexpected option {name!r} of {call.__name__}; HeadContext takes {', '.join(known)}")
        self.objective, self.advantages, self.options = objective, advantages, options


@dataclass(frozen=True)
class HeadOutput:
    """What forward returns; no tuple, which Megatron's Float16Module would take apart.

    logprobs, entropy: [B, S] ([S] with cu_seqlens), fp32, nats, the same on all tensor-parallel ranks; differentiable,
    but for those beside a policy loss. policy: what linear_policy_loss returned, where the context has an objective.
    """

    logprobs: Tensor
    entropy: Tensor
    policy: PolicyLossOutput | None = None


def output_processor(
    *,
    hidden_states: Tensor,
    output_layer: nn.Module,
    output_weight: Tensor | None,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    input_ids: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    decoder_input: Tensor | None,
    inference_context: Any,
    packed_seq_params: Any,
    runtime_gather_output: bool | None,
    context: HeadContext | None,
    compute_language_model_loss: Callable[..., Tensor],
    scale_logits: Callable[[Tensor], Tensor],
    config: Any,
) -> HeadOutput:
    """Called by GPTModel after the last layer and the multi-token prediction, in the place of output layer and loss.

    Args:
        hidden_states: [S, B, H], or with sequence parallelism this rank's [S / tp, B, H].
        output_layer: a ColumnParallelLinear; its own forward is not called, the hooks before it are. output_weight:
            [V / tp, H] where it is tied, else None.
        labels: [B, S], int64. loss_mask: [B, S] or None: where it is 0 there is no token (log-prob and entropy 0).
        context: a HeadContext; None for log-probs and entropy at temperature 1.
        scale_logits: a multiplication (by mup_output_mult), which is read. config: Megatron's.
        input_ids, position_ids, attention_mask, decoder_input: what the model's body has used.
        compute_language_model_loss: what this replaces; a method of the model, whose context-parallel group it tells.
        packed_seq_params: with it a policy loss needs cu_seqlens in the context: its own offsets are those before
            context parallelism, and may leave out padding. Its cp_group, where it has one, is the batch's.

    Returns:
        HeadOutput.

    Raises:
        ValueError: what needs logits (labels None, an inference_context, runtime_gather_output=True), a policy loss
            under context parallelism whose cp_group is not known or of another size, a layer with hooks that its
            forward would run, scale_logits that is no multiplication, a weight that is split otherwise, multi-token
            prediction with gradient_accumulation_fusion under Megatron-FSDP. TypeError: a layer or context of another
            kind.
    """
    context = HeadContext() if context is None else context
    if not isinstance(context, HeadContext):
        raise TypeError(f"output_processor_context must be a HeadContext or None; got {type(context).__name__}")
    if labels is None:
        raise ValueError("labels must be [B, S], the tokens that the rows predict; got None, which asks for logits")
    if inference_context is not None:
        raise ValueError("inference_context must be None: inference wants logits, and none are formed")
    if runtime_gather_output:
        raise ValueError("runtime_gather_output must not be True: it asks for gathered logits, and none are formed")
    if getattr(config, "defer_embedding_wgrad_compute", False):
        raise ValueError("defer_embedding_wgrad_compute waits for the output layer's own backward; turn it off")
    _run_hooks(output_layer, hidden_states)
    weight = output_layer.weight if output_weight is None else output_weight
    if not isinstance(weight, Tensor) or isinstance(weight, DTensor) or getattr(output_layer, "gtp_remat_size", 1) > 1:
        raise ValueError(
            f"the output layer's weight must be this rank's [V / tp, H]; got {type(weight).__name__}, split otherwise "
            "or not here"
        )
    _check_fusion(output_layer, weight, config)
    keep_gradient(weight)
    options = {**context.options, **_head(output_layer, scale_logits)}
    if loss_mask is not None and loss_mask.shape != labels.shape:
        raise ValueError(f"loss_mask must have shape {list(labels.shape)}, as labels; got {list(loss_mask.shape)}")
    hidden = hidden_states.transpose(0, 1)
    if context.objective is None:
        if loss_mask is not None:
            labels = labels.masked_fill(loss_mask == 0, options.get("ignore_index", -100))
        stats = linear_token_logprobs(hidden, weight, labels, **options)
        return HeadOutput(stats.logprobs, stats.entropy)
    options |= _shared_rollouts(options, labels, packed_seq_params, compute_language_model_loss, config)
    if loss_mask is not None:
        if options.get("mask") is not None:
            raise ValueError("loss_mask and the context's mask both say which rows are tokens; give one")
        options["mask"] = loss_mask
    if options.get("cu_seqlens") is not None:
        if labels.shape[0] != 1:
            raise ValueError(f"cu_seqlens cuts one packed row: labels must have shape [1, S]; got {list(labels.shape)}")
        hidden, labels = hidden[0], labels[0]
        if loss_mask is not None:
            options["mask"] = loss_mask[0]
    elif packed_seq_params is not None:
        raise ValueError("a policy loss of packed rollouts (packed_seq_params) needs cu_seqlens in the context")
    assert context.advantages is not None
    out = linear_policy_loss(hidden, weight, labels, context.advantages, objective=context.objective, **options)
    return HeadOutput(out.logprobs, out.entropy, out)


def _run_hooks(layer: nn.Module, hidden: Tensor) -> None:
    """Runs what comes before the layer's forward: there Megatron's overlap_param_gather waits for the weight."""
    if not isinstance(layer, nn.Module) or not hasattr(layer, "sequence_parallel") or not hasattr(layer, "tp_group"):
        raise TypeError(f"output_layer must be a ColumnParallelLinear of Megatron-Core; got {type(layer).__name__}")
    if layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        raise ValueError(f"{type(layer).__name__} has hooks around its forward or backward, which would not run")
    for key, hook in list(layer._forward_pre_hooks.items()):
        found = hook(layer, (hidden,), {}) if key in layer._forward_pre_hooks_with_kwargs else hook(layer, (hidden,))
        if found is not None:
            raise ValueError(f"a hook before {type(layer).__name__}'s forward changes its input; it must not")


def _check_fusion(layer: nn.Module, weight: Tensor, config: Any) -> None:
    """Megatron-FSDP drops what is returned beside a fused gradient, whatever the weight says (see keep_gradient)."""
    fused = getattr(layer, "gradient_accumulation_fusion", False)
    predicts = getattr(config, "mtp_num_layers", None) and not getattr(config, "mtp_detach_heads", False)
    if fused and predicts and getattr(weight, "__fsdp_param__", False):
        raise ValueError(
            "gradient_accumulation_fusion with mtp_num_layers under Megatron-FSDP drops every gradient of the output "
            "layer's weight but the fused one: turn the fusion off, or set mtp_detach_heads"
        )


def _head(layer: nn.Module, scale_logits: Callable[[Tensor], Tensor]) -> Mapping[str, Any]:
    """The keywords that the output layer decides. config.sequence_parallel may be on where the layer has it off."""
    split = layer.sequence_parallel
    own: dict[str, Any] = {
        "logit_scale": _scale(scale_logits), "tp_group": layer.tp_group,
        "hidden_layout": "sequence_sharded" if split else "replicated",
    }  # fmt: skip
    if not split and getattr(layer, "disable_grad_reduce", False):
        own["grad_hidden"] = "partial"  # its maker sums
    if getattr(layer, "bias", None) is not None and not getattr(layer, "skip_bias_add", False):
        own["bias"] = layer.bias
    return own


def _shared_rollouts(
    options: Mapping[str, Any], labels: Tensor, packed: Any, loss: Callable[..., Tensor], config: Any
) -> Mapping[str, Any]:
    """cp_group and positions of a policy loss; none where each rollout is whole here."""
    ranks = getattr(packed, "local_cp_size", None)  # dynamic context parallelism: of this batch alone
    ranks = int(getattr(config, "context_parallel_size", 1) if ranks is None else ranks)
    group = options.get("cp_group")
    check_group("cp_group", group)
    if group is None and ranks > 1:
        group = getattr(packed, "cp_group", None)
        if group is None:
            group = getattr(getattr(getattr(loss, "__self__", None), "pg_collection", None), "cp", None)
        if group is None:
            raise ValueError(
                f"a policy loss under context parallelism ({ranks} ranks) needs cp_group in the context: the model "
                "tells none"
            )
    found = 1 if group is None else group_size(group)
    if found != ranks:
        raise ValueError(f"cp_group must hold the {ranks} context-parallel ranks; got a group of {found}")
    if ranks == 1:
        return {}
    if options.get("positions") is not None or options.get("cu_seqlens") is not None:
        return {"cp_group": group}
    length = labels.shape[1]
    if length % 2:
        raise ValueError(
            f"labels [B, S] of Megatron's load balancing have an even S, or need positions; got S = {length}"
        )
    half, rank = length // 2, group_rank(group)
    chunks = [torch.arange(half, device=labels.device) + half * chunk for chunk in (rank, 2 * ranks - 1 - rank)]
    return {"cp_group": group, "positions": torch.cat(chunks).expand(labels.shape)}


def _scale(scale_logits: Callable[[Tensor], Tensor]) -> float:
    """What scale_logits multiplies by, tried on the CPU, where it costs a GPU no wait."""
    probe = torch.tensor([-40.0, -1.0, 0.0, 1.0, 41.0], dtype=torch.float64)
    scaled = scale_logits(probe.clone())
    scale = float(scaled[3])
    if not torch.allclose(scaled, probe * scale, rtol=1e-12, atol=0.0):
        raise ValueError(f"scale_logits must be a multiplication; it makes {scaled.tolist()} of {probe.tolist()}")
    return scale
