"""What every launcher needs: the current device, the dtype of the statistics, how rows may be read."""

from __future__ import annotations

import contextlib
import functools

import torch
import triton
from torch import Tensor

from ...core.transform import Transform

# Fused multiply-adds are written out where they are wanted: two kernels that share a formula then share its bits.
VOCABULARY_OPTIONS = {"enable_fp_fusion": False}
_INTERPRETED_PROCESSORS = 2
_NOTHING = contextlib.nullcontext()


def triton_dtype(dtype: torch.dtype):
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def device_guard(tensor: Tensor):
    """Makes the tensor's GPU the current one: Triton launches on the current device."""
    device = tensor.device
    if device.type == "cpu" or (device.type == "cuda" and device.index == torch.cuda.current_device()):
        return _NOTHING
    return torch.get_device_module(device).device(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU; few in the interpreter."""
    if device.type == "cpu":
        return _INTERPRETED_PROCESSORS
    return torch.get_device_module(device).get_device_properties(device).multi_processor_count


def registers(most: int) -> dict[str, int]:
    """The launch option that bounds a thread's registers, on NVIDIA's compiler."""
    return {"maxnreg": most} if torch.version.hip is None and torch.version.cuda is not None else {}


def is_aligned(*tensors: Tensor) -> bool:
    """Whether every row of [batch, rows, V] starts on 16 bytes, so that loads can be 128 bits wide."""
    # The stride of a dimension of one entry is never used, and may be anything.
    steps = [x.stride(dim) * x.element_size() for x in tensors for dim in (0, 1) if x.shape[dim] > 1]
    return all(step % 16 == 0 for step in steps) and all(x.data_ptr() % 16 == 0 for x in tensors)


def loads_of(logits: Tensor) -> str:
    """How tiles.load_tile reads the rows of [batch, rows, V]."""
    if logits.stride(2) != 1 and logits.shape[2] > 1:
        return "strided"
    return "aligned" if is_aligned(logits) else "shifted"


def is_even(logits: Tensor) -> bool:
    """Whether a row is a whole number of 16-byte vectors."""
    return logits.shape[-1] * logits.element_size() % 16 == 0


def row_arguments(logits: Tensor, transform: Transform) -> tuple:
    """What finds and transforms a row: its address, temperature, ignored target, and the three scales."""
    return (
        logits.shape[1], logits.stride(0), logits.stride(1), logits.stride(2), transform.temperature_stride,
        transform.ignore_index, transform.exponent_scale, transform.logit_scale, transform.softcap or 1.0,
    )  # fmt: skip
