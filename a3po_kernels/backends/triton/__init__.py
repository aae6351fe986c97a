"""Triton kernels and their launchers."""

from .gradient import write_gradient
from .min_p import min_p
from .policy_terms import policy_terms
from .selection import select
from .statistics import fold_statistics

__all__ = ["fold_statistics", "min_p", "policy_terms", "select", "write_gradient"]
