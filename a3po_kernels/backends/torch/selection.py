"""Exact selection of the lowest or highest k entries of each segment by stable sorts."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from ...core.forms import RuleForm
from ...core.rounding import bounded_fraction
from ...core.segments import segment_of

# The longest segment that apply_rules walks well.
LONGEST_SEGMENT = 2**62


def select(
    metric: Tensor, eligible: Tensor, offsets: Tensor, fraction: Fraction, high: bool, ceil: bool, at_least: int,
    required: int,
) -> Tensor:  # fmt: skip
    """Bool [N]; a row a segment, where padding to the longest is cheap, else sorted by metric and then by segment."""
    count, segments = metric.numel(), offsets.numel() - 1
    position = torch.arange(count, device=metric.device)
    segment = segment_of(offsets, position)
    running = torch.cat([offsets.new_zeros(1), eligible.long().cumsum(0)])
    n = running[offsets[1:]] - running[offsets[:-1]]
    k = n * fraction.numerator + (fraction.denominator - 1 if ceil else 0)
    k = (k // fraction.denominator).clamp(min=at_least)
    k = torch.where(k < required, 0, torch.minimum(k, n))
    # + 0.0 turns -0.0 into 0.0, which a radix sort would tell apart.
    keys = metric + 0.0
    # The longest segment of several is read on the host: on a CPU alone.
    width = count if segments == 1 else int((offsets[1:] - offsets[:-1]).max()) if metric.device.type == "cpu" else 0
    if 0 < segments * width <= 4 * count:
        place = None if segments * width == count else segment * width + position - offsets[segment]

        def padded(x: Tensor) -> Tensor:
            flat = x if place is None else x.new_zeros(segments * width).scatter_(0, place, x)
            return flat.view(segments, width)

        order = torch.sort(padded(keys), dim=1, stable=True, descending=high).indices
        open_ = padded(eligible).gather(1, order)
        chosen = open_ & (open_.cumsum(1) <= k.unsqueeze(1))
        out = torch.empty_like(open_).scatter_(1, order, chosen).flatten()
        return out if place is None else out[place]
    order = torch.sort(keys, stable=True, descending=high).indices
    group = segment * 2 + (~eligible).long()
    order = order[torch.sort(group[order], stable=True).indices]
    chosen = position - offsets[segment] < k[segment]
    return torch.empty_like(eligible).scatter_(0, order, chosen)


def apply_rules(weights: Tensor, polarity: Tensor, offsets: Tensor, rules: list[RuleForm]) -> tuple[Tensor, Tensor]:
    """(weights, selected) [N] after the rules in the order given."""
    selected = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device)
    if weights.numel() == 0 or offsets.numel() < 2:
        return weights.clone(), selected
    for rule in rules:
        eligible = weights != 0
        if rule.polarity:
            eligible = eligible & (polarity * rule.polarity > 0)
        fraction = bounded_fraction(rule.ratio, weights.numel(), rule.ceil)
        chosen = select(rule.metric, eligible, offsets, fraction, rule.high, rule.ceil, 1, 0)
        scale = rule.scale.to(weights.dtype) if isinstance(rule.scale, Tensor) else rule.scale
        if rule.rest != 1.0:
            weights = torch.where(eligible & ~chosen, weights * rule.rest, weights)
        weights = torch.where(chosen, weights * scale, weights)
        selected = selected | chosen
    return weights, selected
