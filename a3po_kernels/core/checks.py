"""The checks and small conversions of tensors that every operation shares."""

from __future__ import annotations

import difflib
import math
import numbers
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .operators import reads_values

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
SIDES = ("low", "high")
SCOPES = ("rollout", "batch", "global")
ROUNDINGS = ("floor", "ceil")
# A log-prob above this many nats is none, whatever it was rounded to: logits of 30 in bf16 are 0.06 apart at most.
ABOVE_ZERO = 0.1


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else is computed in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes agree; torch.compile cannot compare tuples of a number with tuples of a symbolic size."""
    return len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))


def _is_of(value: object, module: str, kind: str) -> bool:
    """Whether it is of a class of a module, which has been imported if it is."""
    if value is None or type(value) in (torch.Tensor, torch.nn.Parameter):
        return False
    found = sys.modules.get(module)
    return found is not None and isinstance(value, getattr(found, kind))


def is_dtensor(value: object) -> bool:
    return _is_of(value, "torch.distributed.tensor", "DTensor")


def is_on_its_way(value: object) -> bool:
    """Whether it is what a collective gives that nobody has waited for, as tensor-parallel layers do."""
    return _is_of(value, "torch.distributed._functional_collectives", "AsyncCollectiveTensor")


def refuse_dtensor(name: str, value: Any) -> None:
    """Raises TypeError for a DTensor: its values here are a part, or are others' too."""
    if is_dtensor(value):
        raise TypeError(
            f"{name} must be a plain tensor; got a DTensor {list(value.placements)}: give its local tensor, what this "
            "rank has of it"
        )


def check_tensor(name: str, tensor: object, shape: tuple[int, ...] | None = None, dtypes=None, device=None) -> None:
    """Raises TypeError or ValueError that names the argument, what it got and what it takes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    refuse_dtensor(name, tensor)
    if dtypes is not None and tensor.dtype not in dtypes:
        takes = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {takes}; got {tensor.dtype}")
    if shape is not None and not same_shape(tensor.shape, shape):
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device}; got {tensor.device}")


def check_floating(name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError for a tensor of integers or bools."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype}")


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known word that is most like one that is not known, for an error; None where none is."""
    near = difflib.get_close_matches(str(word), known, n=1)
    return near[0] if near else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of an error about a word that is not known: a question, or nothing."""
    near = nearest(word, known)
    return f"; did you mean {near!r}?" if near else ""


def check_is_number(name: str, value: object) -> None:
    """Raises TypeError for anything but an int or a float, bools among it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        kind = type(value)
        got = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
        hint = ": give float(...)" if hasattr(value, "__float__") and not isinstance(value, bool) else ""
        raise TypeError(f"{name} must be a number; got {got}{hint}")


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raises TypeError for a non-number, ValueError outside [low, high] (outside (low, high] with `above`)."""
    check_is_number(name, value)
    if not (low < value <= high if above else low <= value <= high) or not -math.inf < value < math.inf:
        bracket = "(" if above else "["
        raise ValueError(f"{name} must be finite and lie in {bracket}{low}, {high}]; got {value}")


def check_word(name: str, value: object, known: Sequence[str]) -> None:
    """Raises ValueError unless value is one of the known words."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def as_tuple(name: str, value: Any, takes: tuple[type, ...]) -> tuple:
    """A sequence of the classes as a tuple; raises TypeError for one alone, or another class."""
    names = " and ".join(kind.__name__ for kind in takes)
    if not isinstance(value, (tuple, list)):
        hint = f": write ({type(value).__name__}(...),)" if isinstance(value, takes) else ""
        raise TypeError(f"{name} must be a tuple of {names}; got {type(value).__name__}{hint}")
    for part in value:
        if not isinstance(part, takes):
            raise TypeError(f"{name} takes {names}; got {type(part).__name__}")
    return tuple(value)


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
    refuse_dtensor("temperature", temperature)
    check_floating("temperature", temperature)
    if temperature.ndim and not same_shape(temperature.shape, rows_shape):
        raise ValueError(f"temperature must be 0-d or of shape {list(rows_shape)}; got {list(temperature.shape)}")
    if temperature.device != device:
        raise ValueError(f"temperature must be on {device}; got {temperature.device}")
    if temperature.requires_grad:
        raise ValueError("temperature must not require a gradient: none is computed for it")


