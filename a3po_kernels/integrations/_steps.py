"""The training step of the schedules, where a framework tells its policy losses none."""

from __future__ import annotations

import os
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook


class OptimizerSteps:
    """Counts optimizer steps that followed a policy loss with a gradient, from A3PO_INITIAL_STEP on.

    step: the number; pending: whether a policy loss has been formed since the last one.
    """

    def __init__(self) -> None:
        first = os.environ.get("A3PO_INITIAL_STEP", "0")
        if not first.isdecimal():
            raise ValueError(f"A3PO_INITIAL_STEP must be an integer of at least 0; got {first!r}")
        self.step, self.pending = int(first), False
        register_optimizer_step_post_hook(self.advance)

    def advance(self, *_: Any) -> None:
        """An optimizer has stepped; a second one after the same loss counts nothing."""
        self.step, self.pending = self.step + self.pending, False
