"""Triton kernels and their launchers."""

from ..torch.policy_terms import joined_loss_and_coefficients  # its sums come from outside, in the middle
from .gradient import write_gradient
from .min_p import finish_min_p, min_p_logprobs, min_p_part, row_maxima
from .one_launch import prefers_one_launch, write_statistics_and_gradient
from .policy_terms import loss_and_coefficients
from .scaling import scale
from .selection import LONGEST_SEGMENT, apply_rules, select
from .statistics import empty_shift, finish_statistics, fold_statistics
from .tokens import count_kept, normalizer, read_tokens

__all__ = [
    "LONGEST_SEGMENT", "apply_rules", "count_kept", "empty_shift", "finish_min_p", "finish_statistics",
    "fold_statistics", "joined_loss_and_coefficients", "loss_and_coefficients", "min_p_logprobs", "min_p_part",
    "normalizer", "prefers_one_launch", "read_tokens", "row_maxima", "scale", "select", "write_gradient",
    "write_statistics_and_gradient",
]  # fmt: skip
