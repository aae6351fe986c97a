"""What bench.dynamics trains: studies, each a task and the arms that it compares, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from a3po_kernels import CosineDecay, ExponentialDecay, LinearDecay, Objective, presets


@dataclass(frozen=True)
class Arm:
    """A preset with its options, and the share of rollouts that are trained with the wrong reward."""

    preset: str
    options: dict[str, Any] = field(default_factory=dict)
    reward_noise: float = 0.0

    @property
    def label(self) -> str:
        """The call that builds the objective; a preset's name alone where it has no options."""
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        noise = f" + {100 * self.reward_noise:.0f} % wrong rewards" if self.reward_noise else ""
        return (f"{self.preset}({options})" if options else self.preset) + noise

    def objective(self) -> Objective:
        return presets[self.preset](**self.options)


def _a3po(**options: Any) -> Arm:
    return Arm("a3po", options)


@dataclass(frozen=True)
class Study:
    """A table of the page: `arms` on a task.

    setting: what a row depends on besides arm and seed; a change starts the table anew. every, tables: the steps
    between evaluations, and those whose tables are on the page.
    """

    task: str
    setting: dict[str, Any]
    arms: tuple[Arm, ...]
    seeds: int
    every: int
    tables: tuple[int, ...]

    @property
    def responses(self) -> int:
        """Sampled for each held-out problem."""
        return self.setting.get("responses", 4)


_COUNTDOWN = {
    "task": "countdown", "warm_up": 700, "steps": 40, "prompts": 16, "samples": 8, "iterations": 2, "rate": 1e-4,
    "responses": 16,
}  # fmt: skip
_OBJECTIVES = tuple(map(Arm, ("grpo", "dapo", "psr", "nsr", "w_reinforce", "fork_tokens", "lp_reg", "a3po")))
_ABLATIONS = (
    *(_a3po(ratio=ratio) for ratio in (0.1, 0.3, 0.5)),
    *(_a3po(rho=rho) for rho in (1.5, 4.0)),
    *(_a3po(alpha=alpha) for alpha in (0.0, 0.025)),
    _a3po(schedule=ExponentialDecay(2.0, 0.02)),
    _a3po(schedule=CosineDecay(2.0, 40)),
    _a3po(metric="entropy"),
    _a3po(positive_metric="entropy"),
    _a3po(negative_metric="entropy"),
    _a3po(polarity="positive"),
    _a3po(polarity="negative"),
    _a3po(positive_weight=0.5),
    _a3po(negative_weight=0.5),
    _a3po(negative_weight=LinearDecay(1.0, 0.025, minimum=0.0)),
)
_SIGNS = ("dapo", "psr", "nsr", "a3po")
_NOISE = tuple(Arm(name, reward_noise=noise) for noise in (0.1, 0.3) for name in _SIGNS)

STUDIES = {
    # Its rows are from before there was a second task: the setting names none.
    "chain_sum": Study(
        "chain_sum", {"warm_up": 700, "steps": 40, "prompts": 16, "samples": 8, "iterations": 2, "rate": 1e-4},
        _OBJECTIVES, seeds=6, every=10, tables=(10, 40),
    ),
    "countdown": Study(
        "countdown", _COUNTDOWN, (*_OBJECTIVES, Arm("kl_cov"), Arm("clip_cov")), seeds=2, every=20, tables=(20, 40),
    ),
    "ablations": Study("countdown", _COUNTDOWN, (_a3po(), *_ABLATIONS), seeds=2, every=20, tables=(40,)),
    "noise": Study(
        "countdown", _COUNTDOWN, (*map(Arm, _SIGNS), *_NOISE), seeds=2, every=20, tables=(40,)
    ),
}  # fmt: skip
