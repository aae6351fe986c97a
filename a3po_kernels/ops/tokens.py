"""The N-sized arguments of a loss, read in one launch; what its tokens are divided by; the weights that rules give."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import choose
from ..core.checks import compute_dtype
from ..core.forms import RuleForm
from ..core.operators import plainly


class ReadTokens(NamedTuple):
    """Flat [N], 0 where no token is; counts [S].

    targets: int64, ignore_index where no token is; tokens: bool; rollout: int32; advantages, polarity, importance, and
    weights, the factor of the token's polarity: in the statistics' dtype.
    """

    targets: Tensor | None
    tokens: Tensor
    rollout: Tensor
    advantages: Tensor
    polarity: Tensor
    importance: Tensor | None
    weights: Tensor
    counts: Tensor


def _empty_reading(offsets: Tensor, count: int, dtype: torch.dtype, present: tuple[bool, bool, bool]) -> list[Tensor]:
    def empty(kind: torch.dtype, there: bool = True, size: int = count) -> Tensor:
        return torch.empty(size if there else 0, dtype=kind, device=offsets.device)

    targets, polarity, importance = present
    return [
        empty(torch.int64, targets), empty(torch.bool), empty(torch.int32), empty(dtype), empty(dtype, polarity),
        empty(dtype, importance), empty(dtype), empty(dtype, size=offsets.shape[0] - 1),
    ]  # fmt: skip


@torch.library.custom_op("a3po::read_tokens", mutates_args=())
def _read_tokens(
    targets: Tensor | None, mask: Tensor | None, offsets: Tensor, advantages: Tensor, polarity: Tensor | None,
    importance: Tensor | None, count: int, per_rollout: list[bool], polarity_weights: list[float], ignore_index: int,
    dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of ReadTokens; empty where there is none."""
    present = (targets is not None, polarity is not None, importance is not None)
    out = _empty_reading(offsets, count, dtype, present)
    into: list[Tensor | None] = list(out)
    for at, there in zip((0, 4, 5), present, strict=True):
        if not there:
            into[at] = None
    choose(backend, offsets.device).read_tokens(
        targets, mask, offsets, advantages, polarity, importance, tuple(per_rollout), tuple(polarity_weights),
        ignore_index, tuple(into),
    )  # fmt: skip
    return tuple(out)  # type: ignore[return-value]


@_read_tokens.register_fake
def _(targets, mask, offsets, advantages, polarity, importance, count, per_rollout, polarity_weights, ignore, dtype, _):
    present = (targets is not None, polarity is not None, importance is not None)
    return tuple(_empty_reading(offsets, count, dtype, present))


_read_plainly = plainly(_read_tokens)


def read_tokens(
    targets: Tensor | None, mask: Tensor | None, offsets: Tensor, count: int, dtype: torch.dtype, advantages: Tensor,
    polarity: Tensor | None, importance: Tensor | None, per_rollout: list[bool],
    polarity_weights: tuple[float, float, float], ignore_index: int, backend: str,
) -> ReadTokens:  # fmt: skip
    """Reads flat [N] targets (None: every row is one) and mask, and values per token [N] or per rollout [S].

    per_rollout: of advantages, polarity (their sign is it if None) and importance; polarity_weights: of positive,
    negative and neutral tokens.
    """

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().reshape(-1).contiguous()

    polarity = None if polarity is None else flat(polarity)
    found = _read_plainly(
        flat(targets), flat(mask), offsets, flat(advantages), polarity, flat(importance), count, per_rollout,
        list(polarity_weights), ignore_index, dtype, backend,
    )  # fmt: skip
    read = ReadTokens(*found)
    return read._replace(
        targets=None if targets is None else read.targets,
        polarity=read.advantages if polarity is None else read.polarity,
        importance=None if importance is None else read.importance,
    )


