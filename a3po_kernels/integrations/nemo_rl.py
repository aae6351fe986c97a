"""NeMo-RL 0.7: its from_parallel_hidden_states_to_logprobs (nemo_rl/distributed/model_utils.py) by our linear head.

patch_gpt_model_forward_for_linear_ce_fusion calls the function by its name in that module: set the attribute there.
So too at commit 7ea279abfbeb698b092856d0dab61e7cf39bc909 of the main branch; 0.6.0 passes one more argument. Nothing of
NeMo-RL is imported.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.linear_token_logprobs import linear_token_logprobs
from ._main_grad import keep_gradient

__all__ = ["from_parallel_hidden_states_to_logprobs"]


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,
    output_weight_layer: Tensor,
    runtime_gather_output: bool | None,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: dist.ProcessGroup,
    inference_only: bool = False,
    cp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probs of the next tokens, where the head is split over a group, in equal parts and rank order.

    Args:
        tensor_parallel_hidden_states: [S / tp, B, H]: with more than one rank NeMo-RL's sequence parallelism is on, and
            the gradient is that of these rows, summed over the ranks. output_weight_layer: [V / tp, H].
        target: [B, S], int64, the ids as they were fed in: position i is scored for the id at i + 1.
        vocab_start_index, vocab_end_index: what output_weight_layer's rows are of the vocabulary.
        runtime_gather_output: None or False; True, of gathered logits, is refused.
        tp_group: the tensor-parallel ranks. cp_group: context-parallel ones, refused where there are more than one.
        inference_only: no gradient.
        chunk_size: positions whose logits exist at a time, in fp32; None leaves the bound to linear_token_logprobs.

    Returns:
        [B, S - 1], fp32, nats, the same on all ranks.

    Raises:
        ValueError: a cp_group of more than one rank, runtime_gather_output=True, a range that is not this rank's equal
            part. IndexError: a target outside the vocabulary.
    """
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        raise ValueError(f"cp_group must have one rank, as in NeMo-RL; got {dist.get_world_size(cp_group)}")
    if runtime_gather_output:
        raise ValueError("runtime_gather_output must not be True: it asks for gathered logits, and none are formed")
    rows, batch = output_weight_layer.shape[0], tensor_parallel_hidden_states.shape[1]
    first = dist.get_rank(tp_group) * rows
    if (vocab_start_index, vocab_end_index) != (first, first + rows):
        raise ValueError(
            f"vocab_start_index and vocab_end_index must be {first} and {first + rows}, this rank's equal part; got "
            f"{vocab_start_index} and {vocab_end_index}"
        )
    keep_gradient(output_weight_layer)
    following = target.roll(-1, dims=-1)
    following[:, -1:] = -100  # nothing follows
    budget = None if chunk_size is None else 4 * chunk_size * batch * rows
    with torch.set_grad_enabled(torch.is_grad_enabled() and not inference_only):
        stats = linear_token_logprobs(
            tensor_parallel_hidden_states.transpose(0, 1), output_weight_layer, following, tp_group=tp_group,
            hidden_layout="sequence_sharded", max_chunk_bytes=budget,
        )  # fmt: skip
    return stats.logprobs[:, :-1]
