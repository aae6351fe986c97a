"""Does a head do what its keywords say? Its own product on two rows, and on a probe what the model does after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ._split_head import like_weight, product, whole

REFUSED = (
    "the model transforms its logits in a way that is not supported (swap_head runs a computation of yours in the "
    "head's place, without this check)"
)


def probe(vocabulary: int, device: torch.device) -> Tensor:
    """[1, 2, V] fp32: in the logits' place; no softcap, scale, bias or mask leaves it as it is, in no column."""
    return torch.linspace(-40.0, 41.0, 2 * vocabulary, device=device).view(1, 2, vocabulary)


def _coarsest(*dtypes: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@torch.no_grad()
def check_product(own: Callable[[Tensor], Any], hidden: Tensor, head: Mapping[str, Any], name: str) -> None:
    """Raises ValueError unless the head's own forward is the product with its weight, bias and adapter.

    On rows that are the same on every rank, as the verdict then is, and inside the head's hooks. It waits once.
    """
    width = hidden.shape[-1]
    rows = torch.arange(2 * width, device=hidden.device).cos().view(1, 2, width)
    rows = (rows * rows.new_tensor([1.0, 3.0]).view(1, 2, 1)).to(hidden.dtype)
    weight = head["weight"]
    ours = product(rows, head)
    theirs = whole(own(like_weight(rows, weight)))
    if not isinstance(theirs, Tensor) or theirs.shape[:-1] != ours.shape[:-1] or theirs.shape[-1] < ours.shape[-1]:
        got = list(theirs.shape) if isinstance(theirs, Tensor) else type(theirs).__name__
        raise ValueError(f"the head of {name} gives {got} for hidden states of shape {list(rows.shape)}: {REFUSED}")
    theirs = theirs[..., : ours.shape[-1]]
    error, size = (theirs.float() - ours.float()).norm(), ours.float().norm()
    # The same product twice, but for the order of an adapter's additions.
    if not error <= max(4 * _coarsest(weight.dtype, ours.dtype, theirs.dtype), 1e-4) * size:
        raise ValueError(
            f"the head of {name} gives logits that differ by {(error / size).item():.3g} of their size from the "
            f"product with its weight: {REFUSED}"
        )


@torch.no_grad()
def check_transform(logits: Any, head: Mapping[str, Any], kept: int, vocabulary: int, name: str) -> None:
    """Raises ValueError unless `logits`, what the model made of probe(vocabulary), are as softcap and logit_scale say.

    kept: how many of its columns the model leaves. It waits once.
    """
    shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != [1, 2, kept]:
        raise ValueError(f"{name} makes {shape} of logits [1, 2, {vocabulary}], and not [1, 2, {kept}]: {REFUSED}")
    expected = probe(vocabulary, logits.device)[..., :kept] * head["logit_scale"]
    if head["softcap"] is not None:
        expected = head["softcap"] * torch.tanh(expected / head["softcap"])
    error = (logits.float() - expected).abs()
    # A few roundings, of values that are multiplied and bounded one by one.
    if not (error <= 4 * _coarsest(logits.dtype, torch.float32) * expected.abs()).all():
        raise ValueError(
            f"{name} makes other logits of its head's than softcap = {head['softcap']} and logit_scale = "
            f"{head['logit_scale']}, which its config gives, up to {error.max().item():.3g} off: {REFUSED}"
        )
