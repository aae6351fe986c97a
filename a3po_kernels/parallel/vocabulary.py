"""A vocabulary split over tensor-parallel ranks: which part is here, and the three things that cross ranks.

Of each row's statistics every rank gathers the parts, [ranks, 4, N], and merges them in rank order: the same bits
everywhere. The gradient of the hidden states, of which each rank's product is a part, is summed in fp32. Where the rows
of the hidden states are split too they are gathered first. The weight, its gradient and the logits stay where they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.checks import check_word
from ..core.operators import plainly_differentiable
from .groups import all_gather_single, check_group, reduce_scatter_single

LAYOUTS = ("replicated", "sequence_sharded")
REDUCTIONS = ("all_reduce", "reduce_scatter", "partial")


def _group_of(name: str) -> dist.ProcessGroup:
    """Operators take a group by its name, as PyTorch's own functional collectives do."""
    c10d: Any = dist.distributed_c10d
    return c10d._resolve_process_group(name)


class Split(NamedTuple):
    """How the caller says that a head is split: see linear_token_logprobs."""

    tp_group: Any = None
    vocab_start: Any = None
    hidden_layout: str = "replicated"
    grad_hidden: str | None = None


class Shard(NamedTuple):
    """This rank's part of a vocabulary.

    group: name of the ranks' group. grad_hidden: one of REDUCTIONS. first: global number of the first column. common:
    columns by which all ranks cut rows into chunks, so that they cut the same. total: of the whole vocabulary. length:
    rows in a run that is split over the ranks in "reduce_scatter".
    """

    group: str
    grad_hidden: str
    first: int
    common: int
    total: int
    length: int

    @classmethod
    def of(cls, group: str, grad_hidden: str, numbers: list[int]) -> Shard | None:
        return cls(group, grad_hidden, *numbers) if group else None

    @staticmethod
    def flat(shard: Shard | None) -> tuple[str, str, list[int]]:
        """As operators take it; the inverse of `of`."""
        return ("", "", []) if shard is None else (shard.group, shard.grad_hidden, list(shard[2:]))

    @property
    def process_group(self) -> dist.ProcessGroup:
        return _group_of(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.process_group)

    def own(self, rows: Tensor) -> Tensor:
        """Bool, like rows: whether "reduce_scatter" gives this rank the gradient of these flat rows."""
        rank, each = dist.get_rank(self.process_group), self.length // self.ranks
        return (rows % self.length) // each == rank

    def gather(self, part: Tensor) -> Gathering:
        """Starts to gather every rank's `part`, contiguous and of one shape on all."""
        return Gathering(part, self.process_group)

    def sum_up(self, part: Tensor) -> None:
        """Sums `part` over the ranks, in place."""
        dist.all_reduce(part, group=self.process_group)


class Gathering:
    """An all-gather on its way."""

    def __init__(self, part: Tensor, group: dist.ProcessGroup):
        ranks = dist.get_world_size(group)
        self.part = part  # it must live as long as the collective
        self.parts = part.new_empty((ranks, *part.shape))
        self.work = all_gather_single(self.parts.view(-1), part.reshape(-1), group=group, async_op=True)

    def wait(self) -> Tensor:
        """[ranks, ...], in rank order."""
        self.work.wait()
        return self.parts


