"""Whether the ranks of a group are about to make the same call: one small collective, before anything can hang."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.operators import runs_plainly
from ..core.tiles import default_chunk_bytes
from .groups import check_group

# Arguments of which each rank has its own part, in this dimension.
_PARTS = {"weight": 0, "bias": 0, "main_grad": 0, "logits": -1}
# Compared by shape, dtype and whether they want a gradient; the contents of other tensors are compared too.
_LEAVES = ("hidden", "weight", "bias", "logits")
_DEPTH = 10  # of functions and objects within one another


def check_agreement(group: Any, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError on every rank of `group` if the ranks' calls differ, naming what and how.

    arguments: those of the call by name. Compared are shapes and dtypes; the contents of what every rank has whole, but
    for the hidden states; numbers, words, objectives, functions by name with their parameters; what wants a gradient;
    autocast; and the memory that decides how rows are cut. Where vocab_start is given the ranks' parts may be of
    different sizes, and must be the vocabulary together. In what is compiled or traced nothing is compared.
    """
    held = arguments.get("weight", arguments.get("logits"))
    check_group("tp_group", group)
    if dist.get_world_size(group) == 1:
        return
    device = held.device if isinstance(held, Tensor) else torch.device("cpu")
    if isinstance(held, Tensor) and not runs_plainly(held):
        return
    cut = arguments.get("vocab_start") is not None
    facts = {name: _fact(name, value, cut) for name, value in arguments.items() if name != "tp_group"}
    facts |= _surroundings(device)
    mine = torch.tensor(
        [_hash(" ".join(facts)), *_bounds(arguments), *map(_hash, facts.values())], dtype=torch.int64, device=device
    )
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, mine, group=group)
    table = torch.stack(each).tolist()
    if len({row[0] for row in table}) > 1:
        raise ValueError("the ranks of tp_group make different calls")
    different = [name for at, name in enumerate(facts, start=3) if len({row[at] for row in table}) > 1]
    if different:
        told: list[Any] = [None] * len(each)
        dist.all_gather_object(told, {name: facts[name] for name in different}, group=group)
        said = "; ".join(
            f"{name} is " + ", ".join(f"{given[name]} on rank {rank}" for rank, given in enumerate(told))
            for name in different
        )
        raise ValueError(f"the ranks of tp_group disagree: {said}")
    if cut:
        size = arguments.get("vocab_size")
        _check_parts([(row[1], row[2]) for row in table], size if isinstance(size, int) else None)


def _check_parts(bounds: list[tuple[int, int]], size: int | None) -> None:
    """Raises ValueError unless the parts, in some order, are [0, size) with nothing twice and nothing missing."""
    filled = sorted((first, stop if size is None else min(stop, size)) for first, stop in bounds)
    at = 0
    for first, stop in filled:
        if stop <= first:
            continue
        if first != at:
            kind = "both have" if first < at else "none has"
            raise ValueError(
                f"vocab_start must cut the vocabulary in parts: {kind} the columns from {min(first, at)} to "
                f"{max(first, at)}; the ranks have {bounds}"
            )
        at = stop
    if size is not None and at != size:
        raise ValueError(f"the parts of the vocabulary end at {at}, vocab_size is {size}; the ranks have {bounds}")


def _bounds(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """(first, stop) of this rank's part, (0, 0) where vocab_start does not say."""
    start, held = arguments.get("vocab_start"), arguments.get("weight", arguments.get("logits"))
    if isinstance(start, tuple) and len(start) == 2 and all(isinstance(x, int) for x in start):
        return start
    if not isinstance(start, int) or not isinstance(held, Tensor) or not held.ndim:
        return 0, 0
    return start, start + held.shape[0 if "weight" in arguments else -1]


def _surroundings(device: torch.device) -> dict[str, str]:
    """What a call depends on besides its arguments."""
    kind = device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return {
        "grad mode": "on" if torch.is_grad_enabled() else "off",
        "autocast": str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if autocast else "off",
        "the default of max_chunk_bytes": str(default_chunk_bytes(device, one_pass=True, agreed=True)),
    }


def _fact(name: str, value: Any, cut: bool = False, depth: int = 0) -> str:
    """What must be the same on every rank. cut: whether the ranks' parts may be of different sizes."""
    if name == "vocab_start":
        return "None" if value is None else "given"
    if isinstance(value, dist.ProcessGroup):  # others than tp_group: their ranks are others for each of this one's
        return f"a group of {dist.get_world_size(value)} ranks"
    if name == "lora" and isinstance(value, tuple) and len(value) == 3:
        a, b, scale = value
        return f"({_fact('hidden', a)}, {_fact('weight', b, cut)}, {scale!r})"
    if isinstance(value, Tensor):
        return _tensor_fact(name, value, cut)

    def inner(part: Any) -> str:
        return _fact("", part, depth=depth + 1) if depth < _DEPTH else type(part).__name__

    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {inner(value[key])}" for key in sorted(value, key=str)) + "}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{field.name}={inner(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(inner, value))})"
    if isinstance(value, functools.partial):
        return f"partial({', '.join(map(inner, (value.func, value.args, value.keywords)))})"
    if callable(value):
        parameters = [*(getattr(value, "__defaults__", None) or ()), getattr(value, "__kwdefaults__", None) or {}]
        parameters += [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
        if not hasattr(value, "__qualname__"):  # an object: its attributes decide
            parameters.append(getattr(value, "__dict__", {}))
            value = type(value)
        given = ", ".join(inner(part) for part in parameters if part != {})
        return f"{value.__module__}.{value.__qualname__}" + (f" with {given}" if given else "")
    return repr(value)


def _tensor_fact(name: str, value: Tensor, cut: bool) -> str:
    shape = [str(size) for size in value.shape]
    if cut and name in _PARTS and shape:
        shape[_PARTS[name]] = "*"
    text = f"[{', '.join(shape)}] {str(value.dtype).removeprefix('torch.')}"
    if name in _LEAVES:
        return f"{text} with{'' if value.requires_grad else 'out'} a gradient"
    if name in _PARTS:
        return text
    held = value.detach().cpu().contiguous()
    text += f" {held.item()}" if not held.ndim else ""
    contents = hashlib.blake2b(held.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=4).hexdigest()
    return f"{text} of contents {contents}"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
