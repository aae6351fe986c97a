"""TRL's loss-head kernels by ours: every trainer of TRL that scores tokens, without a trainer class of our own.

TRL 1.16 scores tokens in two places, which its trainers share. Both are here with the signatures that they are called
with, and install() puts them there:

    from a3po_kernels.integrations import trl_kernels

    with trl_kernels.install():
        trainer.train()  # RLOOTrainer, DPOTrainer, KTOTrainer, SFTTrainer, GRPOTrainer, ...

selective_log_softmax_and_entropy has the signature of TRL's Triton kernel, in the package and in the Hub's
trl-lib/trl-losses (version 0, what kernels.get_kernel loads): log-probs and entropy of logits. ChunkedLogProbFunction
has that of its fused head: the same of hidden states and a head's weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import trl
from torch import Tensor
from trl.trainer import utils

from ..core.checks import LOGIT_DTYPES, check_number, is_dtensor
from ..core.tiles import column_tiles
from ..ops.head_arguments import check_chunk_bytes, check_compaction
from ..ops.linear_head import LinearHead, Logits
from ..ops.linear_token_logprobs import linear_token_logprobs
from ..ops.token_logprobs import token_logprobs
from ._zero3 import gathered_again

__all__ = ["ChunkedLogProbFunction", "Installed", "install", "selective_log_softmax_and_entropy"]

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Of rows that are not computed; no label that TRL gives, so that a -100 is an error as it is there.
_NOWHERE = -(2**31)
_TOKENS = 4096  # rows of TRL's tiles, whose columns are its chunk_size
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of each index and entropy of each distribution of logits / temperature, both differentiable.

    Args:
        logits: [..., V], fp16, bf16, fp32 or fp64, any strides.
        index: [...], int32 or int64.
        temperature: a positive number.
        row_mask: [...], bool or integers; where it is 0 both results are 0, with no gradient.

    Returns:
        (log-probs, entropy), each [...], nats, fp32 (fp64 for fp64 logits). A logit of -inf has no part in either
        (TRL's entropy is NaN there).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range. IndexError: an index outside the
            vocabulary, on the CPU; on a GPU it gives NaN.
    """
    _count("selective_log_softmax_and_entropy")
    if row_mask is not None:
        if row_mask.shape != index.shape or row_mask.dtype not in _INTEGERS:
            raise ValueError(
                f"row_mask must be bool or integers of index's shape {list(index.shape)}; got {row_mask.dtype} "
                f"{list(row_mask.shape)}"
            )
        index = index.masked_fill(row_mask == 0, _NOWHERE)
    stats = token_logprobs(logits, index, temperature=temperature, ignore_index=_NOWHERE)
    return stats.logprobs, stats.entropy


class ChunkedLogProbFunction:
    """What TRL's fused head calls: apply, as if of an autograd function, which raises what it says itself."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
        final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
        outputs: Sequence[str] = OUTPUTS[1:],
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        """Statistics of the logits z = cap(logit_scale * (hidden @ weight.T + bias)) / temperature, never formed.

        The products are in autocast's dtype, else in hidden's, as TRL's are.

        Args:
            hidden: [N, H]. weight: [V, H]. bias: [V]. targets: [N], int32 or int64, in [0, V).
            temperature: a positive number. final_logit_softcapping: bound of a tanh cap, before the temperature.
            chunk_size: columns of TRL's tile of 4096 rows: its bytes are the budget of ours, unless install() got one.
            outputs: which of log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 are wanted; the three last
                take one more product of the head, forward.

        Returns:
            (log-probs, entropy, log sum p^2, mean of z over the vocabulary, whether the target is the first maximum),
            [N] each, fp32 (fp64 for an fp64 head), the last bool; None where it is not wanted, but for the first. The
            first two are differentiable in hidden, weight and bias.

        Raises:
            ValueError, TypeError, IndexError: as linear_token_logprobs does; an output of another name.
        """
        _count("ChunkedLogProbFunction")
        unknown = [name for name in outputs if name not in OUTPUTS]
        if unknown:
            raise ValueError(f"outputs must be among {', '.join(OUTPUTS)}; got {unknown[0]!r}")
        check_number("chunk_size", chunk_size, 1)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        given = _installed[0] if _installed else Installed(None, None)
        budget = given.max_chunk_bytes or chunk_size * _TOKENS * dtype.itemsize
        # TRL has left out what it masks; on a CPU it masks afterwards, and those rows have no gradient.
        compaction = given.compaction or ("exact" if kind == "cpu" else "none")
        with gathered_again(weight, bias):
            stats = linear_token_logprobs(
                hidden, weight, targets, bias=bias, temperature=temperature, softcap=final_logit_softcapping,
                logit_scale=logit_scale, ignore_index=_NOWHERE, head_dtype=dtype, max_chunk_bytes=budget,
                compaction=compaction,
            )  # fmt: skip
        more: dict[str, Tensor] = {}
        if set(outputs) & set(OUTPUTS[2:]):
            head = LinearHead(hidden, weight, bias, None, None, 1.0, weight.shape[0], dtype)
            more = _more(head, targets, temperature, final_logit_softcapping, logit_scale, budget, stats.logprobs.dtype)
        rest = (more[name] if name in outputs else None for name in OUTPUTS[2:])
        return stats.logprobs, stats.entropy if "entropy" in outputs else None, *rest  # type: ignore[return-value]


@torch.no_grad()
def _more(
    head: LinearHead, targets: Tensor, temperature: float, softcap: float | None, logit_scale: float, budget: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """TRL's metrics of each row [N], by another walk over the tiles."""
    count = targets.numel()
    total, best = (torch.full((count,), start, dtype=dtype, device=targets.device) for start in (0.0, -torch.inf))
    once, twice = best.clone(), best.clone()
    first = torch.zeros_like(targets, dtype=torch.int64)
    # The tile is in `dtype` here, with two more of its size beside it.
    tiles = column_tiles(count, head.vocabulary, 4 * dtype.itemsize, budget)
    with torch.autocast(targets.device.type, enabled=False):
        for rows, columns, tile in Logits(head, None, tiles) if count else ():
            z = tile.to(dtype) * logit_scale
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            z = z / temperature
            total[rows] += z.sum(-1)
            once[rows] = torch.logaddexp(once[rows], z.logsumexp(-1))
            twice[rows] = torch.logaddexp(twice[rows], (2.0 * z).logsumexp(-1))
            value, at = z.max(-1)  # the first of equals
            better = value > best[rows]
            best[rows] = torch.where(better, value, best[rows])
            first[rows] = torch.where(better, at + columns.start, first[rows])
    return {
        "log_sum_sq_probs": twice - 2.0 * once, "mean_logits": total / head.vocabulary, "is_top1": first == targets
    }  # fmt: skip


