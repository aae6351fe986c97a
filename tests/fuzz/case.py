"""One case as data, and the random choices it is made by."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .objectives import Made

LOW = (torch.bfloat16, torch.float16)


class Draw:
    """The random choices of one case: Python's for words, torch's for arrays."""

    def __init__(self, seed: int, index: int):
        self.rng = random.Random(f"{seed}:{index}")
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(62))

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, *choices) -> Any:
        return self.rng.choice(choices)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def true(self, probability: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < probability


@dataclass
class Case:
    """What is called. keywords: as the call takes them; head: hidden, weight, ... of a linear entry.

    tokens: bool [N], rows that are tokens; boundaries: where the rollouts begin, [S + 1].
    """

    seed: int
    index: int
    backend: str
    entry: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    boundaries: list[int] = field(default_factory=list)
    vocabulary: int = 1
    spec: Made | None = None
    logits: Tensor | None = None
    spelling: str = "plain"
    head: dict[str, Tensor] = field(default_factory=dict)
    lora_scale: float = 0.5
    targets: Tensor | None = None
    tokens: Tensor | None = None
    advantages: Tensor | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    factor: float = 1.0
    plan: bool = False
    main_grad: bool = False
    module: bool = False
    uncounted: bool = False  # one pass as on a GPU, where counting a chunk's rows would wait
    extreme: bool = False
    mended: bool = False
    broken: bool = False

    @property
    def command(self) -> str:
        return f"python -m tests.fuzz --seed {self.seed} --case {self.index} --backend {self.backend}"

    @property
    def head_dtype(self) -> torch.dtype:
        """Of the logits."""
        if not self.head:
            return self.dtype
        given = self.options.get("head_dtype")
        return given or torch.promote_types(self.head["hidden"].dtype, self.head["weight"].dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.head_dtype == torch.float64 else torch.float32


def legal_targets(case: Case) -> tuple[Tensor, Tensor]:
    """(bool: rows whose target is in the vocabulary, targets with 0 elsewhere)."""
    legal = (case.targets >= 0) & (case.targets < case.vocabulary)
    return legal, torch.where(legal, case.targets, 0).long()
