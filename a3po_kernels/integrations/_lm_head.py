"""The head of a transformers causal LM: its parameters, and a context that computes something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> Any:
    """The model inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        for name in ("_orig_mod", "module"):
            inner = model._modules.get(name)
            if inner is not None:
                model = inner
                break
        else:
            return model


def head_module(model: nn.Module) -> nn.Module:
    """The output embedding of a causal LM, wrapped or not; raises TypeError without one."""
    inner = unwrap(model)
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        raise TypeError(f"model must be a causal LM with an output embedding; {type(inner).__name__} has none")
    return head


def _logit_scale(config: Any) -> float:
    """What the model multiplies its raw logits by, from the fields that transformers' families spell it in."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite divides by it, HyperCLOVA X multiplies.
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def head_keywords(model: nn.Module) -> dict[str, Any]:
    """The head as keywords of linear_policy_loss: weight, bias, lora, softcap, logit_scale.

    Raises:
        ValueError, TypeError: for a head that is no plain linear layer with at most one LoRA adapter: quantised or
            sharded weights, DoRA, adapters with dropout in training, several adapters at once.
    """
    layer, lora = _without_adapter(head_module(model))
    config = unwrap(model).config.get_text_config()
    transform = {
        "softcap": getattr(config, "final_logit_softcapping", None),
        "logit_scale": _logit_scale(config),
    }
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"the head must be a linear layer; got {type(layer).__name__}")
    weight, bias = layer.weight, layer.bias
    if not weight.dtype.is_floating_point or type(layer).__module__.startswith("bitsandbytes"):
        raise ValueError(
            f"the head's weight is quantised ({type(layer).__name__}, {weight.dtype}): keep it in floating point"
        )
    return {"weight": weight, "bias": bias, "lora": lora, **transform}


def _without_adapter(head: Any) -> tuple[nn.Module, tuple[Tensor, Tensor, float] | None]:
    """The plain layer in a head that PEFT has wrapped, and the active LoRA adapter (A, B, scale), if any."""
    # A ModulesToSaveWrapper trains a copy of the whole layer.
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = [name for name in head.active_adapters if name in copies]
        if head.disable_adapters or not active:
            return head.original_module, None
        return copies[active[0]], None
    if not hasattr(head, "get_base_layer"):
        return head, None
    base = head.get_base_layer()
    if head.disable_adapters or head.merged:
        return base, None
    if not hasattr(head, "lora_A"):
        raise TypeError(f"the head carries a {type(head).__name__} adapter; only LoRA is supported there")
    active = [name for name in head.active_adapters if name in head.lora_A]
    if not active:
        return base, None
    if len(active) > 1:
        raise ValueError(f"the head has {len(active)} active adapters, {', '.join(active)}; one is supported")
    name = active[0]
    if getattr(head, "use_dora", {}).get(name) or name in (getattr(head, "lora_variant", None) or {}):
        raise ValueError("the head's adapter is a variant of LoRA (DoRA or another); plain LoRA is supported there")
    dropout = dict(head.lora_dropout).get(name)
    if isinstance(dropout, nn.Dropout) and dropout.p > 0 and head.training:
        raise ValueError(f"the head's adapter has lora_dropout = {dropout.p}; it must be 0 there")
    a, b = head.lora_A[name], head.lora_B[name]
    if b.bias is not None:
        raise ValueError("the head's adapter has a bias (lora_bias=True), which is not supported there")
    return base, (a.weight, b.weight, float(head.scaling[name]))


def _differentiable(result: Any) -> list[Tensor]:
    fields = result if isinstance(result, tuple) else (result,)
    return [value for value in fields if isinstance(value, Tensor) and value.requires_grad]


def _with_tensors(result: Any, tensors: list[Tensor]) -> Any:
    """The result with its differentiable tensors replaced, in order."""
    if not isinstance(result, tuple):
        return tensors[0] if tensors else result
    rest = iter(tensors)
    fields = [next(rest) if isinstance(v, Tensor) and v.requires_grad else v for v in result]
    return type(result)(*fields) if hasattr(result, "_fields") else tuple(fields)


class _Switch:
    """The forward of a head module: its own, until a computation is put in its place."""

    def __init__(self, module: nn.Module):
        self.own = module.forward
        self.compute: Callable[[Tensor], Any] | None = None
        self.results: list[Any] = []

    # Outside the graph of a compiled model: the loop over chunks and the choice of a route are made per call.
    @torch.compiler.disable
    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.compute is None:
            return self.own(hidden, *args, **kwargs)
        result = self.compute(hidden)
        self.results.append(result)
        # In the logits' place goes what a gradient may come back through.
        parts = [value.reshape(-1) for value in _differentiable(result)]
        return torch.cat(parts).view(1, 1, -1) if parts else hidden.new_zeros(1, 1, 1)

    @torch.compiler.disable
    def after_hooks(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Takes the last result's tensors from the module's output, on which wrappers have put their hooks (FSDP2's
        gathers the weight again before backward)."""
        if self.compute is None:
            return
        tensors = _differentiable(self.results[-1])
        pieces = output.view(-1).split([value.numel() for value in tensors]) if tensors else ()
        views = [piece.view(value.shape) for piece, value in zip(pieces, tensors, strict=True)]
        self.results[-1] = _with_tensors(self.results[-1], views)


