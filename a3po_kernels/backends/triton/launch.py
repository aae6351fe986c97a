"""What every launcher needs: the current device, the dtype of the statistics, the alignment of rows."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor


def triton_dtype(dtype: torch.dtype):
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def device_guard(tensor: Tensor):
    """Makes the tensor's GPU the current one: Triton launches on the current device."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def vector_width(logits: Tensor) -> int:
    """Elements of a 16-byte load."""
    return 16 // logits.element_size()


def is_aligned(*tensors: Tensor) -> bool:
    """Whether every row of [batch, rows, V] starts on 16 bytes, so that loads can be 128 bits wide."""
    # The stride of a dimension of one entry is never used, and may be anything.
    steps = [x.stride(dim) * x.element_size() for x in tensors for dim in (0, 1) if x.shape[dim] > 1]
    return all(step % 16 == 0 for step in steps) and all(x.data_ptr() % 16 == 0 for x in tensors)
