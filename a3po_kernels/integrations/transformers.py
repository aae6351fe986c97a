"""Policy losses of transformers causal LMs: the model runs as it is, and its head computes the loss, not logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import INDEX_DTYPES, check_mask_values
from ..losses.linear import linear_policy_loss
from ..losses.rows import RowPlan, plan_rows
from ..losses.stages import PolicyLossOutput
from ..objectives import Objective
from ..ops.linear_min_p import linear_min_p_token_logprobs
from ..ops.linear_token_logprobs import linear_token_logprobs
from ..ops.token_logprobs import TokenStats
from ._batch_keys import OWN, PER_TOKEN, check_call, check_keys, check_not_packed, check_tensors, model_arguments
from ._lm_head import head_keywords, run_head, swap_head, unwrap

__all__ = [
    "check_head",
    "head_keywords",
    "min_p_logprobs_from_model",
    "plan_rows_from_batch",
    "policy_loss_from_model",
    "swap_head",
    "token_logprobs_from_model",
]


def _completions(model: nn.Module, batch: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """targets [B, T] and mask [B, T] bool of the last T columns, checked, as the call's keywords are."""
    check_call(model, batch, options)
    check_keys(batch, model)
    check_tensors(batch, "input_ids", "completion_mask")
    ids, mask, seen = batch["input_ids"], batch["completion_mask"], batch.get("attention_mask")
    if ids.ndim != 2:
        raise ValueError(f"batch['input_ids'] must have shape [B, L]; got {list(ids.shape)}")
    if ids.dtype not in INDEX_DTYPES:
        raise TypeError(f"batch['input_ids'] must be int32 or int64; got {ids.dtype}")
    if isinstance(seen, Tensor) and seen.ndim == 2 and seen.shape != ids.shape:
        raise ValueError(
            f"batch['attention_mask'] must have shape {list(ids.shape)}, as input_ids: of prompts and responses; got "
            f"{list(seen.shape)}"
        )
    check_not_packed(batch)
    check_mask_values("batch['completion_mask']", mask, False)
    length = mask.shape[-1] if mask.ndim == 2 else -1
    if mask.shape[:1] != ids.shape[:1] or not 1 <= length < ids.shape[1]:
        raise ValueError(
            f"batch['completion_mask'] must have shape [{ids.shape[0]}, T] with 1 <= T < {ids.shape[1]}: it marks the "
            f"last T columns of input_ids, and the first column has nothing before it; got {list(mask.shape)}"
        )
    return ids[:, -length:], mask.bool()


def _run(model: nn.Module, batch: Mapping[str, Any], length: int, compute) -> tuple[Any, Any]:
    """(what compute(hidden [B, T, H], **head) gives on the rows that predict the last `length` tokens, the output)."""
    inputs = {name: value for name, value in batch.items() if name not in OWN}
    inputs["input_ids"] = batch["input_ids"]
    if batch.get("attention_mask") is not None:
        inputs["attention_mask"] = batch["attention_mask"]
    if "logits_to_keep" in model_arguments(model)[0]:
        inputs.setdefault("logits_to_keep", length + 1)
    inputs.setdefault("use_cache", False)
    rollouts, columns = batch["input_ids"].shape

    def on_completions(hidden: Tensor, **head):
        if hidden.ndim != 3 or hidden.shape[0] != rollouts or hidden.shape[1] not in (length + 1, columns):
            raise ValueError(
                f"the head got hidden states of shape {list(hidden.shape)} for {rollouts} x {columns} tokens: "
                "prompt-learning adapters and models that change the length are not supported"
            )
        return compute(hidden[:, -length - 1 : -1], **head)

    return run_head(model, on_completions, inputs)


