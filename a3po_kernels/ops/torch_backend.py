"""The vocabulary-sized operations in chunked PyTorch: any device, no second N x V in fp32.

Base 2 throughout, as in the Triton kernels. On the CPU a token's bits must not depend on which rows share the batch,
so every transcendental runs on a buffer whose length keeps ATen's vectorised loop away from its scalar tail (the two
round differently), and no row is ever reduced alone (ATen would split that one row over its threads).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from ._dispatch import compute_dtype
from ._transform import LN2, Transform

LOWEST = -1e38  # of a running maximum: finite, since (-inf) - (-inf) is NaN
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


class _Scratch:
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


class _Rows:
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


def _per_row(values: torch.Tensor | None, rows, dtype: torch.dtype) -> torch.Tensor | None:
    """The entries of `rows` of a per-row or 0-d tensor, as a column."""
    if values is None:
        return None
    return values.to(dtype) if values.ndim == 0 else values[rows].to(dtype).unsqueeze(-1)


def _capped(z: torch.Tensor, scratch: _Scratch, transform: Transform) -> torch.Tensor:
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


def _row_scale(rows, transform: Transform, dtype: torch.dtype) -> torch.Tensor | float:
    """exponent_scale of some rows; a temperature tensor divides what is known of it."""
    column = _per_row(transform.temperature, rows, dtype)
    return transform.exponent_scale if column is None else transform.exponent_scale / column


def _floor(dtype: torch.dtype) -> float:
    """The exponent under which 2^t is zero; a clamp to it keeps 2^t * t from being 0 * -inf."""
    return -1100.0 if dtype == torch.float64 else -200.0


def _tile_statistics(logits, targets, active, transform: Transform, dtype: torch.dtype) -> torch.Tensor:
    """State [4, N] of a tile: shift m = max u, sum of 2^t and of 2^t t with t = k (u - m), the target's u (or NaN)."""
    count = targets.numel()
    known = active & (targets >= 0) & (targets < logits.shape[-1])
    safe_targets = torch.where(known, targets, 0).long()
    state = torch.zeros((4, count), dtype=dtype, device=logits.device)
    shift, total, dot, target_u = state.unbind()
    work = _Rows(logits, active)
    u_scratch, t_scratch, e_scratch = (_Scratch(work.step + 1, work.columns, logits, dtype) for _ in range(3))
    for rows in work.chunks():
        u = _capped(work.read(rows), u_scratch, transform)
        n = u.shape[0]
        at_least_two = max(n, 2)
        k = _row_scale(rows, transform, dtype)
        # A finite shift: a tile of nothing but -inf then sums to 0 instead of NaN.
        m = u.amax(-1, keepdim=True).clamp_min_(LOWEST)
        t, e = t_scratch.rows(n), e_scratch.rows(n)
        torch.sub(u, m, out=t).mul_(k).clamp_min_(_floor(dtype))
        e.copy_(t)
        e_scratch.apply_(torch.exp2_, n)
        shift[rows] = m.squeeze(-1)
        total[rows] = e_scratch.rows(at_least_two).sum(-1)[:n]
        target_u[rows] = u.gather(-1, safe_targets[rows].unsqueeze(-1)).squeeze(-1)
        t.mul_(e)
        dot[rows] = t_scratch.rows(at_least_two).sum(-1)[:n]
    target_u.masked_fill_(~known, torch.nan)
    return state