class HiddenSum:
    """The sum over ranks of a gradient [rows, H] of hidden states, started piece by piece while products go on."""

    def __init__(self, shard: Shard, gradient: Tensor, rows: Tensor | None):
        """rows: the numbers of the gradient's rows among all; None: it has them all."""
        self.shard, self.gradient, self.rows = shard, gradient, rows
        self.group = shard.process_group
        # A part of the rows moves no more by an all-reduce than all of them by a reduce-scatter.
        self.scatters = shard.grad_hidden == "reduce_scatter" and rows is None
        self.works: list[Any] = []
        self.mine: Tensor | None = None

    def start(self, rows: slice, last: bool) -> None:
        """These rows are complete on this rank, and all are if `last`."""
        if self.shard.grad_hidden == "partial" or not self.gradient.numel():
            return
        if not self.scatters:
            self.works.append(dist.all_reduce(self.gradient[rows], group=self.group, async_op=True))
        elif last:
            ranks, length = self.shard.ranks, self.shard.length
            each, width = length // ranks, self.gradient.shape[1]
            # Kept, for it must live as long as the collective.
            self.by_rank = self.gradient.view(-1, ranks, each, width).transpose(0, 1).contiguous()
            self.mine = self.by_rank.new_empty(self.by_rank.shape[1:])
            self.works.append(
                reduce_scatter_single(self.mine.view(-1), self.by_rank.view(-1), group=self.group, async_op=True)
            )

    def finish(self) -> None:
        """Waits; the gradient is then the sum, or in "reduce_scatter" the sum at this rank's rows and 0 elsewhere."""
        for work in self.works:
            work.wait()
        if self.mine is not None:
            ranks, each, width = self.shard.ranks, self.mine.shape[1], self.gradient.shape[1]
            self.gradient.zero_()
            self.gradient.view(-1, ranks, each, width)[:, dist.get_rank(self.group)] = self.mine
        elif self.shard.grad_hidden == "reduce_scatter" and self.rows is not None:
            self.gradient.masked_fill_(~self.shard.own(self.rows).unsqueeze(-1), 0.0)


@torch.library.custom_op("a3po::gather_rows", mutates_args=())
def _gather_rows(mine: Tensor, group: str, rank: int, ranks: int) -> Tensor:
    """The rows [..., T / ranks, H] of all ranks as [..., T, H]; backward takes this rank's rows of the gradient."""
    parts = Gathering(mine.contiguous(), _group_of(group)).wait()
    return torch.cat(parts.unbind(), dim=-2)


@_gather_rows.register_fake
def _(mine, group, rank, ranks):
    return mine.new_empty((*mine.shape[:-2], mine.shape[-2] * ranks, mine.shape[-1]))


def _setup_context(ctx, inputs, output):
    mine, _, ctx.rank, _ = inputs
    ctx.each = mine.shape[-2]


def _backward(ctx, grad):
    return grad.narrow(-2, ctx.rank * ctx.each, ctx.each).clone(), None, None, None


_gather_plainly = plainly_differentiable(_gather_rows, _setup_context, _backward)


def gather_hidden(hidden: Tensor, shard: Shard, split: Split) -> tuple[Tensor, Shard]:
    """All rows of the hidden states, and the shard with what is left to say of their gradient.

    hidden: [..., T, H], or in the layout "sequence_sharded" this rank's [..., T / ranks, H].
    """
    if hidden.ndim < 2:
        raise ValueError(f"hidden must have shape [..., T, H] where the head is split; got {list(hidden.shape)}")
    ranks = dist.get_world_size(split.tp_group)
    if split.hidden_layout == "sequence_sharded":
        shard = shard._replace(grad_hidden="reduce_scatter")
        hidden = _gather_plainly(hidden, shard.group, dist.get_rank(split.tp_group), ranks)
    length = hidden.shape[-2]
    if shard.grad_hidden == "reduce_scatter" and length % ranks:
        raise ValueError(
            f"grad_hidden 'reduce_scatter' needs as many rows for each of the {ranks} ranks; hidden has {length}"
        )
    return hidden, shard._replace(length=max(length, 1))


