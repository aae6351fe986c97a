"""One plan: a step's estimate, the limit that no kernel beats, its share of a training step, and others beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .beside import Formula, formulas, why_not_beside
from .cards import Card
from .estimate import WEIGHT_GRADIENTS, Machine, StepEstimate, estimate_step, least_bytes
from .model import Model
from .step import HeadStep


@dataclass(frozen=True)
class Limit:
    """Of a perfect kernel on one rank: operations it cannot avoid, bytes it must move, and the longer of both times at
    the rates flops and bandwidth, of the data sheet.
    """

    operations: int
    moved: int
    flops: float
    bandwidth: float

    @property
    def seconds(self) -> float:
        return max(self.operations / self.flops, self.moved / self.bandwidth)


@dataclass(frozen=True)
class Share:
    """Of a training step: seconds of the model's forward and backward at `mfu` of the data sheet's rate, on one rank of
    those that share the replica, and what part of both the head is.
    """

    operations: int
    mfu: float
    model_seconds: float
    share: float


@dataclass(frozen=True)
class ChunkPlan:
    """What exists of the logits at a time: rows x columns of `count` chunks, under a budget of max_chunk_bytes."""

    rows: int
    columns: int
    count: int
    max_chunk_bytes: int


@dataclass(frozen=True)
class Plan:
    step: HeadStep
    card: Card
    machine: Machine
    model: Model
    estimate: StepEstimate
    chunk: ChunkPlan
    limit: Limit
    share: Share | None
    beside: tuple[Formula, ...]
    why_not_beside: str | None

    def as_json(self) -> dict[str, Any]:
        """Everything but the step itself, which the arguments say; seconds, bytes, operations."""
        model = {**asdict(self.model), "dtype": None if self.model.dtype is None else str(self.model.dtype)}
        memory = self.estimate.memory
        return {
            "gpu": asdict(self.card), "machine": asdict(self.machine), "model": model,
            "estimate": asdict(self.estimate), "memory_at_peak": {"moment": memory.moment, "bytes": memory.peak},
            "chunk": asdict(self.chunk), "limit": {**asdict(self.limit), "seconds": self.limit.seconds},
            "share": None if self.share is None else asdict(self.share),
            "beside": [asdict(one) for one in self.beside], "why_not_beside": self.why_not_beside,
        }  # fmt: skip


def limit_of(step: HeadStep, card: Card, flops: float | None = None) -> Limit:
    """2NVH for the statistics of the rows that are computed, 4fNVH (2fNVH of a frozen weight) for the gradients.

    Their hidden states and the weight read once, gradients written once. flops: instead of the card's, of 16 bits.
    """
    v, h = step.shard, step.width
    products = 2 * step.computed + (2 if step.frozen_weight else 4) * step.active
    adapter = (2 * step.computed + 4 * step.active) * step.lora_rank * (h + v)
    rate = card.flops if flops is None else flops
    return Limit(products * v * h + adapter, least_bytes(step), rate, card.bandwidth)


def share_of(step: HeadStep, card: Card, model: Model, mfu: float, head_seconds: float) -> Share:
    operations = model.operations(step.rows, -(-step.rows // step.rollouts))
    seconds = operations / (step.tp * step.cp * mfu * card.flops)
    return Share(operations, mfu, seconds, head_seconds / (head_seconds + seconds))


def make_plan(
    step: HeadStep, card: Card, model: Model, machine: Machine | None = None, *, mfu: float = 0.4,
    weight_gradient: str = WEIGHT_GRADIENTS[0], flops: float | None = None,
) -> Plan:  # fmt: skip
    """step: on cards of this kind. machine: None: Machine.of(card). mfu: of the model below the head, an assumption.
    weight_gradient: as estimate_step takes it. flops: of the limit, where the card's 16-bit rate is not the head's.

    Raises ValueError for an mfu outside (0, 1], and for a step or a model of another card or head.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must lie in (0, 1]; got {mfu}")
    if step.device_memory != card.memory:
        raise ValueError(f"step must have device_memory = {card.memory}, its card's; got {step.device_memory}")
    if (step.vocabulary, step.width) != (model.vocabulary, model.hidden):
        takes = f"a head of {step.vocabulary} x {step.width}, as step has"
        raise ValueError(f"model must have {takes}; got {model.vocabulary} x {model.hidden}")
    machine = Machine.of(card) if machine is None else machine
    estimate, tile, why = estimate_step(step, machine, weight_gradient), step.tile(), why_not_beside(step)
    count = len(step.chunks()) if step.taken_route == "one-pass" else tile.row_count * tile.column_count
    chunk = ChunkPlan(
        tile.rows if step.active else 0, tile.columns, count if step.active else 0,
        step.chunk_bytes(step.taken_route == "one-pass"),
    )  # fmt: skip
    return Plan(
        step, card, machine, model, estimate, chunk, limit_of(step, card, flops),
        None if model.parameters is None else share_of(step, card, model, mfu, estimate.seconds),
        () if why else formulas(step, machine), why,
    )  # fmt: skip
