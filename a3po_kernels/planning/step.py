"""A step of the linear head over many ranks: which rows meet which products, and every collective it calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from ..core.checks import LOGIT_DTYPES, check_number, check_word, compute_dtype
from ..core.tiles import Tiles, card_chunk_bytes, column_tiles, row_tiles
from ..losses.linear import ROUTES, STATISTICS
from ..losses.ratio_weights import reads_rollout
from ..losses.rows import dependence
from ..named_objectives import as_objective, dapo
from ..objectives import CustomSurrogate, Objective, TokenRule
from ..parallel.vocabulary import LAYOUTS, REDUCTIONS
from .cards import CARDS

H200_BYTES = CARDS["h200"].memory
REDUCED_METRICS = 18  # fp64 numbers that reduce_metrics gathers
PLACE_BYTES = 3  # of a position within blocks that ranks hold
DIGITS = 256  # counts of one round of a radix search


@dataclass(frozen=True)
class Traffic:
    """Equal collectives of one rank.

    kind: "all_gather", "all_reduce" or "reduce_scatter". bytes: each call's input tensor on this rank. group: "tp",
    "cp", "dp", or "data", the ranks of dp and cp, which hold the same rows of the weight. what: it is for.
    behind: the product that runs meanwhile, "logits" or "dWeight" of `rows` rows; "" where the step waits.
    """

    what: str
    kind: str
    group: str
    bytes: int
    count: int = 1
    behind: str = ""
    rows: int = 0


def check_whole(name: str, value: object, least: int, takes: str) -> None:
    """Raises TypeError for what is no whole number, ValueError below the least."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {takes}; got {value}")


