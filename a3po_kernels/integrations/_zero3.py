"""DeepSpeed ZeRO-3 below TRL's fused head: its weight is whole inside a gather alone, which backward enters again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils


@contextmanager
def gathered_again(*parameters: Tensor | None) -> Iterator[None]:
    """Inside, autograd keeps no values of ZeRO-3's parameters: backward gathers them when it reads what was saved.

    As TRL asks of what its fused head calls, which has gathered them for forward (maybe_gather_lm_head_ctx). With
    other parameters nothing is done.
    """
    parts: list[Any] = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not parts:
        yield
        return

    def pack(tensor: Tensor) -> Tensor | int:
        return next((at for at, part in enumerate(parts) if tensor is part), tensor)

    def unpack(kept: Tensor | int) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        part = parts[kept]
        if part.shape == part.ds_shape:  # DeepSpeed has gathered it for its module's backward
            return part.detach()
        with utils.maybe_gather_lm_head_ctx(part):
            return part.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
