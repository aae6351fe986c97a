"""Exact rounding of token counts: n * ratio in 64-bit integers, as the decimal ratio says."""

from __future__ import annotations

import functools
from fractions import Fraction


@functools.lru_cache(maxsize=256)
def bounded_fraction(ratio: float, limit: int, ceil: bool) -> Fraction:
    """A fraction whose multiples by 0..limit round as those of the decimal `ratio` do, with a denominator <= limit.

    It is the nearest such fraction on the side that rounding goes to, so 64-bit products cannot overflow.
    """
    exact = Fraction(str(ratio))
    limit = max(limit, 1)
    if exact.denominator <= limit:
        return exact
    near = exact.limit_denominator(limit)
    if near == exact or (near > exact) == ceil:
        return near
    # The Farey neighbour on the other side of `exact`: a d - b c = +-1 with the largest d <= limit.
    a, b = near.numerator, near.denominator
    sign = -1 if ceil else 1
    d = (sign * pow(a, -1, b)) % b if b > 1 else 0
    d += (limit - d) // b * b
    return Fraction((a * d - sign) // b, d)
