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

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
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


def _capped(z: torch.Tensor, scratch: _Scratch, logit_scale: float, softcap: float) -> torch.Tensor:
    """Capped logits u in the compute dtype: the input itself where nothing changes, else the scratch."""
    u = scratch.rows(z.shape[0])
    if not softcap:
        return z if z.dtype == u.dtype else u.copy_(z)
    u.copy_(z).mul_(logit_scale)
    broken = ~torch.isfinite(u)
    y = u.masked_fill(~broken, 0.0)
    u.div_(softcap)
    scratch.apply_(torch.tanh_, z.shape[0])
    # What is not finite passes unchanged: -inf masks a token, +inf and NaN break the row.
    return u.mul_(softcap).masked_fill_(broken, 0.0).add_(y)


def exponent_scale(temperature: float, logit_scale: float, softcap: float) -> float:
    """k with y = k * u the base-2 exponents: the logit scale is in it where no softcap stands between."""
    return (LOG2E if softcap else LOG2E * logit_scale) / temperature


def _row_scale(rows, temperature, temperature_value, logit_scale, softcap, dtype):
    """exponent_scale of some rows; a temperature tensor divides what is known of it."""
    scale = exponent_scale(temperature_value, logit_scale, softcap)
    column = _per_row(temperature, rows, dtype)
    return scale if column is None else scale / column


def _floor(dtype: torch.dtype) -> float:
    """The exponent under which 2^t is zero: -inf clamped to it keeps 2^t * t = 0 instead of NaN."""
    return -1100.0 if dtype == torch.float64 else -200.0


def token_statistics(logits, targets, temperature, temperature_value, logit_scale, softcap, ignore_index):
    """(logp, entropy, shift, log2_sum), each [N], of logits [batch, rows, V]; see ops.token_logprobs."""
    dtype = compute_dtype(logits.dtype)
    count = targets.numel()
    active = targets != ignore_index
    known = active & (targets >= 0) & (targets < logits.shape[-1])
    safe_targets = torch.where(known, targets, 0).long()
    outputs = [torch.zeros(count, dtype=dtype, device=logits.device) for _ in range(5)]
    target_t, total, dot, shift, log_sum = outputs
    work = _Rows(logits, active)
    u_scratch, t_scratch, e_scratch = (_Scratch(work.step + 1, work.columns, logits, dtype) for _ in range(3))
    for rows in work.chunks():
        u = _capped(work.read(rows), u_scratch, logit_scale, softcap)
        n = u.shape[0]
        at_least_two = max(n, 2)
        k = _row_scale(rows, temperature, temperature_value, logit_scale, softcap, dtype)
        m = u.amax(-1, keepdim=True)
        t, e = t_scratch.rows(n), e_scratch.rows(n)
        torch.sub(u, m, out=t).mul_(k).clamp_min_(_floor(dtype))
        e.copy_(t)
        e_scratch.apply_(torch.exp2_, n)
        shift[rows] = m.squeeze(-1)
        total[rows] = e_scratch.rows(at_least_two).sum(-1)[:n]
        target = safe_targets[rows].unsqueeze(-1)
        # Not from t, which is clamped: a target at -inf has logp -inf.
        target_t[rows] = (u.gather(-1, target) - m).mul_(k).squeeze(-1)
        t.mul_(e)
        dot[rows] = t_scratch.rows(at_least_two).sum(-1)[:n]
    # A row left out has total 0; a computed one has total >= 1 or NaN.
    total = torch.where(active, total, 1.0)
    log_sum = uniformly(torch.log2, total)
    logp = torch.where(known, (target_t - log_sum) * LN2, torch.where(active, torch.nan, 0.0).to(dtype))
    entropy = torch.where(active, (log_sum - dot / total) * LN2, 0.0)
    return logp, entropy, torch.where(active, shift, 0.0), torch.where(active, log_sum, 0.0)


def logits_gradient(
    out, logits, targets, shift, log_sum, entropy, grad_logp, grad_entropy,
    temperature, temperature_value, logit_scale, softcap, ignore_index,
):  # fmt: skip
    """Writes dL/dz into `out` ([batch, rows, V], possibly the logits themselves); rows without gradient become 0."""
    dtype = compute_dtype(logits.dtype)
    zeros = torch.zeros_like(shift)
    grad_logp = zeros if grad_logp is None else grad_logp.to(dtype)
    with_entropy = grad_entropy is not None
    grad_entropy = grad_entropy.to(dtype) if with_entropy else zeros
    active = (targets != ignore_index) & ((grad_logp != 0) | (grad_entropy != 0))
    work = _Rows(logits, active)
    if work.index is not None:
        work.write(out, (~active).nonzero()[:, 0], 0.0)
    u_scratch, t_scratch, e_scratch = (_Scratch(work.step + 1, work.columns, logits, dtype) for _ in range(3))
    inverse_total = uniformly(torch.exp2, -log_sum)
    for rows in work.chunks():
        u = _capped(work.read(rows), u_scratch, logit_scale, softcap)
        n = u.shape[0]
        k = _row_scale(rows, temperature, temperature_value, logit_scale, softcap, dtype)
        slope = (k * LN2) * (logit_scale if softcap else 1.0)
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
        target = targets[rows].unsqueeze(-1).long()
        known = (target >= 0) & (target < work.columns)
        one_hot = torch.where(known, g_lp * slope, 0.0).to(dtype)
        grad.scatter_add_(-1, target.clamp(0, work.columns - 1), one_hot)
        if softcap:
            grad.mul_(torch.where(torch.isfinite(u), 1.0 - (u / softcap).square_(), 1.0))
        if work.index is None and logits.device.type != "cpu":
            # Every row was computed: one without a gradient may have held NaN.
            grad.masked_fill_(~active[rows].unsqueeze(-1), 0.0)
        work.write(out, rows, grad)


def min_p_token_logprobs(logits, targets, min_p, logit_scale, softcap, ignore_index):
    """[N] log-probs of the targets among the tokens with p >= min_p * max p; see ops.min_p."""
    dtype = compute_dtype(logits.dtype)
    active = targets != ignore_index
    known = active & (targets >= 0) & (targets < logits.shape[-1])
    safe_targets = torch.where(known, targets, 0).long()
    target_t, total = (torch.zeros(targets.numel(), dtype=dtype, device=logits.device) for _ in range(2))
    work = _Rows(logits, active)
    u_scratch, e_scratch = (_Scratch(work.step + 1, work.columns, logits, dtype) for _ in range(2))
    floor = math.log2(min_p)
    k = exponent_scale(1.0, logit_scale, softcap)
    for rows in work.chunks():
        u = _capped(work.read(rows), u_scratch, logit_scale, softcap)
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
