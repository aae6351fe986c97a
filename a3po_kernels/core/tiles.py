"""How much of the logits exists at a time: the rule that turns a memory budget into tiles of rows and columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

# A GEMM over fewer columns wastes the machine; only a budget smaller than one such row of tiles goes below.
MIN_COLUMNS = 1024
_ALIGN = 64  # columns; a multiple of every vector width, so that the rows of a tile stay aligned
_SMALLEST, _LARGEST = 64 << 20, 1 << 30


def card_chunk_bytes(total: int, one_pass: bool = False) -> int:
    """default_chunk_bytes of a card of so many bytes, most of which are free."""
    return max(total // 32, _SMALLEST) if one_pass else min(max(total // 128, _SMALLEST), _LARGEST)


def default_chunk_bytes(device: torch.device, one_pass: bool = False, agreed: bool = False) -> int:
    """64 MiB on a CPU. On a GPU 1/128 of its memory, at most 1 GiB: more saved nothing where logits are formed again.

    In one pass 1/32 of its memory, halved while that is more than half of what is free: one chunk of all rows writes
    the weight's gradient once, in its own dtype, and several need a sum in fp32, which costs as much memory as the
    logits of 8,000 tokens and a tenth of the time (an H200, 8320 x 151936 x 4096). A 141 GB card takes 4.7 GB, an
    80 GB card 2.6 GB: one chunk of 8320 tokens of a 152k vocabulary. The size of the card decides, so that the same
    call gives the same bits on every rank, unless memory is nearly used up, or `agreed` says that all ranks of a group
    must cut alike.
    """
    if device.type != "cuda":
        return _SMALLEST
    total = torch.cuda.get_device_properties(device).total_memory
    budget = card_chunk_bytes(total, one_pass)
    if not one_pass or agreed or torch.cuda.is_current_stream_capturing():
        return budget
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + held
    while budget > max(free // 2, _SMALLEST):
        budget //= 2
    return max(budget, _SMALLEST)


class Tiles(NamedTuple):
    """A grid over the logits [total_rows, total_columns]; the last of each kind may be smaller."""

    total_rows: int
    total_columns: int
    rows: int
    columns: int
    cuts: tuple[slice, ...] | None = None  # of the rows, where they may not be cut anywhere

    @property
    def row_count(self) -> int:
        if self.cuts is not None:
            return len(self.cuts)
        return -(-self.total_rows // self.rows)

    @property
    def column_count(self) -> int:
        return max(-(-self.total_columns // self.columns), 1)

    def row_slices(self) -> Iterator[slice]:
        return _slices(self.total_rows, self.rows) if self.cuts is None else iter(self.cuts)

    def column_slices(self) -> Iterator[slice]:
        # A rank's empty part of a vocabulary is one tile of no columns: the others wait for what it has to say.
        return _slices(self.total_columns, self.columns) if self.total_columns else iter((slice(0, 0),))


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _evenly(total: int, at_most: int, multiple: int = 1) -> int:
    """The step that covers `total` in as few steps of `at_most` as it takes, all nearly the same."""
    at_most = max(at_most // multiple * multiple, multiple)
    count = -(-total // at_most)
    step = -(-total // max(count, 1))
    return max(min(-(-step // multiple) * multiple, total), 1)


def column_tiles(rows: int, columns: int, itemsize: int, max_bytes: int) -> Tiles:
    """All rows by as many columns as the budget holds, so that a slice of the weight's gradient is written once.

    Where that leaves fewer than MIN_COLUMNS columns, the rows are cut as well.
    """
    elements = max(max_bytes // itemsize, 1)
    wide = min(max(elements // max(rows, 1), MIN_COLUMNS), columns, max(elements, 1))
    wide = _evenly(columns, wide, _ALIGN)
    return Tiles(rows, columns, _evenly(rows, max(elements // wide, 1)), wide)


def row_tiles(rows: int, columns: int, itemsize: int, max_bytes: int, common: int | None = None) -> Tiles:
    """Whole rows, as many as the budget holds and one at least: what needs a row's statistics at once.

    common: the columns to cut by, where ranks that have different numbers of them must cut alike.
    """
    return Tiles(rows, columns, _evenly(rows, max(max_bytes // (itemsize * (common or columns)), 1)), max(columns, 1))
