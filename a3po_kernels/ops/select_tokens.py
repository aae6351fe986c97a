"""Exact selection of the lowest or highest k tokens of each rollout, on the device and with no host sync."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..backends import check_backend, choose
from ..core.checks import check_floating, check_selection, check_tensor
from ..core.layout import token_layout
from ..core.operators import plainly, reads_values
from ..core.rounding import bounded_fraction
from ..parallel.context import check_positions, joined_with_length, read_context
from ..parallel.groups import check_group
from ..parallel.selection import Places, select_global, select_shared


@torch.library.custom_op("a3po::select_tokens", mutates_args=())
def _select_tokens(
    metric: Tensor, eligible: Tensor, offsets: Tensor, ratio: float, high: bool, ceil: bool, at_least: int,
    required: int, backend: str,
) -> Tensor:  # fmt: skip
    """Bool [N]: in each segment of offsets [S + 1] the k lowest (or highest) eligible entries of metric [N].

    k is n * ratio rounded, at least `at_least`, and 0 where that is below `required`.
    """
    count, segments = metric.numel(), offsets.numel() - 1
    if count == 0 or segments <= 0:
        return torch.zeros_like(eligible)
    fraction = bounded_fraction(ratio, count, ceil)
    return choose(backend, metric.device).select(
        metric, eligible, offsets, fraction, high, ceil, at_least, required
    )


@_select_tokens.register_fake
def _(metric, eligible, *_):
    return torch.empty_like(eligible)


_select_plainly = plainly(_select_tokens)


def select_flat(
    metric: Tensor, eligible: Tensor, offsets: Tensor, *, ratio: float, side: str, scope: str, rounding: str,
    at_least: int = 1, required: int = 0, backend: str = "auto", group: ProcessGroup | None = None,
    places: Places | None = None,
) -> Tensor:  # fmt: skip
    """select_tokens on flat [N] tensors and offsets [S + 1], checked before; places: of rollouts on several ranks."""
    metric = metric.detach().contiguous()
    if metric.dtype not in (torch.float32, torch.float64):
        metric = metric.float()
    eligible = eligible.contiguous()
    if scope == "global":
        return select_global(
            metric, eligible, ratio, side == "high", rounding == "ceil", at_least, required, group, places
        )
    if places is not None:
        return select_shared(
            metric, eligible, places, scope == "batch", ratio, side == "high", rounding == "ceil", at_least, required
        )
    if scope == "batch":
        offsets = torch.stack([torch.zeros_like(offsets[0]), torch.full_like(offsets[0], metric.numel())])
    return _select_plainly(
        metric, eligible, offsets, float(ratio), side == "high", rounding == "ceil", at_least, required, backend
    )


def select_tokens(
    metric: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ratio: float,
    side: str,
    scope: str = "rollout",
    rounding: str = "floor",
    group: ProcessGroup | None = None,
    cp_group: ProcessGroup | None = None,
    positions: Tensor | None = None,
    validate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Marks exactly k = max(1, n * ratio rounded) of the n eligible tokens of each scope (none where n = 0).

    The product is taken in integers from the decimal ratio, so 0.29 of 100 is 29. Ties go to the earlier position,
    -0.0 equals 0.0, NaN counts as the largest. Deterministic, no host synchronisation.

    Args:
        metric: [B, T], or [N] with `cu_seqlens` (without it: one rollout); floating point, never differentiated.
        mask: eligible tokens, of the metric's shape, bool or 0/1; all if None.
        cu_seqlens: [S + 1] int32 or int64 offsets of packed rollouts.
        ratio: share to select, in (0, 1].
        side: "low" or "high" values of the metric.
        scope: "rollout", "batch", or "global", over the ranks of `group`, where ties go to the lower rank first.
        rounding: "floor" or "ceil".
        group: of scope "global": a torch.distributed group, every rank of which makes this call; None is the default
            group (without torch.distributed: this process).
        cp_group: of scope "rollout" and "batch": the ranks that hold tokens of the same rollouts, in the same order;
            each gives its own tokens and gets their marks. A rollout may be empty on a rank.
        positions: int32 or int64, of the metric's shape: each one's place in its rollout, from 0, for ties; under
            cp_group. None: the ranks hold consecutive blocks of each rollout, equally long, in the order of their
            numbers; with cu_seqlens they must be given.
        validate: on a GPU also check the values of mask and cu_seqlens, which waits for it. The CPU always checks.
        backend: "triton", "torch" or "auto" (Triton on a GPU it supports, else torch).

    Returns:
        A bool mask of the metric's shape.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range; a group of another scope.
    """
    check_tensor("metric", metric)
    check_floating("metric", metric)
    check_selection(ratio, side, scope, rounding)
    check_backend(backend, metric.device)
    check_group("group", group)
    if group is not None and scope != "global":
        raise ValueError(f"group is what scope 'global' selects over; got a group and scope = {scope!r}")
    layout = token_layout("metric", metric, cu_seqlens, validate=validate, one_rollout=True)
    if cp_group is not None and scope == "global":
        raise ValueError("cp_group is of scope 'rollout' and 'batch'; for scope 'global' give a group of all ranks")
    context = read_context(layout, cp_group, positions, cu_seqlens is None, "ties, which go to the earlier position")
    eligible = layout.flat_mask(mask, validate)
    if eligible is None:
        eligible = torch.ones(layout.count, dtype=torch.bool, device=metric.device)
    places = None
    if context is not None:
        rollout = layout.row_rollouts()
        check_positions(context, eligible, rollout, validate)
        if positions is None and reads_values(metric, validate):
            joined_with_length(context, metric.new_zeros(0), layout.shape[-1], validate)
        places = context.places(rollout, layout.rollouts)
    chosen = select_flat(
        metric.reshape(-1), eligible, layout.offsets, ratio=ratio, side=side, scope=scope, rounding=rounding,
        backend=backend, group=group, places=places,
    )  # fmt: skip
    return chosen.view(metric.shape)
