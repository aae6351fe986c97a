"""The two spellings of a batch, padded [B, T] and packed [N] with cu_seqlens, read as one: rows and rollout offsets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import INDEX_DTYPES, check_floating, check_mask_values, check_tensor, same_shape
from .operators import reads_values
from .segments import segment_of


@dataclass(frozen=True)
class TokenLayout:
    """N token rows in S rollouts.

    shape: the shape of a per-token tensor as the caller spells it; offsets: int64 [S + 1], first 0, last N.
    """

    shape: tuple[int, ...]
    offsets: Tensor
    padded: bool

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1] if self.padded else self.shape[0]

    @property
    def rollouts(self) -> int:
        return self.offsets.shape[0] - 1

    def row_rollouts(self) -> Tensor:
        """int64 [N]: the rollout of each row; within bounds where cu_seqlens were not read and are wrong."""
        rows = torch.arange(self.count, device=self.offsets.device)
        return segment_of(self.offsets, rows).clamp(0, max(self.rollouts - 1, 0))

    def is_per_rollout(self, values: Tensor) -> bool:
        """Whether values that are per rollout or per token are [S]; where S = N, they are."""
        return same_shape(values.shape, (self.rollouts,))

    def check_per_rollout(self, name: str, values: Any) -> None:
        """Raises unless values are a tensor per rollout [S] or per token."""
        check_tensor(name, values, device=self.offsets.device)
        if not self.is_per_rollout(values) and not same_shape(values.shape, self.shape):
            raise ValueError(
                f"{name} must have shape {[self.rollouts]} (per rollout) or {list(self.shape)} (per token); "
                f"got {list(values.shape)}"
            )

    def check_per_token(self, name: str, values: Any) -> None:
        """Raises unless values are a floating-point tensor per token."""
        check_tensor(name, values, self.shape, device=self.offsets.device)
        check_floating(name, values)

    def flat(self, values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A per-token tensor, detached and flat [N]."""
        return None if values is None else values.detach().reshape(-1).to(dtype).contiguous()

    def check_mask(self, mask: Any, validate: bool) -> None:
        """Raises unless mask is None or a tensor per token, of bools or (where values may be read) of 0 and 1."""
        if mask is None:
            return
        check_tensor("mask", mask, self.shape, device=self.offsets.device)
        check_mask_values("mask", mask, validate)

    def flat_mask(self, mask: Tensor | None, validate: bool) -> Tensor | None:
        """A mask, bool or 0/1, as a flat bool [N]."""
        self.check_mask(mask, validate)
        return None if mask is None else (mask if mask.dtype == torch.bool else mask != 0).reshape(-1).contiguous()


def _evenly(count: int, length: int, device: torch.device) -> Tensor:
    """Offsets of `count` rollouts of one length."""
    if length == 0:
        return torch.zeros(count + 1, dtype=torch.int64, device=device)
    return torch.arange(0, count * length + 1, length, device=device)


def token_layout(
    name: str, tokens: Tensor, cu_seqlens: Tensor | None, *, validate: bool, one_rollout: bool = False
) -> TokenLayout:
    """Reads the layout of a per-token tensor `tokens`, called `name` in errors.

    Raises:
        ValueError: a shape that is neither padded nor packed, or (where values may be read) cu_seqlens that do not rise
            from 0 to N.
        TypeError: cu_seqlens that are not an integer tensor.
    """
    shape, device = tuple(tokens.shape), tokens.device
    if cu_seqlens is None:
        if len(shape) == 1 and one_rollout:
            return TokenLayout(shape, _evenly(1, shape[0], device), padded=False)
        if len(shape) != 2:
            raise ValueError(f"{name} must have shape [B, T], or [N] with cu_seqlens; got {list(shape)} without them")
        return TokenLayout(shape, _evenly(shape[0], shape[1], device), padded=True)
    check_tensor("cu_seqlens", cu_seqlens, dtypes=INDEX_DTYPES, device=device)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [S + 1]; got {list(cu_seqlens.shape)}")
    if cu_seqlens.shape[0] == 1 and shape and shape[0]:
        raise ValueError(f"cu_seqlens of no rollout must have N = 0; got N = {shape[0]}")
    if len(shape) != 1:
        raise ValueError(f"{name} must have shape [N] when cu_seqlens are given; got {list(shape)}")
    offsets = cu_seqlens.long().contiguous()
    if reads_values(offsets, validate):
        rising = bool((offsets.diff() >= 0).all())
        if not rising or int(offsets[0]) != 0 or int(offsets[-1]) != shape[0]:
            raise ValueError(f"cu_seqlens must rise from 0 to N = {shape[0]}; got {cu_seqlens.tolist()}")
    # Where values were not read, wrong ends still must not lead a kernel out of bounds.
    return TokenLayout(shape, offsets.clamp(0, shape[0]), padded=False)