@torch.library.custom_op("a3po::normalizer", mutates_args=())
def _normalizer(
    counts: Tensor, total: str, per_rollout: bool, tensor: Tensor | None, divisor: float, max_length: float,
    backend: str,
) -> Tensor:  # fmt: skip
    given = divisor if tensor is None else tensor
    return choose(backend, counts.device).normalizer(counts, total, per_rollout, given, max_length)


@_normalizer.register_fake
def _(counts, *_):
    return torch.empty_like(counts)


_normalize_plainly = plainly(_normalizer)


def normalizer(
    counts: Tensor, aggregation: str, denominator: Tensor | float | None, max_length: float, backend: str
) -> Tensor:
    """1 / (what a token's loss is divided by), per rollout [S]: 0 where that is 0, NaN where it is no divisor.

    counts: [S], each one's tokens.
    """
    if denominator is not None:
        total = "given"
    elif aggregation == "token-mean":
        total = "tokens"
    else:
        total = "lengths" if aggregation == "seq-mean-token-sum-norm" else "rollouts"
    tensor = denominator if isinstance(denominator, Tensor) else None
    divisor = float(denominator) if tensor is None and denominator is not None else 0.0
    return _normalize_plainly(
        counts, total, aggregation == "seq-mean-token-mean", tensor, divisor, float(max_length), backend
    )  # fmt: skip


@torch.library.custom_op("a3po::count_kept", mutates_args=())
def _count_kept(weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return choose(backend, weights.device).count_kept(weights, offsets)


@_count_kept.register_fake
def _(weights, offsets, _):
    return weights.new_empty(offsets.shape[0] - 1)


_count_plainly = plainly(_count_kept)


def count_kept(weights: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """[S]: tokens of each rollout whose weight is not 0, in the weights' dtype."""
    return _count_plainly(weights, offsets, backend)


@torch.library.custom_op("a3po::apply_rules", mutates_args=())
def _apply_rules(
    weights: Tensor, polarity: Tensor, offsets: Tensor, metrics: list[Tensor], words: list[int], numbers: list[float],
    scales: list[Tensor], backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(weights, selected). Of each rule, words: polarity, high, ceil, tensor scale; numbers: ratio, rest, scale."""
    rules, tensors = [], iter(scales)
    for at, metric in enumerate(metrics):
        polarity_word, high, ceil, is_tensor = words[4 * at : 4 * at + 4]
        ratio, rest, number = numbers[3 * at : 3 * at + 3]
        rule_scale = next(tensors) if is_tensor else number
        rules.append(RuleForm(metric, polarity_word, bool(high), bool(ceil), ratio, rule_scale, rest))
    return choose(backend, weights.device).apply_rules(weights, polarity, offsets, rules)


@_apply_rules.register_fake
def _(weights, *_):
    return torch.empty_like(weights), torch.empty_like(weights, dtype=torch.bool)


_apply_plainly = plainly(_apply_rules)


def apply_rules(
    weights: Tensor, polarity: Tensor, offsets: Tensor, rules: list[RuleForm], backend: str
) -> tuple[Tensor, Tensor]:
    """Multiplies weights [N] by the rules' factors in the order given; selected: bool [N], by any of them."""
    words, numbers, scales = [], [], []
    for rule in rules:
        tensor = isinstance(rule.scale, Tensor)
        words += [rule.polarity, int(rule.high), int(rule.ceil), int(tensor)]
        numbers += [float(rule.ratio), float(rule.rest), 0.0 if isinstance(rule.scale, Tensor) else float(rule.scale)]
        if isinstance(rule.scale, Tensor):
            scales.append(rule.scale)
    metrics = [rule.metric.detach().to(compute_dtype(weights.dtype)).contiguous() for rule in rules]
    return _apply_plainly(weights, polarity, offsets, metrics, words, numbers, scales, backend)


def walks_batch(count: int, device: torch.device, backend: str) -> bool:
    """Whether a backend's apply_rules takes `count` tokens as one segment."""
    return count <= choose(backend, device).LONGEST_SEGMENT