def plan_rows_from_batch(
    batch: Mapping[str, Any], objective: Objective | str, *, device: torch.device | str | None = None
) -> RowPlan:
    """plan_rows of a batch, for policy_loss_from_model(..., plan=): its rows are those of completion_mask [B, T].

    Make it where the rollouts are scored, of each micro-batch that the loss gets and in its order. The loss then waits
    for nothing on a GPU; this waits once, or not at all where completion_mask is on the CPU, as `advantages` then are.

    Args:
        batch: completion_mask [B, T], bool or 0/1, advantages [B] or [B, T] and, if the loss gets it, polarity; nothing
            else is read. completion_mask must have every token of the loss's; one that the loss leaves out is harmless.
        objective: the loss's.
        device: where the model's head will run; completion_mask's by default.

    Raises:
        TypeError, ValueError: an entry that is missing, or of the wrong shape, dtype, device or range.
    """
    check_tensors(batch, "completion_mask", "advantages")
    mask, polarity = batch["completion_mask"], batch.get("polarity")
    if mask.ndim != 2:
        raise ValueError(f"batch['completion_mask'] must have shape [B, T]; got {list(mask.shape)}")
    return plan_rows(
        mask, batch["advantages"].to(mask.device), objective=objective, device=device,
        polarity=None if polarity is None else polarity.to(mask.device),
    )  # fmt: skip


def policy_loss_from_model(
    model: nn.Module,
    batch: Mapping[str, Any],
    objective: Objective | str,
    *,
    plan: RowPlan | None = None,
    aux_loss_coef: float | None = None,
    **options: Any,
) -> PolicyLossOutput:
    """linear_policy_loss of a causal LM's responses: one forward of the model, and no logits.

    The head's weight, bias, LoRA adapter, softcap and logit scale are the model's own. The model may be tied, have PEFT
    adapters, checkpoint its gradients, have a tensor-parallel plan (of whose ranks all get the same batch), and be
    wrapped in DistributedDataParallel, FSDP2, DeepSpeed (up to ZeRO-3) or torch.compile. That its logits are what was
    read is checked in the first forward, here and in the functions below, which waits for a GPU.

    Args:
        model: a transformers causal LM, or a vision-language model, whose text head it is then.
        batch: input_ids [B, L]; attention_mask [B, L], if any; completion_mask [B, T], bool or 0/1: which of the last T
            columns of input_ids are tokens of the response; advantages [B] or [B, T]; and, where the objective wants
            them, old_logprobs, ref_logprobs, old_entropy, min_p_logprobs [B, T], polarity and importance_weights
            [B] or [B, T]. Other arguments of the model's forward go to it as they are (position_ids,
            output_router_logits, pixel_values and image_grid_thw of this batch's images, token_type_ids [B, L], ...);
            an entry that neither reads is a ValueError, and so are labels.
        objective: from a preset (a3po(), dapo(), ...) or composed; or a preset's name.
        plan: plan_rows_from_batch's of this batch, with which the head waits for nothing on a GPU; without one it waits
            once, for how many rows may have a gradient.
        aux_loss_coef: of a mixture-of-experts' load-balancing loss, which is added where the model gives one (pass
            output_router_logits=True in batch); by default the config's router_aux_loss_coef.
        options: keywords of linear_policy_loss that neither the head nor the batch gives: step, temperature,
            denominator, route, ...

    Packed rollouts, ids [1, L] with position_ids that begin anew at each of them, cu_seqlens [S + 1] and mask [1, L] of
    the response's tokens, go through swap_head, without an attention_mask. Row i predicts token i + 1:

        ends = cu_seqlens.clone()
        ends[1:] -= 1
        with swap_head(model, lambda hidden, **head: linear_policy_loss(
            hidden[0, :-1], targets=ids[0, 1:], mask=mask[0, 1:], cu_seqlens=ends, advantages=advantages,
            objective=a3po(), **head,
        )) as results:
            model(input_ids=ids, position_ids=position_ids, use_cache=False)
        results[0].loss.backward()

    Returns:
        PolicyLossOutput; logprobs, entropy and weights are [B, T]. metrics["aux_loss"] is there if it was added.

    Raises:
        TypeError, ValueError: for an entry of the batch that is missing, no tensor or read by nobody, for a head that
            cannot be read (see swap_head), for a model that does something else to its logits, and as
            linear_policy_loss does.
    """
    targets, mask = _completions(model, batch, options)
    check_tensors(batch, "advantages")
    given = {name: batch[name] for name in PER_TOKEN if batch.get(name) is not None}
    check_tensors(given, *given)

    def compute(hidden: Tensor, **head) -> PolicyLossOutput:
        device = hidden.device
        tensors = {name: value.to(device) for name, value in given.items()}
        return linear_policy_loss(
            hidden, targets=targets.to(device), advantages=batch["advantages"].to(device), mask=mask.to(device),
            objective=objective, plan=plan.to(device) if isinstance(plan, RowPlan) else plan, **tensors, **head,
            **options,
        )  # fmt: skip

    result, output = _run(model, batch, targets.shape[1], compute)
    aux_loss = getattr(output, "aux_loss", None)
    if aux_loss is None:
        return result
    if aux_loss_coef is None:
        aux_loss_coef = getattr(unwrap(model).config.get_text_config(), "router_aux_loss_coef", 0.0)
    total = result.loss + aux_loss_coef * aux_loss.to(result.loss.device)
    return result._replace(loss=total, metrics={**result.metrics, "aux_loss": aux_loss.detach()})


