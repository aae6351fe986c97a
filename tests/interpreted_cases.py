"""Context-parallel cases on the Triton backend, for ranks that run its interpreter."""

from __future__ import annotations

import torch.distributed as dist
from context_parallel_cases import OBJECTIVES, call, needs, share, whole


def kernels(rank, world):
    found = {}
    for name, loss in (("gspo", "logits"), ("a3po", "linear"), ("dapo", "linear")):
        arguments = share(needs(name, whole()), "balanced", rank, world)
        out, gradient = call(loss, arguments, OBJECTIVES[name], cp_group=dist.group.WORLD, backend="triton")
        found[name] = out.loss.detach(), gradient, out.weights
    return found


CASES = {"kernels": kernels}
