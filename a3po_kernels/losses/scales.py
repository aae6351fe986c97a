"""What the schedules of an objective's rules give at a step: each is called once a loss, and its answer checked."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ..core.operators import reads_values
from ..objectives import Objective, PolarityWeights
from ..schedules import Value


def as_number(value: Any, device: torch.device) -> Any:
    """A 0-d CPU tensor as the number it is where the batch is on another `device`: reading it waits for nothing."""
    elsewhere = isinstance(value, Tensor) and value.device.type == "cpu" and device.type != "cpu"
    return value.item() if elsewhere else value


def _scheduled(name: str, schedule: Any, step: Value, device: torch.device, validate: bool) -> Value:
    """schedule(step), which has to be a weight; raises TypeError or ValueError by name."""
    found = as_number(schedule(step), device)

    def message(got: str) -> str:
        return f"{name} = {schedule!r} must give a number or 0-d tensor, finite and at least 0; it gave {got}"

    if isinstance(found, Tensor):
        if found.ndim or found.device != device:
            raise ValueError(message(f"a tensor of shape {list(found.shape)} on {found.device}"))
        known = reads_values(found, validate)
    elif isinstance(found, bool) or not isinstance(found, numbers.Real):
        raise TypeError(message("None" if found is None else type(found).__name__))
    else:
        known = not torch.compiler.is_compiling()
    if known and not 0 <= found < math.inf:
        raise ValueError(message(f"{float(found)} at step {float(step):g}"))
    return found


def scales_at(objective: Objective, step: Value, device: torch.device, validate: bool) -> tuple[tuple[Value, ...], ...]:
    """Of each shaping rule its selected_scale, or its positive, negative and zero, at this step.

    Raises:
        TypeError, ValueError: a schedule that gives no weight; the value of a tensor on a GPU is read under `validate`.
    """
    found = []
    for i, rule in enumerate(objective.shaping):
        names = ("positive", "negative", "zero") if isinstance(rule, PolarityWeights) else ("selected_scale",)
        given = [(f"shaping[{i}].{name}", getattr(rule, name)) for name in names]
        found.append(tuple(_scheduled(n, x, step, device, validate) if callable(x) else x for n, x in given))
    return tuple(found)
