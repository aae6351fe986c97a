"""The head of a transformers causal LM: its parameters, and a context that computes something else in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..core.checks import is_dtensor
from ._head_check import check_product, check_transform, probe
from ._split_head import check_split, from_hooks, to_hooks

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


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
    """What the model multiplies its head's output by, from the fields that transformers' families spell it in."""
    kind = getattr(config, "model_type", None)
    # MPT never reads it, and MiniCPM3's divides the hidden states before they enter the head.
    if kind in ("mpt", "minicpm3"):
        return 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"the config's {name} must be a number; got {value!r}")
        # Granite divides by logits_scaling, HyperCLOVA X multiplies.
        divides = name == "logits_scaling" and kind != "hyperclovax"
        return 1.0 / float(value) if divides else float(value)
    return 1.0


def _softcap(config: Any) -> float | None:
    values = (getattr(config, name, None) for name in SOFTCAPS)
    return next((float(value) for value in values if value is not None), None)


def head_keywords(model: nn.Module) -> dict[str, Any]:
    """The head as keywords of linear_policy_loss: weight, bias, lora, softcap, logit_scale.

    Args:
        model: a transformers causal LM, in whatever wrappers.

    Raises:
        ValueError, TypeError: for a head that is no plain linear layer with at most one LoRA adapter: quantised
            weights, DoRA, adapters with dropout in training, several adapters at once.
    """
    layer, lora = _without_adapter(head_module(model))
    config = unwrap(model).config.get_text_config()
    transform = {"softcap": _softcap(config), "logit_scale": _logit_scale(config)}
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"the head must be a linear layer; got {type(layer).__name__}")
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if not weight.dtype.is_floating_point or type(layer).__module__.startswith("bitsandbytes"):
        raise ValueError(
            f"the head's weight is quantised ({type(layer).__name__}, {weight.dtype}): keep it in floating point"
        )
    # Inkling cuts its logits where the weight was padded.
    kept = getattr(config, "unpadded_vocab_size", None)
    if kept is not None and kept < weight.shape[0]:
        weight, bias = weight[:kept], None if bias is None else bias[:kept]
        lora = None if lora is None else (lora[0], lora[1][:kept], lora[2])
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


class _Probe(torch.autograd.Function):
    """The probe in the logits' place: in the graph, so that wrappers find every parameter from the model's output, and
    without a gradient."""

    @staticmethod
    def forward(ctx, output: Tensor, vocabulary: int) -> Tensor:
        ctx.set_materialize_grads(False)
        return probe(vocabulary, output.device).clone()  # no view: a model may write into its logits

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[None, None]:
        return None, None


class _Through(torch.autograd.Function):
    """Values whose backward also enters that of `output`, with no gradient: DistributedDataParallel's static graph and
    FSDP2's root start there what they do in backward."""

    @staticmethod
    def forward(ctx, output: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads


class _Switch:
    """What swap_head puts in a head module's place, one object a module: a compiled model knows it again."""

    def __init__(self) -> None:
        self.own: Callable[..., Any] | None = None
        self.compute: Callable[[Tensor], Any] | None = None
        self.results: list[Any] = []
        self.vocabulary = 0
        self.output: Tensor | None = None  # what forward gave, before the module's hooks, flat
        self.mesh: Any = None  # of the hidden states, where the module's hooks made them a DTensor
        self.watch = False  # whether hooks that change it are looked for, which waits
        self.checked: set[tuple] = set()

    # Outside the graph of a compiled model: the loop over chunks and the choice of a route are made per call.
    @torch.compiler.disable
    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.compute is not None, "outside swap_head the head has its own forward"
        if args or kwargs:
            names = ", ".join(kwargs) or f"{len(args)} more"
            raise ValueError(f"the head takes hidden states alone; its model, or an adapter's hook, also gave {names}")
        result = self.compute(hidden)
        self.results.append(result)
        # The module's output is what a gradient may come back through.
        parts = [value.reshape(-1) for value in _differentiable(result)]
        output = torch.cat(parts) if parts else torch.ones(1, dtype=hidden.dtype, device=hidden.device)
        self.output = output.detach()
        self.mesh = hidden.device_mesh if is_dtensor(hidden) else None  # type: ignore[attr-defined]
        return to_hooks(output.view(1, 1, -1), self.mesh)

    @torch.compiler.disable
    def after_hooks(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Takes the last result's tensors from the module's output, on which wrappers have put their hooks (FSDP2's
        gathers the weight again before backward), and gives the model the probe."""
        assert self.output is not None, "outside swap_head the head has no hook of ours"
        output = from_hooks(output, self.output.numel(), self.mesh)
        if output.dtype != self.output.dtype:
            raise ValueError(
                f"a forward hook of the head casts its output to {output.dtype}, which rounds log-probs so: have none "
                "(in FSDP2, no output_dtype for the head's own group)"
            )
        if self.watch and not torch.equal(output, self.output):
            raise ValueError("a forward hook of the head changes its output, which is not supported")
        tensors = _differentiable(self.results[-1])
        pieces = output.split([value.numel() for value in tensors]) if tensors else ()
        views = [piece.view(value.shape) for piece, value in zip(pieces, tensors, strict=True)]
        self.results[-1] = _with_tensors(self.results[-1], views)
        return _Probe.apply(output, self.vocabulary)


_switches: WeakKeyDictionary[nn.Module, _Switch] = WeakKeyDictionary()


def _check_weight(hidden: Tensor, head: dict[str, Any]) -> None:
    weight = head["weight"]
    if weight.shape[-1] != hidden.shape[-1]:
        raise ValueError(
            f"the head's weight has shape {list(weight.shape)} inside its own forward, for hidden states of width "
            f"{hidden.shape[-1]}: it is sharded in a way that is not supported (FSDP2 is, and tensor parallelism)"
        )
    check_split(hidden, head)


@contextmanager
def _swapped(model: nn.Module, compute: Callable[[Tensor, dict[str, Any], _Switch], Any]) -> Iterator[_Switch]:
    module = head_module(model)
    head_keywords(model)  # what is not supported is refused before anything runs
    switch = _switches.setdefault(module, _Switch())
    if switch.compute is not None:
        raise RuntimeError("swap_head is already active on this model")

    def run(hidden: Tensor) -> Any:
        head = head_keywords(model)  # inside the module's own hooks, which may have gathered or replaced its weight
        _check_weight(hidden, head)
        switch.vocabulary = _without_adapter(module)[0].weight.shape[0]  # type: ignore[assignment, index]
        return compute(hidden.to(head["weight"].device), head, switch)

    had, own = "forward" in module.__dict__, module.forward
    switch.own, switch.compute, switch.results = own, run, []
    module.forward = switch
    handle = module.register_forward_hook(switch.after_hooks)
    try:
        yield switch
    finally:
        # Nothing is kept that holds the module: it is the weak key.
        switch.own = switch.compute = switch.output = switch.mesh = None
        switch.watch = False
        handle.remove()
        if had:
            module.forward = own
        else:
            del module.forward


@contextmanager
def swap_head(model: nn.Module, compute: Callable[..., Any]) -> Iterator[list[Any]]:
    """Inside, the model's head computes `compute(hidden, **head)` and no logits; gives the list of the results.

    Everything else of the model's forward runs as it is (wrappers, hooks, router losses), and the `logits` of its
    output mean nothing. For instance, with `targets` [B, T] that are shifted already:

        with swap_head(model, lambda hidden, **head: linear_token_logprobs(hidden, targets=targets, **head)) as results:
            model(input_ids=input_ids)
        logprobs, entropy = results[0]

    That the keywords describe the head is not checked here (check_head does so): `compute` may use others. Nor do the
    results hang on the model's output, as DistributedDataParallel(static_graph=True) needs; those of
    policy_loss_from_model and token_logprobs_from_model do.

    Args:
        model: a transformers causal LM or vision-language model, also inside PEFT, DistributedDataParallel, FSDP2,
            DeepSpeed or torch.compile, or with a tensor-parallel plan, with FSDP2 on top or not; all tensor-parallel
            ranks get the same batch.
        compute: takes the hidden states [B, T, H] that would enter the head and the keywords weight [V, H], bias, lora,
            softcap and logit_scale as linear_policy_loss spells them.

    Raises:
        TypeError, ValueError: for a head that cannot be read: quantised, an adapter other than LoRA, a DTensor that is
            not split as tensor parallelism splits a head.
    """
    with _swapped(model, lambda hidden, head, switch: compute(hidden, **head)) as switch:
        yield switch.results


def _logits(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else getattr(output, "logits", None)


def run_head(
    model: nn.Module, compute: Callable[..., Any], inputs: Mapping[str, Any], *, again: bool = False
) -> tuple[Any, Any]:
    """(what compute(hidden, **head) gives in the head's place in model(**inputs), the model's output).

    The head's first use, or every use where `again`, is checked in the same forward: once for a head, a model class and
    values of its transform.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    used: list[tuple[dict[str, Any], int, tuple]] = []  # a sharded weight's shape is its own inside the head alone

    def checked(hidden: Tensor, head: dict[str, Any], switch: _Switch) -> Any:
        layer = _without_adapter(head_module(model))[0]
        kept, plain = head["weight"].shape[0], head["lora"] is None
        key = (type(inner), type(layer), head["softcap"], head["logit_scale"], kept, plain)
        if again or key not in switch.checked:
            check_product(switch.own, hidden, head, name)  # type: ignore[arg-type]
            switch.watch = True
            used.append((head, kept, key))
        return compute(hidden, **head)

    with _swapped(model, checked) as switch:
        output = model(**inputs)
    if len(switch.results) != 1:
        raise ValueError(f"{name} called its head {len(switch.results)} times in one forward; once is supported")
    logits = _logits(output)
    for head, kept, key in used:
        check_transform(logits, head, kept, switch.vocabulary, name)
        switch.checked.add(key)
    tensors = _differentiable(switch.results[0])
    if not tensors:
        return switch.results[0], output
    if not (isinstance(logits, Tensor) and logits.requires_grad):
        raise ValueError(f"the logits that {name} gives carry no gradient, which its wrappers may wait for")
    return _with_tensors(switch.results[0], list(_Through.apply(logits, *tensors))), output
