"""Whether the ranks of a group are about to make the same call: one small collective, before anything can hang."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .vocabulary import check_group

# Arguments of which each rank has its own part, in this dimension.
_PARTS = {"weight": 0, "bias": 0, "main_grad": 0, "logits": -1}
_LEAVES = ("hidden", "weight", "bias", "logits")


def check_agreement(group: Any, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError on every rank of `group` if the ranks' arguments differ, naming what and how.

    Tensors are compared by shape and dtype, other values as they are, functions by name. Where vocab_start is given the
    ranks' parts may be of different sizes, and must be the vocabulary together.
    """
    if dist.get_world_size(check_group("tp_group", group)) == 1:
        return
    cut = arguments.get("vocab_start") is not None
    facts = {name: _fact(name, value, cut) for name, value in arguments.items() if name != "tp_group"}
    hashes = [_hash(fact) for fact in facts.values()]
    bounds = _bounds(arguments)
    mine = torch.tensor([_hash(" ".join(facts)), *bounds, *hashes], dtype=torch.int64, device=_device(arguments))
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, mine, group=group)
    table = torch.stack(each).tolist()
    different = [name for at, name in enumerate(facts, start=3) if len({row[at] for row in table}) > 1]
    if len({row[0] for row in table}) > 1:
        raise ValueError("the ranks of tp_group make different calls")
    if different:
        told: list[Any] = [None] * len(each)
        dist.all_gather_object(told, {name: facts[name] for name in different}, group=group)
        said = "; ".join(
            f"{name} is " + ", ".join(f"{given[name]} on rank {rank}" for rank, given in enumerate(told))
            for name in different
        )
        raise ValueError(f"the ranks of tp_group disagree: {said}")
    starts = [tuple(row[1:3]) for row in table]
    if all(first >= 0 for first, _ in starts):
        size = arguments.get("vocab_size")
        _check_parts(starts, size if isinstance(size, int) else None)
    elif any(first >= 0 for first, _ in starts):
        raise ValueError("vocab_start was given on some ranks of tp_group and not on others")


def _check_parts(bounds: list[tuple[int, int]], size: int | None) -> None:
    """Raises ValueError unless the parts, in some order, are [0, size) with nothing twice and nothing missing."""
    filled = sorted((first, stop if size is None else min(stop, size)) for first, stop in bounds)
    filled = [(first, stop) for first, stop in filled if stop > first]
    at = 0
    for first, stop in filled:
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
    """(first, stop) of this rank's part, (-1, -1) where vocab_start does not say."""
    start, held = arguments.get("vocab_start"), arguments.get("weight", arguments.get("logits"))
    if isinstance(start, tuple) and len(start) == 2:
        return start
    if not isinstance(start, int) or not isinstance(held, Tensor):
        return -1, -1
    return start, start + held.shape[0 if "weight" in arguments else -1]


def _fact(name: str, value: Any, cut: bool = False) -> str:
    """What must be the same on every rank. cut: whether the ranks' parts may be of different sizes."""
    if name == "vocab_start":
        return "None" if value is None else "given"
    if name == "lora" and isinstance(value, tuple) and len(value) == 3:
        a, b, scale = value
        return f"({_fact('hidden', a)}, {_fact('weight', b, cut)}, {scale!r})"
    if isinstance(value, Tensor):
        shape = [str(size) for size in value.shape]
        if cut and name in _PARTS and shape:
            shape[_PARTS[name]] = "*"
        wants = "" if name not in _LEAVES else " with a gradient" if value.requires_grad else " without a gradient"
        return f"[{', '.join(shape)}] {str(value.dtype).removeprefix('torch.')}{wants}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_fact('', value[key])}" for key in sorted(value)) + "}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{field.name}={_fact('', getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_fact('', x) for x in value)})"
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__name__)}"
    return repr(value)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _device(arguments: Mapping[str, Any]) -> torch.device:
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    return tensors[0].device if tensors else torch.device("cpu")
