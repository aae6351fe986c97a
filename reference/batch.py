"""The arguments of policy_loss, checked and turned into one list of token rows per rollout (SPEC section 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import rollouts_of
from .statistics import read_mask


@dataclass(frozen=True)
class Batch:
    """A "token" is a row with mask 1 and a target that is not ignore_index. Only tokens' rows are ever read."""

    tokens: list[list[int]]  # per rollout, the flat indices of its tokens in order; empty where it has none
    advantages: Tensor  # [N], as are the others
    polarity: list[int]
    old_logprobs: Tensor | None
    old_entropy: Tensor | None
    ref_logprobs: Tensor | None
    min_p_logprobs: Tensor | None
    importance_weights: Tensor | None
    weighs_rollouts: bool  # the importance weights are one per rollout
    scores: dict[str, Tensor]
    rollout: list[int]  # [N]: the number of each row's rollout, and its place there
    position: list[int]

    @property
    def rows(self) -> list[int]:
        """The rows of all tokens, in order."""
        return [row for tokens in self.tokens for row in tokens]


def read_batch(
    targets, mask, cu_seqlens, ignore_index, dtype, *, advantages, polarity, importance_weights, scores=None,
    **per_token,
) -> Batch:  # fmt: skip
    shape = targets.shape
    rollouts = rollouts_of(shape, cu_seqlens)
    on = read_mask(mask, shape)
    target_of = targets.reshape(-1).tolist()
    tokens = [[i for i in rollout if on[i] and target_of[i] != ignore_index] for rollout in rollouts]

    advantages = spread("advantages", advantages, shape, rollouts, dtype)
    if polarity is None:
        # Each token has the sign of its advantage; with one advantage per rollout that is the rollout's sign.
        signs = (advantages > 0).long() - (advantages < 0).long()
    else:
        signs = spread("polarity", polarity, shape, rollouts, torch.float64)
    signs = signs.tolist()
    for row in [row for rows in tokens for row in rows]:
        if signs[row] not in (-1, 0, 1):
            raise ValueError(f"polarity must be -1, 0 or +1, got {signs[row]}")

    def one_per_token(name: str, value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if value.shape != shape:
            raise ValueError(f"{name} must have the shape {tuple(shape)}, got {tuple(value.shape)}")
        return value.detach().to(dtype).reshape(-1)

    return Batch(
        tokens=tokens,
        advantages=advantages,
        polarity=signs,
        old_logprobs=one_per_token("old_logprobs", per_token["old_logprobs"]),
        old_entropy=one_per_token("old_entropy", per_token["old_entropy"]),
        ref_logprobs=one_per_token("ref_logprobs", per_token["ref_logprobs"]),
        min_p_logprobs=one_per_token("min_p_logprobs", per_token["min_p_logprobs"]),
        importance_weights=None
        if importance_weights is None
        else spread("importance_weights", importance_weights, shape, rollouts, dtype),
        weighs_rollouts=importance_weights is not None and tuple(importance_weights.shape) == (len(rollouts),),
        scores={name: one_per_token(f"scores[{name!r}]", value) for name, value in (scores or {}).items()},
        rollout=[s for s, rollout in enumerate(rollouts) for _ in rollout],
        position=[i for rollout in rollouts for i in range(len(rollout))],
    )


def spread(name: str, value: Tensor, shape: torch.Size, rollouts: list[range], dtype: torch.dtype) -> Tensor:
    """One value per row, from one per rollout [S] or one per token. Where S = N, per rollout wins."""
    value = value.detach().to(dtype)
    if tuple(value.shape) == (len(rollouts),):
        per_row = value.new_zeros(shape.numel())
        for s, rollout in enumerate(rollouts):
            for row in rollout:
                per_row[row] = value[s]
        return per_row
    if value.shape == shape:
        return value.reshape(-1)
    raise ValueError(
        f"{name} must be [{len(rollouts)}] (per rollout) or {list(shape)} (per token), got {list(value.shape)}"
    )
