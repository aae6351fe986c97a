"""Multiplies a gradient that was formed in forward by the incoming one."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements widened at a time: they stay in the cache


def scale(gradient: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = factor * gradient, factor 0-d; `out` may be the gradient itself, which a factor of 1 leaves untouched."""
    same = out.data_ptr() == gradient.data_ptr() and out.dtype == gradient.dtype
    if same and factor.device.type == "cpu" and float(factor) == 1.0:
        return
    factor = factor.to(torch.promote_types(torch.float32, gradient.dtype))
    if not gradient.numel():
        return
    if gradient.ndim > 2:
        for source, into in zip(gradient, out, strict=True):
            scale(source, factor, into)
        return
    step = max(_CHUNK // gradient[0].numel(), 1) if gradient.ndim else 1
    parts = zip(gradient.split(step), out.split(step), strict=True) if gradient.ndim else ((gradient, out),)
    for source, into in parts:
        if into.dtype == factor.dtype:
            torch.mul(source, factor, out=into)
        else:
            into.copy_(source * factor)
