"""Schedules of a scale over training steps: any callable step -> value works; these are the usual ones.

A step may be a number or a 0-d device tensor; the value is then a float or a 0-d tensor, and nothing is read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Union

import torch
from torch import Tensor

from .core.checks import check_is_number

Value = Union[float, Tensor]
Schedule = Callable[[Value], Value]


def _check_finite(**values: float) -> None:
    for name, value in values.items():
        check_is_number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0; got {value}")


def _exactly(step: Tensor) -> Tensor:
    """In fp64: an integer's product with a float would be in PyTorch's default dtype, bf16 perhaps."""
    return step.double()


def _at_least(value: Value, minimum: float) -> Value:
    return value.clamp(min=minimum) if isinstance(value, Tensor) else max(float(value), minimum)


@dataclass(frozen=True)
class Constant:
    """The same value at every step. Raises ValueError for one below 0."""

    value: float

    def __post_init__(self):
        _check_finite(value=self.value)

    def __call__(self, step: Value) -> Value:
        return self.value


@dataclass(frozen=True)
class LinearDecay:
    """max(minimum, start - rate * step), A3PO's schedule (arXiv 2512.21625): beta(step) = max(1, rho - alpha * step).

    start is rho, 2.0 as in the released scripts. rate is alpha; the paper gives no value that we could verify, and the
    default 0.005 is ours. All are at least 0, and start at least minimum, else ValueError is raised.
    """

    start: float = 2.0
    rate: float = 0.005
    minimum: float = 1.0

    def __post_init__(self):
        _check_finite(start=self.start, rate=self.rate, minimum=self.minimum)
        if self.start < self.minimum:
            raise ValueError(f"start must be at least minimum = {self.minimum}, where it stays; got {self.start}")

    def __call__(self, step: Value) -> Value:
        step = _exactly(step) if isinstance(step, Tensor) else step
        return _at_least(self.start - self.rate * step, self.minimum)


@dataclass(frozen=True)
class ExponentialDecay:
    """minimum + (start - minimum) * exp(-rate * step). Raises ValueError for one of the three below 0."""

    start: float = 2.0
    rate: float = 0.005
    minimum: float = 1.0

    def __post_init__(self):
        _check_finite(start=self.start, rate=self.rate, minimum=self.minimum)

    def __call__(self, step: Value) -> Value:
        height = self.start - self.minimum
        if isinstance(step, Tensor):
            return self.minimum + height * torch.exp(-self.rate * _exactly(step))
        return self.minimum + height * math.exp(-self.rate * step)


@dataclass(frozen=True)
class CosineDecay:
    """From start at step 0 to minimum at `steps` and after, along half a cosine.

    Raises ValueError for start or minimum below 0 and steps below 1.
    """

    start: float = 2.0
    steps: int = 200
    minimum: float = 1.0

    def __post_init__(self):
        _check_finite(start=self.start, steps=self.steps, minimum=self.minimum)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")

    def __call__(self, step: Value) -> Value:
        height = 0.5 * (self.start - self.minimum)
        if isinstance(step, Tensor):
            return self.minimum + height * (1.0 + torch.cos(math.pi * (_exactly(step) / self.steps).clamp(0.0, 1.0)))
        return self.minimum + height * (1.0 + math.cos(math.pi * min(max(step / self.steps, 0.0), 1.0)))