@dataclass(frozen=True)
class HeadStep:
    """Forward and backward of linear_policy_loss on tp x cp x dp ranks, from the sizes alone.

    rows: tokens N of one data-parallel replica, which cp ranks share; rollouts: S of a replica, of equal length.
    vocabulary, width: V, H of the whole head, its rows split over tp ranks. dtype: of weight and hidden states.
    objective: an Objective, or a preset's name.
    on_policy: without old log-probs, entropy and min-p log-probs the current policy is the behaviour policy.
    route: "auto" as linear_policy_loss chooses; statistics, max_chunk_bytes: as there. device_memory: of the card,
    which decides the default chunk. active_fraction: share of the rows with a gradient. frozen_weight: no dWeight.
    grad_hidden: "all_reduce", "reduce_scatter" or "partial"; None is the layout's: "all_reduce" of replicated hidden
    states, "reduce_scatter" of sequence-sharded ones. lora_rank: of an adapter on the head, 0 for none.

    Raises:
        ValueError: a size out of range, an unknown word, a combination that is none, or an objective whose collectives
            over context-parallel ranks are not known.
    """

    rows: int
    vocabulary: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    objective: Objective = field(default_factory=dapo)
    on_policy: bool = False
    rollouts: int = 16
    tp: int = 1
    cp: int = 1
    dp: int = 1
    route: str = "auto"
    active_fraction: float = 1.0
    statistics: str = "all"
    grad_hidden: str | None = None
    hidden_layout: str = "replicated"
    lora_rank: int = 0
    frozen_weight: bool = False
    reduce_metrics: bool = True
    max_chunk_bytes: int | None = None
    device_memory: int = H200_BYTES

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", as_objective(self.objective))
        for name in ("rows", "vocabulary", "width", "rollouts", "tp", "cp", "dp", "device_memory"):
            check_whole(name, getattr(self, name), 1, "positive")
        check_whole("lora_rank", self.lora_rank, 0, "0 or more")
        if self.max_chunk_bytes is not None:
            check_whole("max_chunk_bytes", self.max_chunk_bytes, 1, "positive or None")
        if self.dtype not in LOGIT_DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, LOGIT_DTYPES))}; got {self.dtype!r}")
        check_number("active_fraction", self.active_fraction, 0.0, 1.0)
        check_word("route", self.route, ROUTES)
        check_word("statistics", self.statistics, STATISTICS)
        check_word("hidden_layout", self.hidden_layout, LAYOUTS)
        if self.grad_hidden is not None:
            check_word("grad_hidden", self.grad_hidden, REDUCTIONS)
        if self.hidden_layout == "sequence_sharded" and self.hidden_gradient != "reduce_scatter":
            raise ValueError(
                f"grad_hidden must be 'reduce_scatter' or None with sequence_sharded; got {self.grad_hidden!r}"
            )
        for name, size, parts in (("vocabulary", self.vocabulary, "tp"), ("rows", self.rows, "cp")):
            if size < getattr(self, parts):
                raise ValueError(f"{parts} = {getattr(self, parts)} ranks cannot share {name} = {size}")
        if self.cp > 1 and (why := _unknown_over_context(self.objective)) is not None:
            raise ValueError(f"objective with cp = {self.cp}: {why}")
        if self.route == "one-pass" and not self._one_pass_possible():
            raise ValueError(
                f"route='one-pass' needs a chunk that holds a whole {self.unit}; max_chunk_bytes = "
                f"{self.chunk_bytes(True)} does not"
            )

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * self.dp

    @property
    def tokens(self) -> int:
        """Rows of one rank; the first context-parallel ranks have the larger share."""
        return -(-self.rows // self.cp)

    @property
    def shard(self) -> int:
        """Rows of the vocabulary on the rank that has most."""
        return -(-self.vocabulary // self.tp)

    @property
    def active(self) -> int:
        return round(self.tokens * self.active_fraction)

    @property
    def computed(self) -> int:
        """Rows whose statistics are taken."""
        return self.active if self.statistics == "active" else self.tokens

    @property
    def wide(self) -> int:
        """Bytes of a number of the statistics and of dHidden: 4, of an fp64 head 8."""
        return compute_dtype(self.dtype).itemsize

    @property
    def hidden_gradient(self) -> str:
        return self.grad_hidden or ("all_reduce" if self.hidden_layout == "replicated" else "reduce_scatter")

    @property
    def current_rules(self) -> tuple[TokenRule, ...]:
        """The rules that select by the current policy."""
        return tuple(
            rule for rule in self.objective.shaping
            if isinstance(rule, TokenRule) and rule.reads_policy
            and (rule.source == "current" or (self.on_policy and not callable(rule.metric)))
        )  # fmt: skip

    @property
    def unit(self) -> str:
        return dependence(self.objective, list(self.current_rules))

    def chunk_bytes(self, one_pass: bool) -> int:
        return self.max_chunk_bytes or card_chunk_bytes(self.device_memory, one_pass)

    @property
    def _budget(self) -> int:
        """Of a chunk of one pass; of several two exist at a time where the head is split."""
        budget = self.chunk_bytes(True)
        one = self.active <= max(budget // (self.dtype.itemsize * self.shard), 1)
        return budget if one or self.tp == 1 else budget // 2

    @property
    def _longest(self) -> int:
        """Rows that a chunk of one pass may hold."""
        return max(self._budget // (self.dtype.itemsize * self.shard), 1)

    def _one_pass_possible(self) -> bool:
        if self.unit == "token":
            return True
        if self.cp > 1:
            return False  # a rank has no rollout whole
        if self.active <= self._longest:
            return True
        return self.unit == "rollout" and -(-self.tokens // self.rollouts) <= self._longest

    @property
    def taken_route(self) -> str:
        if not self.active:
            return "recompute"  # of no rows: the statistics alone
        if self.route != "auto":
            return self.route
        return "one-pass" if self._one_pass_possible() else "recompute"

    def tile(self) -> Tiles:
        """The grid over the logits [active rows, V / tp] whose gradient is formed: its rows and columns at a time."""
        size = self.dtype.itemsize
        if self.taken_route == "recompute":
            return column_tiles(self.active, self.shard, size, self.chunk_bytes(False))
        return Tiles(self.active, self.shard, max(self.chunks(), default=0), self.shard)

    def chunks(self) -> list[int]:
        """Rows of each chunk that one pass forms the gradient of; of the recompute route one number, all of them."""
        if self.taken_route == "recompute":
            return [self.active] if self.active else []
        if self.unit == "token" or self.active <= self._longest:
            step = row_tiles(self.active, self.shard, self.dtype.itemsize, self._budget).rows
        else:  # whole rollouts, as many as fit
            rollout = -(-self.tokens // self.rollouts)
            step = self._longest // rollout * rollout
        return [min(step, self.active - start) for start in range(0, self.active, step)]


def _unknown_over_context(objective: Objective) -> str | None:
    if isinstance(objective.surrogate, CustomSurrogate):
        return "a CustomSurrogate's sums over rollouts are its function's"
    if objective.low_probability is not None or any(
        isinstance(rule, TokenRule) and rule.scope == "batch" for rule in objective.shaping
    ):
        return "the rounds of a selection over the batch are not modelled"
    return None


def _rollout_sums(objective: Objective) -> int:
    """[S] sums over context-parallel ranks besides the tokens': of the kept ones where they are divided by; of a
    rollout's ratio, and back where its gradient is the rollout's; of each factor that reads it."""
    selected = objective.normalize_over == "selected"
    sequence = {"token": 0, "sequence-token": 1, "sequence": 2}[objective.ratio_level]
    factors = len(objective.ratio_weights) if reads_rollout(objective) else 0
    return selected + sequence + factors


def _tensor_parallel(step: HeadStep) -> Iterator[Traffic]:
    numbers, wide = 4 * step.wide, step.wide
    chunks, one_pass = step.chunks(), step.taken_route == "one-pass"
    hidden = step.tokens * step.width
    padded = -(-step.tokens // step.tp) * step.width  # of one rank's share of the sequence
    if step.hidden_layout == "sequence_sharded":
        yield Traffic("hidden states", "all_gather", "tp", padded * step.dtype.itemsize)
    if step.objective.low_probability is not None and step.on_policy:
        tile = row_tiles(step.tokens, step.shard, step.dtype.itemsize, step.chunk_bytes(False)).rows
        for start in range(0, step.tokens, tile):
            rows = min(tile, step.tokens - start)
            yield Traffic("min-p maximum", "all_gather", "tp", wide * rows)
            yield Traffic("min-p sum and target", "all_gather", "tp", 2 * wide * rows)
    if one_pass:
        for rows, after in zip(chunks, [*chunks[1:], 0], strict=True):
            yield Traffic("statistics", "all_gather", "tp", numbers * rows, 1, "logits" if after else "", after)
        if step.computed > step.active:
            yield Traffic("statistics of other rows", "all_gather", "tp", numbers * (step.computed - step.active))
    elif step.computed:
        yield Traffic("statistics", "all_gather", "tp", numbers * step.computed)
    if step.active and step.hidden_gradient == "all_reduce":
        # What an adapter adds to it is known at the end.
        for rows in [step.active] if step.lora_rank else chunks:
            behind = "dWeight" if one_pass and not step.frozen_weight and not step.lora_rank else ""
            yield Traffic("dHidden", "all_reduce", "tp", wide * rows * step.width, 1, behind, rows if behind else 0)
    elif step.hidden_gradient == "reduce_scatter":
        whole = padded * step.tp if step.hidden_layout == "sequence_sharded" else hidden
        yield Traffic("dHidden", "reduce_scatter", "tp", wide * whole)
    if step.lora_rank:
        yield Traffic("LoRA A's gradient", "all_reduce", "tp", wide * step.lora_rank * step.width)


def _data_parallel(step: HeadStep) -> Iterator[Traffic]:
    rules = [r for r in step.objective.shaping if isinstance(r, TokenRule) and r.scope == "global"]
    for _ in rules:
        yield Traffic("global selection: tokens", "all_reduce", "dp", 8)
        yield Traffic("global selection: counts", "all_reduce", "dp", 8 * DIGITS, step.wide)
        yield Traffic("global selection: ties", "all_gather", "dp", 8)


def _context_parallel(step: HeadStep) -> Iterator[Traffic]:
    rules = [r for r in step.objective.shaping if isinstance(r, TokenRule) and r.scope == "rollout"]
    # In fp64, with two numbers by which unequal blocks are found.
    yield Traffic("tokens of rollouts", "all_reduce", "cp", 8 * (step.rollouts + 2))
    if sums := _rollout_sums(step.objective):
        yield Traffic("sums of rollouts", "all_reduce", "cp", step.wide * step.rollouts, sums)
    if rules:
        # The metric's bytes, then the position's, of blocks.
        rounds = step.wide + PLACE_BYTES
        yield Traffic("selection in rollouts: tokens", "all_reduce", "cp", 8 * step.rollouts, len(rules))
        size = 8 * DIGITS * step.rollouts
        yield Traffic("selection in rollouts: counts", "all_reduce", "cp", size, rounds * len(rules))


def traffic_of_step(step: HeadStep) -> list[Traffic]:
    """The collectives that one rank calls in forward and backward of the head, equal ones together."""
    found: list[Traffic] = []
    if step.tp > 1:
        found += _tensor_parallel(step)
    if step.cp > 1:
        found += _context_parallel(step)
    if step.dp > 1:
        found += _data_parallel(step)
    if step.reduce_metrics and step.dp * step.cp > 1:
        found.append(Traffic("metrics", "all_gather", "dp" if step.cp == 1 else "data", REDUCED_METRICS * 8))
    merged: Counter[Traffic] = Counter()
    for one in found:
        merged[replace(one, count=1)] += one.count
    return [replace(one, count=count) for one, count in merged.items()]


def collectives_of_step(step: HeadStep) -> list[tuple[str, int, int]]:
    """(kind, count, bytes) of the step's collectives, those of one kind and size together in order of their first call.

    kind: "all_gather", "all_reduce" or "reduce_scatter"; bytes: each rank's input tensor. Not the trainer's own
    reduction of the weight's gradient.
    """
    counts: Counter[tuple[str, int]] = Counter()
    for one in traffic_of_step(step):
        counts[one.kind, one.bytes] += one.count
    return [(kind, count, size) for (kind, size), count in counts.items()]


def weight_gradient_traffic(step: HeadStep, kind: str) -> Traffic | None:
    """The trainer's reduction of the weight's gradient over the ranks that hold the same rows of it, if there is any.

    kind: "all_reduce" (DistributedDataParallel) or "reduce_scatter" (a sharded optimizer).
    """
    if step.dp * step.cp == 1 or step.frozen_weight:
        return None
    return Traffic("dWeight, the trainer's", kind, "data", step.shard * step.width * step.dtype.itemsize)