_switches: WeakKeyDictionary[nn.Module, _Switch] = WeakKeyDictionary()


@contextmanager
def swap_head(model: nn.Module, compute: Callable[..., Any]) -> Iterator[list[Any]]:
    """Inside, the model's head computes `compute(hidden, **head)` and no logits; gives the list of the results.

    Everything else of the model's forward runs as it is (wrappers, hooks, router losses), and the `logits` of its
    output mean nothing. For instance, with `targets` [B, T] that are shifted already:

        with swap_head(model, lambda hidden, **head: linear_token_logprobs(hidden, targets=targets, **head)) as results:
            model(input_ids=input_ids)
        logprobs, entropy = results[0]

    Args:
        model: a transformers causal LM, also inside PEFT, DistributedDataParallel, FSDP2 or torch.compile.
        compute: takes the hidden states [B, T, H] that would enter the head and the keywords weight [V, H], bias, lora,
            softcap and logit_scale as linear_policy_loss spells them.

    Raises:
        TypeError, ValueError: for a head that cannot be read: quantised, a DTensor, an adapter other than LoRA.
    """
    module = head_module(model)
    head_keywords(model)  # what is not supported is refused before anything runs
    switch = _switches.get(module)
    if switch is None:
        switch = _switches[module] = _Switch(module)
    if switch.compute is not None:
        raise RuntimeError("swap_head is already active on this model")

    def run(hidden: Tensor) -> Any:
        head = head_keywords(model)  # inside the module's own hooks, which may have gathered or replaced its weight
        weight = head["weight"]
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                f"the head's weight is a DTensor ({weight.placements}) inside its own forward: a head that is split "
                "over the vocabulary needs a vocabulary-parallel loss, which does not exist yet"
            )
        if weight.shape[-1] != hidden.shape[-1]:
            raise ValueError(
                f"the head's weight has shape {list(weight.shape)} inside its own forward, for hidden states of width "
                f"{hidden.shape[-1]}: it is sharded in a way that is not supported (FSDP2 is)"
            )
        return compute(hidden.to(weight.device), **head)

    had, own = "forward" in module.__dict__, module.forward
    switch.own, switch.compute, switch.results = own, run, []
    module.forward = switch
    handle = module.register_forward_hook(switch.after_hooks)
    try:
        yield switch.results
    finally:
        switch.compute = None
        handle.remove()
        if had:
            module.forward = own
        else:
            del module.forward
