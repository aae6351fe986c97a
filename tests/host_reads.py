"""Proof on a CPU that a call reads no value on the host, which on a GPU would wait for it."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoHostReads(TorchDispatchMode):
    """Fails where a value would be read on the host, or a shape depend on one. Values are not checked inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.item.default,
            torch.ops.aten.masked_select.default,
        ), func  # fmt: skip
        assert func is not torch.ops.aten.index.Tensor or all(i is None or i.dtype != torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))
