"""The head hidden @ weight.T and its gradients, a tile of the logits at a time. The GEMMs are PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import compute_dtype
from ..core.tiles import Tiles
from ..parallel.vocabulary import HiddenSum, Shard


class LinearHead(NamedTuple):
    """logits = hidden @ (weight + lora_scale * lora_b @ lora_a).T + bias in `dtype`; no merged weight is formed.

    hidden [N, H]; weight [V, H], bias [V], lora_b [V, r], whose first `vocabulary` rows take part; lora_a [r, H].
    shard: where these are this rank's part of a vocabulary.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    lora_scale: float
    vocabulary: int
    dtype: torch.dtype
    shard: Shard | None = None

    @property
    def total(self) -> int:
        """The whole vocabulary, of all ranks."""
        return self.vocabulary if self.shard is None else self.shard.total

    @property
    def first(self) -> int:
        """The global number of the first row."""
        return 0 if self.shard is None else self.shard.first

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """What may want a gradient, in the order of `Gradients`."""
        return self.hidden, self.weight, self.bias, self.lora_a, self.lora_b

    def tile_bytes(self) -> int:
        return torch.empty((), dtype=self.dtype).element_size()


class Gradients(NamedTuple):
    """Of the hidden states and the parameters of a head; None where none was wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


def add_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool, alpha: float = 1.0) -> None:
    """out = [out +] alpha * a @ b, summed in out's dtype or wider: no product is rounded before it is added."""
    if a.dtype == out.dtype and (out.dtype in (torch.float32, torch.float64) or not add):
        torch.addmm(out, a, b, beta=1.0 if add else 0.0, alpha=alpha, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=1.0 if add else 0.0, alpha=alpha, out=out)
    elif out.dtype == torch.float32:
        torch.addmm(out, a.float(), b.float(), beta=1.0 if add else 0.0, alpha=alpha, out=out)
    else:
        wide = compute_dtype(a.dtype)
        product = torch.mm(a.to(wide), b.to(wide)).mul_(alpha)
        out.copy_(product.add_(out) if add else product)


class Logits:
    """Tiles of the logits of some rows (all if `rows` is None); as many as there are buffers live at a time."""

    def __init__(self, head: LinearHead, rows: Tensor | None, tiles: Tiles, buffers: int = 1):
        self.head, self.tiles, self.rows = head, tiles, rows
        hidden = head.hidden if rows is None else head.hidden.index_select(0, rows)
        self.hidden = hidden.to(head.dtype)
        self.adapted = None
        if head.lora_a is not None:
            self.adapted = self.hidden @ head.lora_a.to(head.dtype).t()
        self.buffers = [self._buffer() for _ in range(buffers)]
        self.columns: slice | None = None

    def _buffer(self) -> Tensor:
        return torch.empty(self.tiles.rows * self.tiles.columns, dtype=self.head.dtype, device=self.hidden.device)

    @property
    def buffer(self) -> Tensor:
        """The one that the next tile goes to."""
        return self.buffers[0]

    def _slice(self, parameter: Tensor) -> Tensor:
        assert self.columns is not None
        return parameter[self.columns].to(self.head.dtype)

    def enter(self, columns: slice) -> None:
        """The columns that the next tiles have; their weight is cast once where its dtype differs."""
        if columns != self.columns:
            self.columns = columns
            head = self.head
            self.weight = self._slice(head.weight)
            self.bias = None if head.bias is None else self._slice(head.bias)
            self.lora_b = None if head.lora_b is None else self._slice(head.lora_b)

    def tile(self, rows: slice) -> Tensor:
        """[rows, columns], contiguous."""
        assert self.columns is not None
        shape = (rows.stop - rows.start, self.columns.stop - self.columns.start)
        out = self.buffer[: shape[0] * shape[1]].view(shape)
        if self.bias is None:
            torch.mm(self.hidden[rows], self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, self.hidden[rows], self.weight.t(), out=out)
        if self.adapted is not None and self.lora_b is not None:
            out.addmm_(self.adapted[rows], self.lora_b.t(), alpha=self.head.lora_scale)
        self.buffers.append(self.buffers.pop(0))
        return out

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, tile), the columns in the outer loop."""
        for columns in self.tiles.column_slices():
            self.enter(columns)
            for rows in self.tiles.row_slices():
                yield rows, columns, self.tile(rows)

    def one_ahead(self, begin: Callable[[slice, slice, Tensor], None]) -> Iterator[tuple[slice, slice, Tensor]]:
        """The same, each after the next one's product: what `begin` starts of a tile goes on meanwhile."""
        last = None
        for item in self:
            begin(*item)
            if last is not None:
                yield last
            last = item
        if last is not None:
            yield last


