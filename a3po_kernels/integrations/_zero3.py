"""DeepSpeed ZeRO-3: a head's parameters are whole inside a gather alone, which backward has to enter once more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def is_partitioned(parameter: Any) -> bool:
    """Whether it is a parameter that ZeRO-3 parts among its ranks, gathered at the moment or not."""
    return hasattr(parameter, "ds_id") and hasattr(parameter, "ds_status")


@contextmanager
def gathered_again(*parameters: Tensor | None) -> Iterator[None]:
    """Inside, autograd keeps of ZeRO-3's parameters no values: backward gathers them when it reads what was saved.

    They must be gathered inside, as trl.trainer.utils.maybe_gather_lm_head_ctx does. For other parameters nothing is
    done.
    """
    parts = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parts:
        yield
        return

    def pack(tensor: Tensor) -> Any:
        return next(((at,) for at, part in enumerate(parts) if tensor is part), tensor)

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        part = parts[kept[0]]
        with maybe_gather_lm_head_ctx(part):
            return part.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
