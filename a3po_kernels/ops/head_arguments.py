"""The arguments of a linear head: what can be wrong with them, and the head that they make."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import check_backend
from ..core.autograd import refuse_tangents
from ..core.checks import (
    INDEX_DTYPES,
    LOGIT_DTYPES,
    check_is_number,
    check_targets_shape,
    check_tensor,
    check_transform,
    is_dtensor,
    same_shape,
)
from ..core.operators import runs_plainly
from ..parallel.dtensor import read_head_dtensors, wait_for
from ..parallel.vocabulary import Split, gather_hidden, read_split
from .linear_head import LinearHead

Lora = tuple[Tensor, Tensor, float]

# How rows are left out: counted when they are needed, none, or given; a positive number is a capacity.
EXACT, EVERY, GIVEN = -1, 0, -2


def read_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora: Lora | None, vocab_size: int | None,
    main_grad: Tensor | None, head_dtype: torch.dtype | None, split: Split,
) -> tuple[LinearHead, tuple[int, ...]]:  # fmt: skip
    """Checks the head and reads it, hidden flat [N, H]; also the shape of its rows. Raises ValueError or TypeError."""
    if is_dtensor(weight) or is_dtensor(hidden):
        given = (hidden, weight, bias, lora, vocab_size, split)
        hidden, weight, bias, lora, vocab_size, split = read_head_dtensors(*given)
    hidden = wait_for(hidden)
    check_tensor("hidden", hidden, dtypes=LOGIT_DTYPES)
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden must have shape [..., H] with H >= 1; got {list(hidden.shape)}")
    check_tensor("weight", weight, dtypes=LOGIT_DTYPES, device=hidden.device)
    width = hidden.shape[-1]
    may_be_empty = split.tp_group is not None
    if weight.ndim != 2 or weight.shape[1] != width or (weight.shape[0] < 1 and not may_be_empty):
        raise ValueError(f"weight must have shape [V, {width}], as hidden is [..., {width}]; got {list(weight.shape)}")
    columns = weight.shape[0]
    refuse_tangents(hidden=hidden, weight=weight, bias=bias)
    if bias is not None:
        check_tensor("bias", bias, (columns,), LOGIT_DTYPES, hidden.device)
    lora_a, lora_b, scale = (None, None, 1.0) if lora is None else _read_lora(lora, columns, width, hidden.device)
    if main_grad is not None:
        check_tensor("main_grad", main_grad, tuple(weight.shape), (torch.float32,), hidden.device)
        if not weight.requires_grad:
            raise ValueError("main_grad was given for a weight that does not require a gradient")
    if head_dtype is not None and head_dtype not in LOGIT_DTYPES:
        raise TypeError(f"head_dtype must be a floating-point dtype of logits; got {head_dtype}")
    dtype = head_dtype or _gemm_dtype(hidden, weight)
    shard, vocabulary = read_split(split, columns, vocab_size, hidden.device, runs_plainly(hidden))
    if shard is not None:
        hidden, shard = gather_hidden(hidden, shard, split)
    flat = hidden.reshape(-1, width)
    head = LinearHead(flat, weight, bias, lora_a, lora_b, scale, vocabulary, dtype, shard)
    return head, tuple(hidden.shape[:-1])


def _read_lora(lora: object, columns: int, width: int, device: torch.device) -> Lora:
    if not isinstance(lora, tuple) or len(lora) != 3:
        got = f"{len(lora)} of them" if isinstance(lora, tuple) else type(lora).__name__
        raise TypeError(f"lora must be a tuple (A [r, H], B [V, r], scale); got {got}")
    a, b, scale = lora
    check_tensor("lora A", a, dtypes=LOGIT_DTYPES, device=device)
    check_tensor("lora B", b, dtypes=LOGIT_DTYPES, device=device)
    if a.ndim != 2 or a.shape[1] != width or not same_shape(b.shape, (columns, a.shape[0])):
        raise ValueError(
            f"lora must hold A [r, {width}] and B [{columns}, r]; got {list(a.shape)} and {list(b.shape)}"
        )  # fmt: skip
    check_is_number("lora's scale", scale)
    refuse_tangents(**{"lora A": a, "lora B": b})
    return a, b, float(scale)


def _gemm_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, as in F.linear; else the wider of the two."""
    kind = hidden.device.type
    available = torch.amp.is_autocast_available(kind)
    if hidden.dtype != torch.float64 and available and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def weight_gradient_dtype(weight: Tensor) -> torch.dtype:
    """What weight.grad is to be: PyTorch's `grad_dtype` of the tensor where it is set, else the weight's own."""
    if torch.compiler.is_compiling() or not weight.is_leaf:
        return weight.dtype
    wanted = getattr(weight, "grad_dtype", None)
    return wanted if wanted in (torch.float32, torch.float64) else weight.dtype


def check_head_rows(
    head: LinearHead, targets: object, shape: tuple[int, ...], temperature: object, softcap: object,
    logit_scale: object, max_chunk_bytes: object, compaction: object, backend: str,
) -> None:  # fmt: skip
    """All that can be wrong with the other arguments of a linear head, short of their values."""
    device = head.hidden.device
    check_targets_shape("hidden", targets, shape)
    check_tensor("targets", targets, shape, INDEX_DTYPES, device)
    check_transform(temperature, softcap, logit_scale, shape, device)
    check_backend(backend, device)
    check_chunk_bytes("max_chunk_bytes", max_chunk_bytes)
    check_compaction("compaction", compaction)


def check_chunk_bytes(name: str, value: object) -> None:
    """Raises TypeError or ValueError unless value is None or a positive number of bytes."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be positive; got {value}")


def check_compaction(name: str, value: object) -> None:
    """Raises ValueError unless value is a known word or a positive number of rows."""
    capacity = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not capacity and value not in ("auto", "exact", "none"):
        raise ValueError(f"{name} must be 'auto', 'exact', 'none' or a positive number of rows; got {value!r}")


def read_compaction(compaction: str | int, hidden: Tensor, backend: str) -> int:
    """EXACT, EVERY or a number of rows; where counting takes no synchronisation a number is EXACT.

    "auto" is exact but where nothing may wait: on a GPU while a graph is captured, and in what is compiled or traced.
    """
    device = hidden.device
    if isinstance(compaction, int):
        return compaction if device.type != "cpu" or backend == "triton" else EXACT
    if compaction == "auto" and device.type != "cpu":
        waits = not runs_plainly(hidden) or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
        return EVERY if waits else EXACT
    return EVERY if compaction == "none" else EXACT
