"""What a function of a batch's tokens reads: a CustomSurrogate's loss, a rule's metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.segments import segment_sum
from .batch import TokenBatch


def check_result(what: str, found: Any, shape: torch.Size) -> Tensor:
    """What a function of the tokens gave; raises ValueError unless it is a floating-point tensor [N]."""
    if not isinstance(found, Tensor) or found.shape != shape or not found.dtype.is_floating_point:
        got = f"{list(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{what} must give a floating-point tensor [N] = {list(shape)}; got {got}")
    return found


class TokenValues:
    """What a function of a batch's tokens reads: flat [N], in the statistics' dtype, 0 where a row is no token.

    An attribute that the caller gave nothing for raises ValueError when it is read.
    """

    def __init__(
        self, mask: Tensor, rollout: Tensor, offsets: Tensor, counts: Tensor, given: Mapping[str, Tensor | None]
    ):
        self.mask = mask
        self.read: set[str] = set()
        self.scores: Mapping[str, Tensor] = {}
        self.step: Any = 0
        self.join: Callable[[Tensor], Tensor] = lambda sums: sums  # with those of ranks that hold the same rollouts
        self._rollout, self._offsets, self._counts, self._given = rollout, offsets, counts, given

    @classmethod
    def of(
        cls, batch: TokenBatch, weights: Tensor, selected: Tensor | None, logprobs: Tensor | None,
        entropy: Tensor | None,
    ) -> TokenValues:  # fmt: skip
        """Those of a batch at weights [N]; logprobs, entropy: the current policy's, where they may be read."""
        old = batch.old
        if old is None and logprobs is not None:
            old = logprobs.detach()
        given = {
            "logprobs": logprobs, "entropy": entropy, "old_logprobs": old, "ref_logprobs": batch.reference,
            "old_entropy": batch.old_entropy, "advantages": batch.advantages * weights, "weights": weights,
            "polarity": batch.polarity.sign(), "position": batch.position,
            "rollout": batch.rollout.long(),
            "selected": torch.zeros_like(batch.tokens) if selected is None else selected,
        }  # fmt: skip
        values = cls(batch.tokens, batch.rollout.long(), batch.offsets, batch.counts, given)
        values.scores, values.step, values.join = batch.scores, batch.step, batch.join
        return values

    def _value(self, name: str) -> Tensor:
        self.read.add(name)
        value = self._given.get(name)
        if value is None:
            raise ValueError(f"a function of the batch's tokens reads {name}, which was not given, or is not known yet")
        return self._at_tokens(value)

    @property
    def logprobs(self) -> Tensor:
        """Of the current policy (nats), differentiable."""
        return self._value("logprobs")

    @property
    def old_logprobs(self) -> Tensor:
        """Of the behaviour policy; the current ones, without a gradient, on-policy."""
        return self._value("old_logprobs")

    @property
    def ref_logprobs(self) -> Tensor:
        return self._value("ref_logprobs")

    @property
    def entropy(self) -> Tensor:
        """Of the current policy (nats), differentiable."""
        return self._value("entropy")

    @property
    def advantages(self) -> Tensor:
        """Shaped: the weights are in them."""
        return self._value("advantages")

    @property
    def weights(self) -> Tensor:
        return self._value("weights")

    @property
    def polarity(self) -> Tensor:
        return self._value("polarity")

    @property
    def selected(self) -> Tensor:
        """Bool: selected by any TokenRule."""
        return self._value("selected")

    @property
    def old_entropy(self) -> Tensor:
        """Of the behaviour policy."""
        return self._value("old_entropy")

    @property
    def rollout(self) -> Tensor:
        """int64: the number of each one's rollout."""
        return self._value("rollout")

    @property
    def position(self) -> Tensor:
        """int64: the place in its rollout."""
        return self._value("position")

    @property
    def log_ratio(self) -> Tensor:
        """logprobs - old_logprobs."""
        return self.logprobs - self.old_logprobs

    @property
    def ratio(self) -> Tensor:
        """exp(log_ratio), of the log ratio clamped to +-20."""
        return self.log_ratio.clamp(-20.0, 20.0).exp()

    def _at_tokens(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, torch.zeros_like(values))

    def rollout_sum(self, values: Tensor) -> Tensor:
        """[N]: at each row the sum over its rollout's tokens."""
        return self.join(segment_sum(self._at_tokens(values), self._offsets))[self._rollout]

    def rollout_mean(self, values: Tensor) -> Tensor:
        """[N]: at each row the mean over its rollout's tokens."""
        return self.rollout_sum(values) / self._counts.clamp(min=1.0)[self._rollout]

    def batch_sum(self, values: Tensor) -> Tensor:
        """[]: the sum over the batch's tokens."""
        return self.join(self._at_tokens(values).sum())

    def batch_mean(self, values: Tensor) -> Tensor:
        """[]: the mean over the batch's tokens."""
        return self.batch_sum(values) / self.join(self.mask.sum()).clamp(min=1)
