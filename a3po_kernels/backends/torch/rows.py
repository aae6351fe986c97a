"""Chunks of rows in PyTorch, and the logit transform.

Base 2 throughout, as in the Triton kernels. On the CPU a token's bits must not depend on which rows share the batch,
so every transcendental runs on a buffer whose length keeps ATen's vectorised loop away from its scalar tail (the two
round differently), and no row is ever reduced alone (ATen would split that one row over its threads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...core.transform import Transform

# Elements of one chunk: about 2 MB in fp32 stays in a CPU's caches; a GPU wants fewer, larger launches.
CPU_CHUNK = 1 << 19
GPU_CHUNK = 1 << 24
_GRAIN = 32768  # ATen splits an elementwise operation over threads in ranges of at least this many elements.
_VECTORS = 64  # A multiple of every unrolled SIMD width.


def _uniform_length(length: int) -> int:
    """The next length that ATen splits over its threads into whole vectors."""
    while True:
        threads = min(torch.get_num_threads(), -(-length // _GRAIN))
        unit = _VECTORS * max(threads, 1)
        padded = -(-length // unit) * unit
        if min(torch.get_num_threads(), -(-padded // _GRAIN)) <= max(threads, 1):
            return padded
        length = padded


def uniformly(function: Callable[..., torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """`function` of a small tensor, each element to the bit as it would be in any other company."""
    if values.device.type != "cpu":
        return function(values)
    padded = values.new_ones(_uniform_length(max(values.numel(), 1)))
    padded[: values.numel()] = values.reshape(-1)
    return function(padded)[: values.numel()].reshape(values.shape)


class Scratch:
    """A reusable [rows, V] buffer with room behind it, so that in-place functions can run on whole vectors."""

    def __init__(self, rows: int, columns: int, like: torch.Tensor, dtype: torch.dtype):
        self.columns = columns
        self.cpu = like.device.type == "cpu"
        room = rows * columns + (_VECTORS * torch.get_num_threads() * 2 if self.cpu else 0)
        self.flat = torch.zeros(room, dtype=dtype, device=like.device)

    def rows(self, count: int) -> torch.Tensor:
        return self.flat[: count * self.columns].view(count, self.columns)

    def apply_(self, function: Callable[[torch.Tensor], torch.Tensor], count: int) -> None:
        length = count * self.columns
        function(self.flat[: _uniform_length(length) if self.cpu else length])


class Rows:
    """Chunks of the rows to compute: on the CPU the wanted rows alone, elsewhere every row (no host sync)."""

    def __init__(self, logits: torch.Tensor, wanted: torch.Tensor):
        batch, length, columns = logits.shape
        self.logits, self.columns, self.length = logits, columns, length
        cpu = logits.device.type == "cpu"
        self.index = wanted.nonzero()[:, 0] if cpu and not bool(wanted.all()) else None
        self.count = batch * length if self.index is None else self.index.numel()
        self.step = min(max((CPU_CHUNK if cpu else GPU_CHUNK) // max(columns, 1), 2), max(self.count, 1))
        self.flat = _flat(logits)

    def chunks(self) -> Iterator[torch.Tensor | slice]:
        """A slice of rows, or the tensor of their numbers where they do not lie one after another."""
        for start in range(0, self.count, self.step):
            stop = min(start + self.step, self.count)
            if self.index is None:
                yield slice(start, stop)
                continue
            rows = self.index[start:stop]
            first, last = int(rows[0]), int(rows[-1])
            yield slice(first, last + 1) if last - first == stop - start - 1 else rows

    def read(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return self.logits[self._at(rows)] if self.flat is None else self.flat[rows]

    def write(self, out: torch.Tensor, rows: torch.Tensor | slice, values: torch.Tensor | float) -> None:
        """Stores rows in [batch, rows, V], whatever its strides."""
        flat = _flat(out)
        if flat is None:
            out[self._at(rows)] = values.to(out.dtype) if isinstance(values, torch.Tensor) else values
        elif isinstance(rows, slice) and isinstance(values, torch.Tensor):
            flat[rows].copy_(values)
        else:
            flat[rows] = values.to(out.dtype) if isinstance(values, torch.Tensor) else values

    def _at(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=self.logits.device)
        return rows // self.length, rows % self.length


def _flat(x: torch.Tensor) -> torch.Tensor | None:
    """[batch, rows, V] as a view [batch * rows, V], or None where the strides allow none."""
    batch, length, _ = x.shape
    viewable = batch == 1 or length == 1 or x.stride(0) == length * x.stride(1)
    return x.flatten(0, 1) if viewable and x.numel() else None


def per_row(values: torch.Tensor | None, rows, dtype: torch.dtype) -> torch.Tensor | None:
    """The entries of `rows` of a per-row or 0-d tensor, as a column."""
    if values is None:
        return None
    return values.to(dtype) if values.ndim == 0 else values[rows].to(dtype).unsqueeze(-1)


def capped(z: torch.Tensor, scratch: Scratch, transform: Transform) -> torch.Tensor:
    """Capped logits u in the compute dtype: the input itself where nothing changes, else the scratch."""
    u = scratch.rows(z.shape[0])
    if not transform.softcap:
        return z if z.dtype == u.dtype else u.copy_(z)
    u.copy_(z).mul_(transform.logit_scale)
    broken = ~torch.isfinite(u)
    y = u.masked_fill(~broken, 0.0)
    u.div_(transform.softcap)
    scratch.apply_(torch.tanh_, z.shape[0])
    # What is not finite passes unchanged: -inf masks a token, +inf and NaN break the row.
    return u.mul_(transform.softcap).masked_fill_(broken, 0.0).add_(y)


def row_scale(rows, transform: Transform, dtype: torch.dtype) -> torch.Tensor | float:
    """exponent_scale of some rows; a temperature tensor divides what is known of it."""
    column = per_row(transform.temperature, rows, dtype)
    return transform.exponent_scale if column is None else transform.exponent_scale / column


def exponent_floor(dtype: torch.dtype) -> float:
    """The exponent under which 2^t is zero; a clamp to it keeps 2^t * t from being 0 * -inf."""
    return -1100.0 if dtype == torch.float64 else -200.0
