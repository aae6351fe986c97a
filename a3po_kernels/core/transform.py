"""The logit transform: from a raw logit z to x, whose softmax is the policy."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


class Transform(NamedTuple):
    """x = u / temperature with u = softcap * tanh(y / softcap) (u = y without one) and y = logit_scale * z.

    temperature: one per row [N] or 0-d; without it temperature_value. softcap: 0 is none. ignore_index: the target of
    a row that is not computed.
    """

    temperature: Tensor | None
    temperature_value: float
    logit_scale: float
    softcap: float
    ignore_index: int

    @classmethod
    def of(cls, temperature: float | Tensor, softcap: float | None, logit_scale: float, ignore_index: int) -> Transform:
        """From the public arguments, which were checked but for ignore_index; raises TypeError if it is no integer."""
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an integer; got {type(ignore_index).__name__}")
        rest = (float(logit_scale), float(softcap or 0.0), int(ignore_index))
        if not isinstance(temperature, Tensor):
            return cls(None, float(temperature), *rest)
        return cls(temperature.reshape(-1) if temperature.ndim else temperature, 1.0, *rest)

    def at(self, rows: slice | Tensor | None) -> Transform:
        """That of some rows; None is all."""
        if rows is None or self.temperature is None or self.temperature.ndim == 0:
            return self
        return self._replace(temperature=self.temperature[rows])

    @property
    def exponent_scale(self) -> float:
        """k with y = k * u the base-2 exponents: the logit scale is in it where no softcap stands between."""
        return (LOG2E if self.softcap else LOG2E * self.logit_scale) / self.temperature_value

    @property
    def temperature_stride(self) -> int:
        """0 where all rows share one temperature."""
        return 0 if self.temperature is None or self.temperature.ndim == 0 else self.temperature.stride(0)
