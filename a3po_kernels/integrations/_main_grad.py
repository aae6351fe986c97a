"""A gradient that is returned to autograd, for a weight that Megatron's fused backward may have used as well."""

from __future__ import annotations

from torch import Tensor


def keep_gradient(weight: Tensor) -> None:
    """Sees to it that Megatron-Core's DistributedDataParallel adds a returned gradient of the weight to main_grad.

    With gradient_accumulation_fusion the backward of the layer's own forward (multi-token prediction, or a micro-batch
    with Megatron's loss) adds to main_grad, sets grad_added_to_main_grad for the rest of the step, and returns
    uninitialised memory, to which autograd adds ours; the sum is then dropped. Of a weight with zero_out_wgrad it
    returns zeros, and the sum is taken.
    """
    if hasattr(weight, "grad_added_to_main_grad"):  # else it is not of Megatron's data parallelism
        weight.zero_out_wgrad = True  # type: ignore[attr-defined]
