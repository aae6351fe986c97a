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
        self.step, self.pending = int(os.environ.get("A3PO_INITIAL_STEP", "0")), False
        register_optimizer_step_post_hook(self._after_optimizer_step)

    def _after_optimizer_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.step, self.pending = self.step + self.pending, False
