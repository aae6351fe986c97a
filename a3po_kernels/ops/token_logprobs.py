"""Per-token log-probability and entropy of logits: one read forward, one read and one write backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import check_backend, choose
from ..core.autograd import final, refuse_tangents
from ..core.checks import as_rows, check_rows, check_temperature, compute_dtype, is_dtensor
from ..core.operators import plainly, plainly_differentiable, reads_values, runs_plainly, traced
from ..core.transform import Transform
from ..parallel.agreement import check_agreement
from ..parallel.dtensor import read_logits_dtensor, wait_for
from ..parallel.vocabulary import Shard, Split, read_split


class TokenStats(NamedTuple):
    """logprobs, the log-probability of each target, and entropy, that of each distribution: nats, per row.

    fp32, or fp64 for fp64 logits; 0 where the row's target is ignored.
    """

    logprobs: Tensor
    entropy: Tensor


def fold_statistics(
    logits: Tensor, targets: Tensor, transform: Transform, results: tuple[Tensor, ...], backend: str,
    *, first_column: int = 0, vocabulary: int | None = None, first: bool = True, last: bool = True,
    state: Tensor | None = None,
) -> None:  # fmt: skip
    """Folds logits [batch, rows, columns], columns from first_column on of a `vocabulary`, into the rows' statistics.

    The last of a vocabulary's tiles writes `results`, (logp, entropy, shift, log2_sum) [N]; tiles before it keep in
    state [4, N] what merges: shift, sum, dot and the target's capped logit. shift and log2_sum are the softmax
    statistics that the same backend's gradient reads.
    """
    if targets.numel() and not logits.shape[-1]:
        assert state is not None and not last
        lowest = choose(backend, logits.device).empty_shift(state.dtype)
        for values, value in zip(state, (lowest, 0.0, 0.0, torch.nan), strict=True):
            values.fill_(value)
    elif targets.numel():
        choose(backend, logits.device).fold_statistics(
            logits, targets, transform, results, first_column=first_column, vocabulary=vocabulary, first=first,
            last=last, state=state,
        )  # fmt: skip


def finish_statistics(
    states: Tensor, targets: Tensor, transform: Transform, results: tuple[Tensor, ...], backend: str
) -> None:
    """Merges the states [parts, 4, N] of the parts of a vocabulary, in their order, and writes `results`."""
    if targets.numel():
        choose(backend, targets.device).finish_statistics(states, targets, transform, results)


def empty_state(results: tuple[Tensor, ...]) -> Tensor:
    """Room for the state [4, N] of the rows of `results`."""
    return results[0].new_empty((4, results[0].numel()))


def empty_results(logits: Tensor, rows: int) -> tuple[Tensor, ...]:
    """Room for (logp, entropy, shift, log2_sum) of some rows."""
    dtype = compute_dtype(logits.dtype)
    return tuple(torch.empty(rows, dtype=dtype, device=logits.device) for _ in range(4))


def _columns_of(logits: Tensor, columns: int) -> Tensor:
    return logits if columns == logits.shape[-1] else logits[..., :columns]


def _clear_padding(gradient: Tensor, columns: int) -> None:
    if columns < gradient.shape[-1]:
        gradient[..., columns:] = 0.0


@torch.library.custom_op("a3po::token_statistics", mutates_args=())
def _token_statistics(
    logits: Tensor, targets: Tensor, temperature: Tensor | None, temperature_value: float, logit_scale: float,
    softcap: float, ignore_index: int, columns: int, inplace_backward: bool, backend: str, group: str,
    shard_numbers: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(logp, entropy, shift, log2_sum) [N] of the first columns of logits [batch, rows, V], a vocabulary or a shard."""
    logits = _columns_of(logits, columns)
    results = empty_results(logits, targets.numel())
    transform = Transform(temperature, temperature_value, logit_scale, softcap, ignore_index)
    shard = Shard.of(group, "", shard_numbers)
    if shard is None or not targets.numel():
        fold_statistics(logits, targets, transform, results, backend)
        return results  # type: ignore[return-value]
    state = empty_state(results)
    fold_statistics(
        logits, targets, transform, results, backend, first_column=shard.first, last=False, state=state
    )
    finish_statistics(shard.gather(state).wait(), targets, transform, results, backend)
    return results  # type: ignore[return-value]


@_token_statistics.register_fake
def _(logits, targets, *_):
    return empty_results(logits, targets.shape[0])