def check_temperature(temperature: object, rows: torch.Tensor, validate: bool) -> None:
    """Raises ValueError for a temperature that is not positive and finite at a row that counts (bool, any shape)."""
    if not isinstance(temperature, torch.Tensor) or not reads_values(temperature, validate):
        return
    bad = ~((temperature > 0) & (temperature < float("inf")))
    bad = bad & (rows if temperature.ndim else rows.any())
    if bool(bad.any()):
        got = temperature[bad][0] if temperature.ndim else temperature
        raise ValueError(f"temperature must be positive and finite; got {got.item()}")


def check_logprobs(name: str, values: torch.Tensor | None, tokens: torch.Tensor | None, validate: bool) -> None:
    """Raises ValueError for a log-prob above 0 beyond rounding at a token (bool, any shape; None: every row is one)."""
    if values is None or not reads_values(values, validate):
        return
    bad = values.detach() > ABOVE_ZERO
    bad = bad if tokens is None else bad & tokens
    if bool(bad.any()):
        raise ValueError(
            f"{name} must be log-probs in nats, at most 0 but for rounding; got {values[bad][0].item():g}: "
            "probabilities need .log(), losses the other sign"
        )


def check_mask_values(name: str, mask: torch.Tensor, validate: bool) -> None:
    """Raises ValueError for a mask that is not of bools, 0 and 1, where values may be read."""
    if mask.dtype == torch.bool or not reads_values(mask, validate):
        return
    strange = mask[(mask != 0) & (mask != 1)]
    if strange.numel():
        value = strange[0].item()
        hint = ""
        if value <= -1e4:
            hint = ": an additive mask says where not to look, and 0 there is a token; give mask == 0"
        elif bool((mask < 0).any()) and bool((mask > 1).any()):
            hint = ": these look like labels; give labels != -100"
        raise ValueError(f"{name} must be bool or hold 0 and 1; got {value}{hint}")


def check_targets_shape(name: str, targets: Any, shape: Sequence[int]) -> None:
    """Raises ValueError for targets with one token a row less than the `name`, which then are not shifted."""
    if not isinstance(targets, torch.Tensor) or targets.ndim != len(shape) or not len(shape):
        return
    if same_shape((*targets.shape[:-1], targets.shape[-1] + 1), shape):
        last = "[:, :-1]" if len(shape) > 1 else " without each rollout's last row"
        raise ValueError(
            f"targets must have shape {list(shape)}; got {list(targets.shape)}, one less: row i of the {name} predicts "
            f"targets[i], the token after it, and the last row predicts none: give {name}{last}"
        )


def check_rows(
    logits: Any, targets: Any, temperature: object, softcap: object, logit_scale: object, *, empty: bool = False
) -> None:
    """All that can be wrong with logits [..., V], targets [...] and the transform, short of their values.

    empty: whether V may be 0.
    """
    check_tensor("logits", logits, dtypes=LOGIT_DTYPES)
    if logits.ndim < 1 or (logits.shape[-1] < 1 and not empty):
        raise ValueError(f"logits must have shape [..., V] with V >= 1; got {list(logits.shape)}")
    if isinstance(targets, torch.Tensor) and logits.ndim == targets.ndim and same_shape(logits.shape, targets.shape):
        raise ValueError(
            f"logits must have a dimension V behind the {targets.ndim} of targets; got {list(logits.shape)} for both: "
            "log-probs of tokens go to logprob_policy_loss"
        )
    shape = targets.shape if isinstance(targets, torch.Tensor) else logits.shape[:-1]
    if not same_shape(shape, logits.shape[:-1]) and same_shape(shape, (logits.shape[0], *logits.shape[2:])):
        raise ValueError(
            f"logits must have V as their last dimension, behind {list(shape)}; got {list(logits.shape)}: "
            "logits.transpose(1, -1) perhaps"
        )
    check_targets_shape("logits", targets, logits.shape[:-1])
    check_tensor("targets", targets, logits.shape[:-1], INDEX_DTYPES, logits.device)
    check_transform(temperature, softcap, logit_scale, targets.shape, logits.device)


def as_rows(logits: torch.Tensor) -> torch.Tensor:
    """Logits of any leading shape as [batch, rows, V]; a copy only where strides allow no view of more than 3 dims."""
    if logits.ndim < 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits if logits.ndim == 3 else logits.reshape(-1, *logits.shape[-2:])


def check_selection(ratio: Any, side: str, scope: str, rounding: str) -> None:
    """Raises ValueError or TypeError unless 0 < ratio <= 1 and the words are known."""
    check_is_number("ratio", ratio)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1]; got {ratio}")
    for name, value, known in (("side", side, SIDES), ("scope", scope, SCOPES), ("rounding", rounding, ROUNDINGS)):
        check_word(name, value, known)
