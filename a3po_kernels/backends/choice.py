"""Which backend runs an operation."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch
import triton as triton_library

from . import torch as torch_backend
from . import triton as triton_backend

INTERPRETED = bool(triton_library.knobs.runtime.interpret)  # read once, as kernels are declared
BACKENDS = ("auto", "torch", "triton")


def check_backend(backend: str, device: torch.device) -> None:
    """Raises ValueError if `backend` is unknown or cannot run on `device`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton" and device.type == "cpu" and not INTERPRETED:
        raise ValueError("backend='triton' needs a GPU, or TRITON_INTERPRET=1 before the import; got CPU tensors")


def choose(backend: str, device: torch.device) -> ModuleType:
    """The backend of a checked name; "auto" is Triton on a GPU it supports, else torch."""
    if backend == "auto":
        backend = "triton" if _supports_triton(device) else "torch"
    return triton_backend if backend == "triton" else torch_backend


@functools.cache
def _supports_triton(device: torch.device) -> bool:
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            got = ".".join(map(str, capability))
            warnings.warn(f"{device} has compute capability {got}: below 8.0 PyTorch runs, no kernel", stacklevel=2)
        return capability >= (8, 0)
    if device.type == "cuda":
        return True
    return device.type == "xpu"
