"""Which backend runs an operation, and the checks and small conversions that every operation shares."""

from __future__ import annotations

import contextlib
import numbers
from typing import Any

import torch
import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)  # Triton reads TRITON_INTERPRET once, when kernels are declared.
BACKENDS = ("auto", "torch", "triton")
LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_backend(backend: str, device: torch.device) -> None:
    """Raises ValueError if `backend` is unknown or cannot run on `device`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton" and device.type == "cpu" and not INTERPRETED:
        raise ValueError("backend='triton' needs a GPU, or TRITON_INTERPRET=1 before the import; got CPU tensors")


def uses_triton(backend: str, device: torch.device) -> bool:
    """Resolves 'auto': Triton on a GPU it supports, else torch."""
    if backend != "auto":
        return backend == "triton"
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "xpu"


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_dtype(dtype: torch.dtype):
    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def device_guard(tensor: torch.Tensor):
    """Makes the tensor's GPU the current one: Triton launches on the current device."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def check_tensor(name: str, tensor: object, shape: tuple[int, ...] | None = None, dtypes=None, device=None) -> None:
    """Raises TypeError or ValueError that names the argument, what it got and what it takes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if dtypes is not None and tensor.dtype not in dtypes:
        takes = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {takes}; got {tensor.dtype}")
    if shape is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}; got {tensor.device}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError for a tensor of integers or bools."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype}")


def check_positive(name: str, value: object) -> None:
    """Raises TypeError for a non-number and ValueError unless 0 < value < inf."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number; got {type(value).__name__}")
    if not 0 < float(value) < float("inf"):
        raise ValueError(f"{name} must be positive and finite; got {value}")


def check_transform(temperature: object, softcap: object, logit_scale: object, rows_shape, device) -> None:
    """Checks the arguments of the logit transform: temperature (number, 0-d or per token), softcap, logit_scale."""
    check_positive("logit_scale", logit_scale)
    if softcap is not None:
        check_positive("softcap", softcap)
    if not isinstance(temperature, torch.Tensor):
        check_positive("temperature", temperature)
        return
    check_floating("temperature", temperature)
    if temperature.ndim and tuple(temperature.shape) != tuple(rows_shape):
        raise ValueError(f"temperature must be 0-d or of shape {list(rows_shape)}; got {list(temperature.shape)}")
    if temperature.device != device:
        raise ValueError(f"temperature must be on {device}; got {temperature.device}")
    if temperature.requires_grad:
        raise ValueError("temperature must not require a gradient: none is computed for it")
    if device.type == "cpu" and not torch.compiler.is_compiling() and not bool((temperature > 0).all()):
        raise ValueError("temperature must be positive everywhere")


def check_rows(
    logits: Any, targets: Any, temperature: object, softcap: object, logit_scale: object, backend: str
) -> None:
    """All that can be wrong with logits [..., V], targets [...] and the transform, short of their values."""
    check_tensor("logits", logits, dtypes=LOGIT_DTYPES)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape [..., V] with V >= 1; got {list(logits.shape)}")
    check_tensor("targets", targets, logits.shape[:-1], INDEX_DTYPES, logits.device)
    check_transform(temperature, softcap, logit_scale, targets.shape, logits.device)
    check_backend(backend, logits.device)


def as_rows(logits: torch.Tensor) -> torch.Tensor:
    """Logits of any leading shape as [batch, rows, V]; a copy only where strides allow no view of more than 3 dims."""
    if logits.ndim < 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits if logits.ndim == 3 else logits.reshape(-1, *logits.shape[-2:])