class _Sum:
    """A sum of products over tiles, [rows, width], in its own dtype where that is exact enough, else in fp32 first."""

    def __init__(self, out: Tensor, pieces: int, add: bool = False):
        self.out, self.first = out, not add
        wide = out.dtype in (torch.float32, torch.float64) or (pieces == 1 and not add)
        self.sum = out if wide else torch.empty(out.shape, dtype=torch.float32, device=out.device)

    def add(self, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
        add_product(self.sum, a, b, add=not self.first, alpha=alpha)
        self.first = False

    def close(self) -> None:
        if self.sum is not self.out:
            self.out.copy_(self.sum)


# (rows, columns, tile) -> (the gradient of the tile's kept rows, their numbers in it or None for all).
ToGradient = Callable[[slice, slice, Tensor], tuple[Tensor, Tensor | None]]


def at_rows(values: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    return None if values is None else values[rows]


def _like_rows(values: Tensor | None, kept: Tensor) -> Tensor | None:
    return None if values is None else values.new_empty((kept.numel(), values.shape[1]))


def _put_rows(out: Tensor | None, rows: slice, kept_rows: Tensor, values: Tensor | None, later: bool) -> None:
    """Stores (or, in later columns, adds) the products of some of a chunk's rows; the others are 0."""
    if out is None or values is None:
        return
    if later:
        out.index_add_(0, kept_rows, values)
    else:
        out[rows] = 0
        out.index_copy_(0, kept_rows, values)


def head_gradients(
    head: LinearHead, logits: Logits, to_gradient: ToGradient, wanted: tuple[bool, ...],
    weight_dtype: torch.dtype, active: Tensor | None = None, main_grad: Tensor | None = None,
    row_factors: Callable[[], Tensor | None] = lambda: None,
    begin: Callable[[slice, slice, Tensor], None] | None = None,
) -> Gradients:  # fmt: skip
    """Turns each tile of the logits into its gradient by `to_gradient` and sums the products.

    hidden's gradient is [rows of `logits`, H] in fp32 (fp64 for an fp64 head; on a CPU, where no low-precision product
    sums into fp32, in the head's dtype if it is one product); weight's is in weight_dtype, or is added
    to main_grad [V, H] instead. active: bool [rows], False where the gradient is 0 and the hidden state may be NaN.
    row_factors: after the first to_gradient, factors [rows] of the gradients that the tiles lack (of tiles that hold
    whole rows), or None. begin: called with a tile before the one before it goes to to_gradient, which `logits` has two
    buffers for; all ranks of a split head then have the same tiles.
    """
    tiles, hidden = logits.tiles, logits.hidden
    device, dtype = hidden.device, compute_dtype(head.dtype)
    shard = head.shard
    lone = device.type == "cpu" and tiles.column_count == 1 and head.lora_a is None and head.dtype != torch.float16
    lone = lone and shard is None  # parts of a sum
    want_hidden, want_weight, want_bias, want_a, want_b = wanted
    want_adapted = head.lora_a is not None and (want_hidden or want_a)

    def zeros(like: Tensor | None, want: bool, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.zeros(like.shape, dtype=dtype, device=device) if want and like is not None else None

    # Times a zero gradient a NaN is NaN still.
    clean = hidden if active is None else hidden.masked_fill(~active.unsqueeze(-1), 0.0)
    adapted = logits.adapted
    if adapted is not None and active is not None:
        adapted = adapted.masked_fill(~active.unsqueeze(-1), 0.0)
    d_hidden = None
    if want_hidden:
        d_hidden = torch.empty(hidden.shape, dtype=head.dtype if lone else dtype, device=device)
    d_adapted = None if adapted is None or not want_adapted else torch.empty(adapted.shape, dtype=dtype, device=device)
    d_weight = main_grad
    if want_weight and main_grad is None:
        d_weight = torch.empty(head.weight.shape, dtype=weight_dtype, device=device)
        # Every row that meets a tile is written.
        d_weight[head.vocabulary if tiles.total_rows else 0 :] = 0
    d_bias, d_b = zeros(head.bias, want_bias), zeros(head.lora_b, want_b)
    d_a = zeros(head.lora_a, want_a)
    weight_sum = None
    factors: Tensor | None = None
    hidden_sum = None if shard is None or d_hidden is None else HiddenSum(shard, d_hidden, logits.rows)
    for rows, columns, tile in logits if begin is None else logits.one_ahead(begin):
        if rows.start == 0 and d_weight is not None and want_weight:
            if weight_sum is not None:
                weight_sum.close()
            weight_sum = _Sum(d_weight[columns], tiles.row_count, add=main_grad is not None)
        tile, kept = to_gradient(rows, columns, tile)
        later = columns.start > 0
        if factors is None and (factors := row_factors()) is not None:
            # Of a sum over rows the other operand takes them: in the tile small ones would underflow.
            clean = clean * factors.to(clean.dtype).unsqueeze(-1)
            adapted = None if adapted is None else adapted * factors.to(adapted.dtype).unsqueeze(-1)
        if kept is None:
            mine, into, into_adapted = clean[rows], at_rows(d_hidden, rows), at_rows(d_adapted, rows)
            my_adapted = at_rows(adapted, rows)
        else:
            # The chunk's other rows have no gradient: the products of these are put in their places.
            kept_rows = kept + rows.start
            mine, my_adapted = clean[kept_rows], at_rows(adapted, kept_rows)
            into, into_adapted = _like_rows(d_hidden, kept), _like_rows(d_adapted, kept)
        if into is not None:
            add_product(into, tile, logits.weight, add=later and kept is None)
        if kept is not None:
            _put_rows(d_hidden, rows, kept_rows, into, later)
        last = rows.stop == tiles.total_rows and columns.stop == head.vocabulary
        if hidden_sum is not None and head.lora_a is None and (last or begin is not None):
            hidden_sum.start(rows if begin is not None else slice(None), last)
        if weight_sum is not None:
            weight_sum.add(tile.t(), mine)
        if d_bias is not None and factors is None:
            d_bias[columns] += tile.sum(0, dtype=dtype)
        elif d_bias is not None and factors is not None:
            mine_of = factors[rows if kept is None else kept_rows].to(tile.dtype)
            add_product(d_bias[None, columns], mine_of.unsqueeze(0), tile, add=True)
        if d_b is not None and my_adapted is not None:
            add_product(d_b[columns], tile.t(), my_adapted, add=True, alpha=head.lora_scale)
        if into_adapted is not None and logits.lora_b is not None:
            add_product(into_adapted, tile, logits.lora_b, add=later and kept is None, alpha=head.lora_scale)
        if kept is not None:
            _put_rows(d_adapted, rows, kept_rows, into_adapted, later)
    if weight_sum is not None:
        weight_sum.close()
    if d_adapted is not None and head.lora_a is not None:
        d_adapted = d_adapted.to(head.dtype)
        if d_hidden is not None:
            add_product(d_hidden, d_adapted, head.lora_a.to(head.dtype), add=True)
        if d_a is not None:
            add_product(d_a, d_adapted.t(), clean, add=False)
            if shard is not None:
                shard.sum_up(d_a)  # every rank has all of A
    if hidden_sum is not None:
        if head.lora_a is not None:
            hidden_sum.start(slice(None), True)
        hidden_sum.finish()
    if d_hidden is not None and factors is not None:
        d_hidden.mul_(factors.unsqueeze(-1))
    return Gradients(d_hidden, d_weight if main_grad is None else None, d_bias, d_a, d_b)