def merge_statistics(a: torch.Tensor, b: torch.Tensor, k: torch.Tensor | float) -> torch.Tensor:
    """The state [4, N] of two disjoint parts of a vocabulary; associative up to rounding. k: base-2 exponents per u."""
    shift = torch.maximum(a[0], b[0])

    def moved(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        move = ((state[0] - shift) * k).clamp_min(_floor(shift.dtype))
        scale = uniformly(torch.exp2, move)
        return scale * state[1], scale * (state[2] + move * state[1])

    (sum_a, dot_a), (sum_b, dot_b) = moved(a), moved(b)
    return torch.stack([shift, sum_a + sum_b, dot_a + dot_b, torch.where(a[3].isnan(), b[3], a[3])])


def fold_statistics(
    logits, targets, transform: Transform, results, first_column: int, first: bool, last: bool, state
) -> None:
    """Folds a tile of a vocabulary into the statistics of its rows; see ops.token_logprobs."""
    dtype = results[0].dtype
    active = targets != transform.ignore_index
    k = _row_scale(slice(None), transform, dtype)
    k = k if isinstance(k, float) or k.ndim == 0 else k.squeeze(-1)
    merged = _tile_statistics(logits, targets - first_column, active, transform, dtype)
    if not first:
        merged = merge_statistics(state, merged, k)
    if not last:
        state.copy_(merged)
        return
    shift, total, dot, target = merged
    # Nothing but -inf in the row: no distribution. A row left out has no statistics.
    total = torch.where(active, torch.where(total == 0, torch.nan, total), 1.0)
    log_sum = uniformly(torch.log2, total)
    # Not clamped as t is: a target at -inf has logp -inf. NaN: a target outside the vocabulary.
    logp = ((target - shift) * k - log_sum) * LN2
    entropy = (log_sum - dot / total) * LN2
    for result, values in zip(results, (logp, entropy, shift, log_sum), strict=True):
        result.copy_(torch.where(active, values, 0.0))


def logits_gradient(
    out, logits, targets, shift, log_sum, entropy, grad_logp, grad_entropy, transform: Transform, first_column: int = 0
):
    """Writes dL/dz into `out` ([batch, rows, V], possibly the logits themselves); rows without gradient become 0."""
    dtype = compute_dtype(logits.dtype)
    zeros = torch.zeros_like(shift)
    grad_logp = zeros if grad_logp is None else grad_logp.to(dtype)
    with_entropy = grad_entropy is not None
    grad_entropy = grad_entropy.to(dtype) if with_entropy else zeros
    active = (targets != transform.ignore_index) & ((grad_logp != 0) | (grad_entropy != 0))
    work = _Rows(logits, active)
    if work.index is not None:
        work.write(out, (~active).nonzero()[:, 0], 0.0)
    u_scratch, t_scratch, e_scratch = (_Scratch(work.step + 1, work.columns, logits, dtype) for _ in range(3))
    inverse_total = uniformly(torch.exp2, -log_sum)
    for rows in work.chunks():
        u = _capped(work.read(rows), u_scratch, transform)
        n = u.shape[0]
        k = _row_scale(rows, transform, dtype)
        slope = (k * LN2) * (transform.logit_scale if transform.softcap else 1.0)
        g_lp = grad_logp[rows].unsqueeze(-1)
        weight = -inverse_total[rows].unsqueeze(-1) * slope
        e = e_scratch.rows(n)
        if with_entropy:
            g_h = grad_entropy[rows].unsqueeze(-1)
            t = t_scratch.rows(n)
            torch.sub(u, shift[rows].unsqueeze(-1), out=t).mul_(k).clamp_min_(_floor(dtype))
            e.copy_(t)
            e_scratch.apply_(torch.exp2_, n)
            constant = g_lp + g_h * (entropy[rows] - LN2 * log_sum[rows]).unsqueeze(-1)
            grad = t.mul_(g_h * LN2 * weight).add_(constant * weight).mul_(e)
        else:
            torch.sub(u, shift[rows].unsqueeze(-1), out=e).mul_(k)
            e_scratch.apply_(torch.exp2_, n)
            grad = e.mul_(g_lp * weight)
        target = targets[rows].unsqueeze(-1).long() - first_column
        known = (target >= 0) & (target < work.columns)
        one_hot = torch.where(known, g_lp * slope, 0.0).to(dtype)
        grad.scatter_add_(-1, target.clamp(0, work.columns - 1), one_hot)
        if transform.softcap:
            grad.mul_(torch.where(torch.isfinite(u), 1.0 - (u / transform.softcap).square_(), 1.0))
        if work.index is None and logits.device.type != "cpu":
            # Every row was computed: one without a gradient may have held NaN.
            grad.masked_fill_(~active[rows].unsqueeze(-1), 0.0)
        work.write(out, rows, grad)


def min_p_token_logprobs(logits, targets, min_p, transform: Transform):
    """[N] log-probs of the targets among the tokens with p >= min_p * max p; see ops.min_p."""
    dtype = compute_dtype(logits.dtype)
    active = targets != transform.ignore_index
    known = active & (targets >= 0) & (targets < logits.shape[-1])
    safe_targets = torch.where(known, targets, 0).long()
    target_t, total = (torch.zeros(targets.numel(), dtype=dtype, device=logits.device) for _ in range(2))
    work = _Rows(logits, active)
    u_scratch, e_scratch = (_Scratch(work.step + 1, work.columns, logits, dtype) for _ in range(2))
    floor = math.log2(min_p)
    k = transform.exponent_scale
    for rows in work.chunks():
        u = _capped(work.read(rows), u_scratch, transform)
        n = u.shape[0]
        m = u.amax(-1, keepdim=True)
        e = e_scratch.rows(n)
        torch.sub(u, m, out=e).mul_(k)
        # "below" rather than "not at least": a NaN is kept, and makes the row NaN.
        e.masked_fill_(e < floor, -torch.inf)
        e_scratch.apply_(torch.exp2_, n)
        total[rows] = e_scratch.rows(max(n, 2)).sum(-1)[:n]
        target = safe_targets[rows].unsqueeze(-1)
        target_t[rows] = (u.gather(-1, target) - m).mul_(k).squeeze(-1)
    log_sum = uniformly(torch.log2, torch.where(active, total, 1.0))
    logp = (target_t - log_sum) * LN2
    logp = torch.where((target_t < floor) & ~log_sum.isnan(), -torch.inf, logp)
    return torch.where(known, logp, torch.where(active, torch.nan, 0.0).to(dtype))