def write_gradient(
    out: Tensor, logits: Tensor, targets: Tensor, shift: Tensor, log_sum: Tensor, entropy: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, transform: Transform, backend: str, first_column: int = 0,
) -> None:  # fmt: skip
    """Writes dL/dz of logits [batch, rows, columns] into `out`, possibly the logits themselves.

    grad_logp, grad_entropy: the incoming gradients [N]; either may be absent. A row where both are 0 becomes 0.
    """
    if targets.numel() and logits.shape[-1]:
        choose(backend, logits.device).write_gradient(
            out, logits, targets, shift, log_sum, entropy, grad_logp, grad_entropy, transform, first_column
        )


@torch.library.custom_op("a3po::logits_gradient", mutates_args=())
def _logits_gradient(
    logits: Tensor, targets: Tensor, shift: Tensor, log_sum: Tensor, entropy: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, temperature: Tensor | None, temperature_value: float,
    logit_scale: float, softcap: float, ignore_index: int, columns: int, backend: str, first_column: int,
) -> Tensor:  # fmt: skip
    """dL/dz as a new contiguous tensor, 0 behind the columns that take part."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    transform = Transform(temperature, temperature_value, logit_scale, softcap, ignore_index)
    write_gradient(
        _columns_of(out, columns), _columns_of(logits, columns), targets, shift, log_sum, entropy, grad_logp,
        grad_entropy, transform, backend, first_column,
    )  # fmt: skip
    _clear_padding(out, columns)
    return out


@_logits_gradient.register_fake
def _(logits, *_):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("a3po::logits_gradient_", mutates_args=("logits",))
def _logits_gradient_(
    logits: Tensor, targets: Tensor, shift: Tensor, log_sum: Tensor, entropy: Tensor,
    grad_logp: Tensor | None, grad_entropy: Tensor | None, temperature: Tensor | None, temperature_value: float,
    logit_scale: float, softcap: float, ignore_index: int, columns: int, backend: str, first_column: int,
) -> None:  # fmt: skip
    """The same, written over the logits."""
    transform = Transform(temperature, temperature_value, logit_scale, softcap, ignore_index)
    here = _columns_of(logits, columns)
    write_gradient(
        here, here, targets, shift, log_sum, entropy, grad_logp, grad_entropy, transform, backend, first_column
    )
    _clear_padding(logits, columns)


_gradient_plainly = plainly(_logits_gradient)
# Never plainly: the operator tells autograd that the logits are gone.
_gradient_in_place = traced(_logits_gradient_)


def _setup_context(ctx, inputs, output):
    logits, targets, temperature, temperature_value, logit_scale, softcap, ignore_index, columns = inputs[:8]
    inplace, backend, group, numbers = inputs[8:]
    _, entropy, shift, log_sum = output
    ctx.save_for_backward(logits, targets, temperature, shift, log_sum, entropy)
    ctx.mark_non_differentiable(shift, log_sum)
    ctx.set_materialize_grads(False)
    shard = Shard.of(group, "", numbers)
    first_column = 0 if shard is None else shard.first
    ctx.rest = (temperature_value, logit_scale, softcap, ignore_index, columns, backend, first_column)
    ctx.inplace = inplace


def _backward(ctx, grad_logp, grad_entropy, *_):
    logits, targets, temperature, shift, log_sum, entropy = ctx.saved_tensors
    nothing = (None,) * 11
    if not ctx.needs_input_grad[0] or (grad_logp is None and grad_entropy is None):
        return None, *nothing
    arguments = (targets, shift, log_sum, entropy, grad_logp, grad_entropy, temperature, *ctx.rest)
    if not ctx.inplace:
        return final(_gradient_plainly(logits, *arguments), logits), *nothing
    _gradient_in_place(logits, *arguments)
    return final(logits, logits), *nothing


_statistics_plainly = plainly_differentiable(_token_statistics, _setup_context, _backward)


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    tp_group: Any = None,
    vocab_start: int | tuple[int, int] | None = None,
    vocab_size: int | None = None,
    validate: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability of each target and entropy of each distribution, both differentiable in the logits.

    With y = logit_scale * logits, u = softcap * tanh(y / softcap) (u = y without one) and x = u / temperature:
    logp = x[target] - log sum exp x and H = -sum p log p, in nats. Statistics are fp32, or fp64 for fp64 logits.

    Args:
        logits: [..., V], fp16, bf16, fp32 or fp64, any strides; row i predicts targets[i] (nothing is shifted). Or a
            DTensor, whose gradient is one placed as it is: Shard(-1) over one dimension of its mesh gives tp_group,
            vocab_start and vocab_size; over others it is Replicate or a Shard of its rows, and targets are this rank's.
        targets: [...], int32 or int64. A row whose target is `ignore_index` is not computed: logp = H = 0, gradient 0.
        temperature: a number, a 0-d tensor, or one per token [...].
        softcap: bound of a tanh softcap, or None.
        logit_scale: multiplies the logits before the softcap.
        inplace_backward: lets backward write the gradient over the logits. It saves a tensor of the logits' size; the
            logits are spoilt afterwards (autograd notices if something else still needed them; of a DTensor it would
            not, so that is refused).
        tp_group: a torch.distributed group whose ranks share the vocabulary: the logits are this rank's columns of it,
            and targets are global numbers. Every rank gets the same statistics, by one all-gather of four numbers a
            row, and the gradient of its own columns.
        vocab_start: the global number of the first column, or (first, stop) where the columns from stop on are padding;
            by default the ranks hold equal parts in rank order. Given without vocab_size, the ranks exchange their
            sizes, for which a GPU waits.
        vocab_size: the true vocabulary (with tp_group the whole one's) where logits have more columns (padding); those
            take no part in the softmax.
        validate: on a GPU also check values, not only shapes; this synchronises with the host. The CPU always checks.
            Over the ranks of tp_group one small collective finds out whether they make the same call, before they wait
            for each other: on every rank or on none.
        backend: "triton", "torch" or "auto" (Triton on a GPU it supports, else torch).

    Returns:
        TokenStats(logprobs, entropy), each [...]. A logit of -inf has p = 0 and gradient 0. A row with NaN, with +inf
        or with nothing but -inf gives NaN; on a GPU so does a target outside the vocabulary.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range.
        IndexError: a target outside the vocabulary, on the CPU or with `validate`.
        RuntimeError: on a double backward, which is not implemented.
    """
    if validate and tp_group is not None:
        check_agreement(tp_group, locals())
    logits, columns, shard, total = read_logits_shard(
        logits, targets, temperature, softcap, logit_scale, Split(tp_group, vocab_start), vocab_size, backend,
        inplace_backward,
    )  # fmt: skip
    if inplace_backward and logits.requires_grad:
        check_no_overlap(logits)
    transform = Transform.of(temperature, softcap, logit_scale, ignore_index)
    check_targets(targets, total, ignore_index, validate)
    check_temperature(temperature, targets != ignore_index, validate)
    flat = targets.reshape(-1).contiguous()
    stats = token_statistics(as_rows(logits), flat, transform, columns, inplace_backward, backend, shard)
    return TokenStats(stats.logprobs.view(targets.shape), stats.entropy.view(targets.shape))