def _supports(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> bool:
    """Whether TRL's functions of logits call ours: on every device, one index a row."""
    ours = (
        logits.dtype in LOGIT_DTYPES and logits.ndim >= 1 and logits.shape[-1] > 0 and not is_dtensor(logits)
        and (index is None or (index.shape == logits.shape[:-1] and index.dtype in (torch.int32, torch.int64)))
        and (row_mask is None or (index is not None and row_mask.shape == index.shape))
        and (row_mask is None or row_mask.dtype in _INTEGERS)
    )  # fmt: skip
    if not ours:
        _count("left to TRL")
    return ours


# What TRL's functions look up in their module when they are called, whoever imported them and when.
_NAMES = {
    "_ChunkedLogProbFunction": ChunkedLogProbFunction,
    "_fused_logprob_entropy": selective_log_softmax_and_entropy,
    "_supports_trl_loss_kernel": _supports,
    "is_triton_available": lambda: True,  # asked there for the kernel's sake alone, which ours does not need
}


class Installed:
    """What install() did: undo(), or the end of a with block, gives TRL its own functions back.

    calls: how often each of ours was called, by name, and how often TRL kept a call for itself ("left to TRL").
    max_chunk_bytes, compaction: what install() got, which raises for a value that the head does not take.
    """

    def __init__(self, max_chunk_bytes: int | None, compaction: str | int | None):
        self.max_chunk_bytes, self.compaction = max_chunk_bytes, compaction
        self.calls: Counter[str] = Counter()
        self._own = {name: getattr(utils, name) for name in _NAMES if hasattr(utils, name)}

    def undo(self) -> None:
        """A second time it does nothing."""
        if _installed and _installed[0] is self:
            _installed.clear()
            for name in _NAMES:
                if name in self._own:
                    setattr(utils, name, self._own[name])
                else:
                    delattr(utils, name)

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


_installed: list[Installed] = []


def _count(name: str) -> None:
    for installed in _installed:
        installed.calls[name] += 1


def install(*, max_chunk_bytes: int | None = None, compaction: str | int | None = None) -> Installed:
    """Has every trainer of TRL score its tokens by the functions above, until undo(); trainers that exist already too.

    On a GPU and on the CPU alike: TRL's own kernels run on a GPU alone, and elsewhere its log-probs of half precision
    logits are in half precision; ours are fp32. TRL keeps what no kernel of its computes either, several indices a
    row (top-k log-probs) and DTensor logits, and DistillationTrainer's divergence, which is another kernel.

    Args:
        max_chunk_bytes: of ChunkedLogProbFunction, as in linear_token_logprobs; by default the bytes of TRL's tile.
        compaction: likewise; by default "exact" on the CPU and "none" elsewhere, which waits for nothing.

    Returns:
        Installed, a context manager; leave it or call its undo().

    Raises:
        TypeError, ValueError: for a bad option. RuntimeError: where install() is in force already, or where TRL has
            other names (it is written for TRL 1.16).
    """
    check_chunk_bytes("max_chunk_bytes", max_chunk_bytes)
    if compaction is not None:
        check_compaction("compaction", compaction)
    if _installed:
        raise RuntimeError("install() is in force already: undo() what it returned first")
    missing = [name for name in ("_ChunkedLogProbFunction", "_supports_trl_loss_kernel") if not hasattr(utils, name)]
    if missing:
        raise RuntimeError(f"trl.trainer.utils has no {missing[0]}, which TRL 1.16 has; this is TRL {trl.__version__}")
    installed = Installed(max_chunk_bytes, compaction)
    _installed.append(installed)
    for name, function in _NAMES.items():
        setattr(utils, name, function)
    return installed
