"""slime 0.3: its calculate_log_probs_and_entropy (slime/utils/ppo_utils.py) by token_logprobs, on split logits.

slime.backends.megatron_utils.loss imports the function by name: set that attribute of the module. No import of slime.
Its groups are ReloadableProcessGroups (slime/utils/reloadable_process_group.py), which have no name of their own.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.token_logprobs import token_logprobs

__all__ = ["calculate_log_probs_and_entropy"]


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs and entropy of logits whose columns lie on the ranks of a group, in equal parts and rank order.

    Args:
        logits: [T, V / tp], the temperature applied. tokens: [T], int64, of the whole vocabulary: row i predicts
            tokens[i].
        tp_group: the tensor-parallel group, or slime's wrapper of one. None, which slime takes for all ranks, is
            refused where there are more.
        chunk_size: -1; slime's bound on temporaries of the logits' size, of which there are none here.
        log_prob_keep_mask: bool [T, V / tp]: log-probs are of the kept columns and the token's own, for which the
            logits are copied. The entropy is of all columns.
        with_entropy: whether the entropy is wanted; without it the second result is None.
        with_entropy_grad: whether the entropy has a gradient.

    Returns:
        (log-probs [T, 1], or [0] of no rows; entropy [T] or None), fp32, nats. As in slime every rank computes the same
        loss of them; the gradient of the logits is this rank's columns'.

    Raises:
        ValueError: a positive chunk_size, tp_group None with several ranks. IndexError: a token outside the vocabulary.
    """
    if chunk_size > 0:
        raise ValueError(f"chunk_size must be -1: there is no temporary of the logits' size to bound; got {chunk_size}")
    if tp_group is None and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError("tp_group must be a group: slime takes None for all ranks, others for none; got None")
    inner = getattr(tp_group, "group", None)
    if isinstance(inner, dist.ProcessGroup):  # operators go by a group's name, which the wrapper lacks
        tp_group = inner
    if not logits.shape[0]:
        empty = logits.new_zeros((0,))
        return empty, empty if with_entropy else None
    masked = logits
    if log_prob_keep_mask is not None:
        columns = logits.shape[1]
        own = (tokens - (0 if tp_group is None else dist.get_rank(tp_group) * columns)).unsqueeze(-1)
        here, own = (own >= 0) & (own < columns), own.clamp(0, columns - 1)
        kept = log_prob_keep_mask.scatter(1, own, log_prob_keep_mask.gather(1, own) | here)
        masked = logits.masked_fill(~kept, -torch.inf)
    stats = token_logprobs(masked, tokens, tp_group=tp_group)
    logprobs = stats.logprobs.unsqueeze(-1)
    if not with_entropy:
        return logprobs, None
    entropy = stats.entropy if masked is logits else token_logprobs(logits, tokens, tp_group=tp_group).entropy
    return logprobs, entropy if with_entropy_grad else entropy.detach()
