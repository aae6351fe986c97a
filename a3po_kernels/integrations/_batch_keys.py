"""The entries of a batch of policy_loss_from_model: each is the loss's, or an argument of the model, or refused."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import Tensor, nn

from ..core.checks import did_you_mean, nearest
from ..core.operators import reads_values
from ..objectives import Objective
from ._lm_head import unwrap

PER_TOKEN = ("old_logprobs", "ref_logprobs", "polarity", "old_entropy", "min_p_logprobs", "importance_weights")
OWN = ("input_ids", "attention_mask", "completion_mask", "advantages", *PER_TOKEN)

_PACKED = (
    "packed rollouts are not read from a batch: swap_head(model, lambda hidden, **head: linear_policy_loss(...)) with "
    "cu_seqlens takes them, as the docstring of policy_loss_from_model shows"
)
# What transformers' models read from a **kwargs that says nothing.
_UNNAMED = {
    "output_hidden_states", "output_attentions", "output_router_logits", "position_ids", "is_causal", "return_dict",
}  # fmt: skip
_KEYWORD = "is a keyword of the call, not an entry of the batch"
# Names that trainers give to what is spelled otherwise here, and what to do with them.
_ELSEWHERE = {
    **dict.fromkeys(
        ("old_per_token_logps", "old_logps", "old_log_prob", "old_log_probs", "action_log_probs"), "old_logprobs"
    ),
    **dict.fromkeys(
        ("ref_per_token_logps", "ref_logps", "ref_log_prob", "ref_log_probs", "reference_logprobs",
         "base_action_log_probs"), "ref_logprobs",
    ),
    **dict.fromkeys(("response_mask", "loss_mask", "action_mask", "mask"), "completion_mask"),
    **dict.fromkeys(("importance_sampling_ratio", "rollout_is_weights"), "importance_weights"),
}  # fmt: skip
_REASONS = {
    "labels": "the targets are the last columns of input_ids, and completion_mask says which of them are tokens; "
    "leave it out",
    "num_items_in_batch": "is the keyword denominator= of the call, not an entry of the batch",
    **dict.fromkeys(("step", "temperature", "denominator", "objective", "plan", "max_length"), _KEYWORD),
    **dict.fromkeys(("prompt_ids", "completion_ids"), "input_ids is torch.cat([prompt_ids, completion_ids], 1)"),
    **dict.fromkeys(("prompt_mask",), "attention_mask is torch.cat([prompt_mask, completion_mask], 1)"),
    **dict.fromkeys(
        ("sampling_per_token_logps", "rollout_log_probs"), "rollout_correction makes importance_weights of it"
    ),
    **dict.fromkeys(
        ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"), _PACKED
    ),
}  # fmt: skip


# Keywords of the losses that the batch and the model's head give, and where they come from.
_NOT_OPTIONS = {
    "mask": "batch['completion_mask']", "targets": "the last columns of batch['input_ids']",
    **{name: f"batch[{name!r}]" for name in ("advantages", *PER_TOKEN)},
    **dict.fromkeys(("hidden", "weight", "bias", "lora", "softcap", "logit_scale"), "read from the model"),
}  # fmt: skip


def check_call(model: object, batch: object, options: Mapping[str, Any]) -> None:
    """Raises TypeError for a model or a batch of another kind, and for a keyword that comes from one of the two."""
    if not isinstance(model, nn.Module):
        hint = ": model and batch are the wrong way round" if isinstance(batch, nn.Module) else ""
        raise TypeError(f"model must be a causal LM of transformers; got {type(model).__name__}{hint}")
    if not isinstance(batch, Mapping):
        hint = ": it comes before the objective" if isinstance(batch, Objective | str) else ""
        raise TypeError(f"batch must be a mapping of names to tensors; got {type(batch).__name__}{hint}")
    for name in options:
        if name in _NOT_OPTIONS:
            raise TypeError(f"{name} is no keyword here: it is {_NOT_OPTIONS[name]}")


def model_arguments(model: nn.Module) -> tuple[set[str], str]:
    """The keywords that a causal LM's forward takes by name, or in the typed dictionary of its **kwargs; its class."""
    outer = unwrap(model)
    inner = getattr(outer, "get_base_model", lambda: outer)()
    names = set() if inner is outer else {"adapter_names"}  # which PEFT's hooks read
    for parameter in inspect.signature(inner.forward, eval_str=False).parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            names.add(parameter.name)
            continue
        kinds = [parameter.annotation, *get_args(parameter.annotation)]
        names |= {key for kind in kinds for key in getattr(kind, "__annotations__", ())} | _UNNAMED
    return names, type(inner).__name__


def check_keys(batch: Mapping[str, Any], model: nn.Module) -> None:
    """Raises ValueError for an entry that neither the loss nor the model would read, with the name it should have."""
    names, kind = model_arguments(model)
    for key, value in batch.items():
        if key in OWN or value is None:
            continue
        if key in _REASONS:
            raise ValueError(f"batch[{key!r}]: {_REASONS[key]}")
        if key in names:
            continue
        raise ValueError(
            f"batch[{key!r}] is read neither by the loss nor by {kind}.forward{_hint(key, [*OWN, *sorted(names)])}"
        )


def _hint(key: str, known: Iterable[str]) -> str:
    if key in _ELSEWHERE:
        return f": here it is {_ELSEWHERE[key]!r}"
    return did_you_mean(key, known) or f"; the loss reads {', '.join(OWN)}"


def check_tensors(batch: Mapping[str, Any], *names: str) -> None:
    """Raises TypeError for an entry that is missing, or no tensor."""
    for name in names:
        if name not in batch:
            near = nearest(name, [str(key) for key in batch if key not in OWN])
            hint = f"; is it {near!r}?" if near else f"; it has {', '.join(map(str, batch))}"
            raise TypeError(f"batch must have {name!r}{hint}")
        if not isinstance(batch[name], Tensor):
            raise TypeError(f"batch[{name!r}] must be a tensor; got {type(batch[name]).__name__}")


def check_not_packed(batch: Mapping[str, Any]) -> None:
    """Raises ValueError for position ids that begin anew within a row, on the CPU: one row would be one rollout."""
    places, seen = batch.get("position_ids"), batch.get("attention_mask")
    if not isinstance(places, Tensor) or places.ndim != 2 or not reads_values(places, False):
        return
    restarts = places[:, 1:] < places[:, :-1]
    if isinstance(seen, Tensor) and seen.shape == places.shape:
        restarts = restarts & (seen[:, 1:] != 0).to(restarts.device) & (seen[:, :-1] != 0).to(restarts.device)
    if bool(restarts.any()):
        raise ValueError(f"batch['position_ids'] begin anew within a row: {_PACKED}")
