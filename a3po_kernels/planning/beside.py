"""What eager PyTorch, torch.compile and TRL's chunked head would take for the same rows, each by a formula of its own.

Counted from what each does, of a clipped policy loss with the entropy as a metric; tests/test_plan_measured.py holds
them against the rows of bench/results. None of them leaves rows out, and none splits the vocabulary over ranks: each
tensor-parallel rank would do all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .estimate import Machine
from .step import HeadStep

TRL_ROWS, TRL_COLUMNS = 4096, 32768  # of a tile of its head, as its trainer calls it


@dataclass(frozen=True)
class Formula:
    """name: whose; text: the formula in words. operations: of the products; moved: bytes that the rest reads and
    writes; memory: bytes above the inputs at the peak; seconds: at a machine's rates, one after the other.
    """

    name: str
    text: str
    operations: int
    moved: int
    memory: int
    seconds: float


@dataclass(frozen=True)
class _Sizes:
    """Elements of the logits, hidden states and weight; item: bytes of one of them; weight: of its gradient, or 0."""

    logits: int
    hidden: int
    weight: int
    item: int
    products: int

    @property
    def cast(self) -> int:
        """Bytes an element that a conversion to or from fp32 reads and writes."""
        return 0 if self.item == 4 else self.item + 4

    @property
    def results(self) -> int:
        return self.item * (self.hidden + self.weight)


def _eager(s: _Sizes) -> tuple[str, int, int]:
    # The cast, log-softmax, exp, its product with the log-softmax, the sum; the zeros that gather's gradient is put
    # into, log-softmax's backward (two reads, a write), the cast back.
    moved = (s.cast + 8 + 8 + 12 + 4) + (4 + 12 + s.cast)
    # Log-softmax, exp and their product; in backward the log-softmax and two gradients; then the last one's cast.
    memory = max(12 * s.logits, (4 + s.item) * s.logits, s.item * s.logits + s.results)
    text = f"log-softmax, its exp and their product in fp32, 12NV bytes at a time; {moved}NV bytes read and written"
    return text, moved * s.logits, memory


def _compiled(s: _Sizes) -> tuple[str, int, int]:
    # Fused: the logits read for the maximum, the sum and the entropy; zeros of gather's gradient, read for their row's
    # sum and once more beside the logits, whose place the gradient takes.
    moved = 3 * s.item + 4 + 4 + 4 + 2 * s.item
    memory = max((4 + s.item) * s.logits, s.item * s.logits + s.results)
    text = f"the logits and an fp32 gradient, {4 + s.item}NV bytes at a time; {moved}NV bytes read and written"
    return text, moved * s.logits, memory


def _trl(s: _Sizes, rows: int, vocabulary: int) -> tuple[str, int, int]:
    down, across = -(-rows // TRL_ROWS), -(-vocabulary // TRL_COLUMNS)
    # A read of each tile; formed again, a read and a write; both sums in fp32 read and written once a tile, begun by
    # zeros and cast at the end.
    moved = 3 * s.item * s.logits + 8 * (across * s.hidden + down * s.weight)
    moved += (4 + s.cast) * (s.hidden + s.weight)
    tile = s.item * min(rows, TRL_ROWS) * TRL_COLUMNS
    memory = tile + 4 * (s.hidden + s.weight) + (s.results if s.item < 4 else 0) + 12 * rows
    text = (
        f"every tile of {TRL_ROWS} x {TRL_COLUMNS} formed again in backward, also of rows without a gradient: 8NVH "
        "operations; both gradients summed in fp32, then cast"
    )
    return text, moved, memory


def why_not_beside(step: HeadStep) -> str | None:
    """Why the formulas say nothing of a step."""
    if step.dtype.itemsize > 4:
        return "their formulas are of fp32 and 16-bit heads"
    if step.lora_rank:
        return "their formulas are of a head without an adapter"
    return None


def formulas(step: HeadStep, machine: Machine) -> tuple[Formula, ...]:
    """Of the rows of one rank and the whole vocabulary on one GPU; ValueError where why_not_beside has a reason."""
    if (why := why_not_beside(step)) is not None:
        raise ValueError(why)
    n, v, h = step.tokens, step.vocabulary, step.width
    weight = 0 if step.frozen_weight else v * h
    sizes = _Sizes(n * v, n * h, weight, step.dtype.itemsize, 2 if step.frozen_weight else 3)
    found = []
    for name, again, (text, moved, memory) in (
        ("eager PyTorch", 0, _eager(sizes)), ("torch.compile", 0, _compiled(sizes)),
        ("TRL's chunked head", 1, _trl(sizes, n, v)),
    ):  # fmt: skip
        operations = (sizes.products + again) * 2 * n * v * h
        seconds = operations / machine.flops + moved / machine.copy
        found.append(Formula(name, text, operations, moved, memory, seconds))
    return tuple(found)