def read_logits_shard(
    logits: Tensor, targets: Tensor, temperature: object, softcap: object, logit_scale: object, split: Split,
    vocab_size: int | None, backend: str, inplace_backward: bool = False,
) -> tuple[Tensor, int, Shard | None, int]:  # fmt: skip
    """Checks logits and their transform: gives them, how many columns take part, the shard, the whole vocabulary."""
    if is_dtensor(logits):
        if inplace_backward and logits.requires_grad:
            raise ValueError("inplace_backward takes no DTensor: autograd does not notice that its logits are spoilt")
        logits, vocab_size, split = read_logits_dtensor(logits, vocab_size, split)
    logits = wait_for(logits)
    check_rows(logits, targets, temperature, softcap, logit_scale, empty=split.tp_group is not None)
    refuse_tangents(logits=logits)
    check_backend(backend, logits.device)
    shard, columns = read_split(split, logits.shape[-1], vocab_size, logits.device, runs_plainly(logits), "the columns")
    return logits, columns, shard, columns if shard is None else shard.total


def token_statistics(
    rows: Tensor, targets: Tensor, transform: Transform, columns: int, inplace_backward: bool, backend: str,
    shard: Shard | None,
) -> TokenStats:  # fmt: skip
    """token_logprobs after its checks, of logits [batch, rows, V] and flat targets [N]; flat [N]."""
    group, _, numbers = Shard.flat(shard)
    logp, entropy, _, _ = _statistics_plainly(
        rows, targets, *transform, columns, inplace_backward, backend, group, numbers
    )
    return TokenStats(logp, entropy)


def check_targets(targets: Tensor, vocabulary: int, ignore_index: int, validate: bool) -> None:
    """Raises IndexError for a target outside the vocabulary, where reading values is allowed."""
    if not reads_values(targets, validate):
        return
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if bool(bad.any()):
        value = int(targets[bad][0])
        raise IndexError(f"targets must lie in [0, {vocabulary}) or be ignore_index ({ignore_index}); got {value}")


def check_no_overlap(logits: Tensor) -> None:
    """Raises ValueError where an in-place gradient would write one address for two rows."""
    reach = 0
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                break
            reach += stride * (size - 1)
    else:
        return
    if logits.numel():
        raise ValueError(f"inplace_backward needs logits that own every element; got strides {logits.stride()}")