def read_split(
    split: Split, rows: int, vocab_size: int | None, device: torch.device, may_read: bool,
    what: str = "the rows of weight",
) -> tuple[Shard | None, int]:  # fmt: skip
    """(the shard, or None where one rank has it all; how many of `rows`, this rank's part and padding, take part).

    may_read: whether the ranks may exchange their sizes, for which a GPU waits.
    """
    _check_words(split)
    if split.tp_group is None:
        if split.vocab_start is not None:
            raise ValueError("vocab_start is where this rank's part of a vocabulary begins: it needs tp_group")
        return None, _local_size(vocab_size, rows, what)
    check_group("tp_group", split.tp_group)
    group: dist.ProcessGroup = split.tp_group
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    first, stop = _read_start(split.vocab_start, rank * rows, rows, what)
    if ranks == 1:
        if first:
            raise ValueError(f"vocab_start must be 0 in a group of one rank, which has the vocabulary; got {first}")
        if not stop:
            raise ValueError(f"{what} must be at least one in a group of one rank, which has the vocabulary; got 0")
        return None, _local_size(vocab_size, stop, what)
    if vocab_size is not None:
        _check_size(vocab_size)
        if split.vocab_start is None and vocab_size > ranks * rows:
            raise ValueError(f"vocab_size must lie in [1, {ranks * rows}], {what} of all ranks; got {vocab_size}")
    if split.vocab_start is None:
        common, total = rows, vocab_size or ranks * rows
    elif vocab_size is not None:
        common, total = -(-vocab_size // ranks), vocab_size
    elif not may_read:
        raise ValueError("vocab_start needs vocab_size, the whole vocabulary's, in what is compiled or captured")
    else:
        common, total = _agree(stop - first, stop, group, device)
    # What lies behind the vocabulary is padding: a rank may have nothing else.
    first, stop = min(first, total), min(stop, total)
    shard = Shard(group.group_name, split.grad_hidden or "all_reduce", first, max(common, 1), total, 1)
    return shard, stop - first


def _check_words(split: Split) -> None:
    check_word("hidden_layout", split.hidden_layout, LAYOUTS)
    if split.grad_hidden is not None:
        check_word("grad_hidden", split.grad_hidden, REDUCTIONS)
    if split.tp_group is None and (split.grad_hidden is not None or split.hidden_layout != "replicated"):
        raise ValueError("grad_hidden and hidden_layout say what crosses tensor-parallel ranks: they need tp_group")
    if split.hidden_layout == "sequence_sharded" and split.grad_hidden not in (None, "reduce_scatter"):
        raise ValueError(
            f"hidden_layout 'sequence_sharded' needs grad_hidden 'reduce_scatter', the gradient of this rank's own "
            f"rows; got {split.grad_hidden!r}"
        )


def _check_size(vocab_size: object) -> None:
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an integer; got {type(vocab_size).__name__}")
    if vocab_size < 1:
        raise ValueError(f"vocab_size must be positive; got {vocab_size}")


def _local_size(vocab_size: int | None, rows: int, what: str) -> int:
    if vocab_size is None:
        return rows
    _check_size(vocab_size)
    if vocab_size > rows:
        raise ValueError(f"vocab_size must lie in [1, {rows}], {what}; got {vocab_size}")
    return vocab_size


def _read_start(given: Any, default: int, rows: int, what: str) -> tuple[int, int]:
    """(first, stop) of a rank's part: vocab_start is the first, or both where padding follows."""
    if given is None:
        return default, default + rows
    numbers = given if isinstance(given, tuple) and len(given) == 2 else (given,)
    if any(isinstance(x, bool) or not isinstance(x, int) for x in numbers):
        raise TypeError(f"vocab_start must be an integer, or a tuple (first, stop) of them; got {given!r}")
    first, stop = numbers[0], numbers[1] if len(numbers) == 2 else numbers[0] + rows
    if not 0 <= first <= stop <= first + rows:
        raise ValueError(
            f"vocab_start must be at least 0 and its end at most {rows} further, {what}; got {given!r}"
        )
    return first, stop


def _agree(columns: int, stop: int, group: dist.ProcessGroup, device: torch.device) -> tuple[int, int]:
    """The largest of the ranks' parts, and where the last one ends."""
    sizes = torch.tensor([columns, stop], dtype=torch.int64, device=device)
    dist.all_reduce(sizes, dist.ReduceOp.MAX, group=group)
    largest, total = sizes.tolist()
    return largest, total