def token_logprobs_from_model(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> TokenStats:
    """linear_token_logprobs of a causal LM's responses, for old and reference log-probs: TokenStats, each [B, T].

    Args:
        model: a transformers causal LM; its head's weight, bias, LoRA adapter, softcap and logit scale are read.
        batch: input_ids [B, L]; attention_mask [B, L], if any; completion_mask [B, T], bool or 0/1: which of the last T
            columns are tokens of the response; rows that it leaves out are 0. Other arguments of the model's forward
            go to it as they are; an entry that neither reads is a ValueError.
        options: keywords of linear_token_logprobs that are not the head's: temperature, compaction, ...

    Raises:
        TypeError, ValueError: an entry of the batch that is missing, no tensor or read by nobody, or a head that cannot
            be read.
    """
    targets, mask = _completions(model, batch, options)
    masked = targets.masked_fill(~mask, options.get("ignore_index", -100))

    def compute(hidden: Tensor, **head) -> TokenStats:
        return linear_token_logprobs(hidden, targets=masked.to(hidden.device), **head, **options)

    return _run(model, batch, targets.shape[1], compute)[0]


def min_p_logprobs_from_model(model: nn.Module, batch: Mapping[str, Any], min_p: float, **options: Any) -> Tensor:
    """linear_min_p_token_logprobs of a causal LM's responses, Lp-Reg's proxy under the old policy: [B, T], nats.

    Args:
        model: a transformers causal LM; its head's weight, bias, LoRA adapter, softcap and logit scale are read.
        batch: input_ids [B, L]; attention_mask [B, L], if any; completion_mask [B, T], bool or 0/1: which of the last T
            columns are tokens of the response; rows that it leaves out are 0. Other arguments of the model's forward
            go to it as they are; an entry that neither reads is a ValueError.
        min_p: kappa, in (0, 1].
        options: keywords of linear_min_p_token_logprobs that are not the head's.

    Raises:
        TypeError, ValueError: an entry of the batch that is missing, no tensor or read by nobody, a head that cannot be
            read, or min_p out of range.
    """
    targets, mask = _completions(model, batch, options)
    masked = targets.masked_fill(~mask, options.get("ignore_index", -100))

    def compute(hidden: Tensor, **head) -> Tensor:
        return linear_min_p_token_logprobs(hidden, targets=masked.to(hidden.device), min_p=min_p, **head, **options)

    return _run(model, batch, targets.shape[1], compute)[0]


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Raises ValueError unless the head as it is read from the config gives the model's own logits.

    A model may transform its logits by a rule that its config spells in a way this package does not know. The functions
    above check a head when they first meet it; this does so at once, by a forward of a few tokens without dropout. Call
    it before the model is wrapped; a head that is partitioned by then is a ValueError too.
    """
    weight = head_keywords(model)["weight"]
    if weight.ndim != 2:
        raise ValueError(
            f"the head's weight has shape {list(weight.shape)} outside of its own forward: it is partitioned "
            "(DeepSpeed ZeRO-3, for one), and the first forward of the functions here checks it"
        )
    ids = torch.arange(8, device=weight.device).unsqueeze(0) % weight.shape[0]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        run_head(model, lambda hidden, **head: None, {"input_ids": ids, "use_cache": False}, again=True)
    finally:
        for module in training:
            module.training = True
