"""Functions of a batch's tokens: metrics of rules, and built-in surrogates written by hand for a CustomSurrogate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

# --- metrics; what they give is judged apart, and which token is selected by what the package's gave ---


def covariance(t):
    return (t.advantages - t.batch_mean(t.advantages)) * (t.logprobs - t.batch_mean(t.logprobs))


def surprise(t):
    return t.rollout_mean(t.logprobs) - t.logprobs


def drift(t):
    return t.log_ratio.abs() + 0.1 * t.entropy


def from_reference(t):
    return t.logprobs - t.ref_logprobs


def second_choice(t):
    return t.log_ratio.abs() - 100.0 * t.selected.to(t.log_ratio.dtype)


def scored(t):
    return t.scores["noise"] * t.weights - t.ratio + t.polarity * t.rollout_sum(t.logprobs)


def places(t):
    return ((t.position * 7 + t.rollout * 11) % 13).to(t.weights.dtype) + t.polarity


def old_surprise(t):
    return t.old_logprobs * t.polarity


def noise_of_the_others(t):
    return 2.0 * t.scores["noise"] - 8.0 * t.selected.to(t.weights.dtype)


CURRENT = (covariance, surprise, drift, from_reference, second_choice, scored)
# Exact in any precision: what they select must be known before the call.
OLD = (places, old_surprise, noise_of_the_others)
READS: dict[Callable, str] = {drift: "entropy", from_reference: "ref_logprobs", old_surprise: "old_logprobs"}

# --- surrogates ---


def written_clip(t):
    return torch.maximum(-t.advantages * t.ratio, -t.advantages * t.ratio.clamp(0.8, 1.28))


def written_reinforce(t):
    return -t.advantages * t.logprobs


def written_ratio(t):
    return -t.advantages * t.ratio + 0.3 * t.log_ratio.abs()


def written_gspo(t):
    ratio = t.rollout_mean(t.log_ratio).clamp(-20.0, 20.0).exp()
    return torch.maximum(-t.advantages * ratio, -t.advantages * ratio.clamp(0.8, 1.2))


# Of each the built-in surrogate and its fields, and whether a token's loss depends on its rollout.
WRITTEN: dict[Callable, tuple[str, dict[str, float]]] = {
    written_clip: ("Clip", {"epsilon_low": 0.2, "epsilon_high": 0.28}), written_reinforce: ("Reinforce", {}),
    written_ratio: ("Ratio", {"penalty": 0.3}), written_gspo: ("Clip", {}),
}  # fmt: skip
OF_ONE_TOKEN = (written_clip, written_reinforce, written_ratio)

# --- what the package's metrics gave ---


class Recorded:
    """A metric that keeps what it gave of each token, by its rollout and place."""

    def __init__(self, metric: Callable[[Any], Tensor]):
        self.metric = metric
        self.given: dict[tuple[int, int], float] = {}

    def __call__(self, t):
        found = self.metric(t)
        places = zip(t.rollout[t.mask].tolist(), t.position[t.mask].tolist(), strict=True)
        self.given.update(zip(places, found[t.mask].double().tolist(), strict=True))
        return found


class Given:
    """The reference's metric, which gives the package's values; `want` holds what it would have given."""

    def __init__(self, metric: Callable[[Any], Tensor], recorded: Recorded, candidates: bool):
        self.metric, self.given, self.candidates = metric, recorded.given, candidates
        self.seen = self.want = self.got = None

    def __call__(self, t):
        self.seen, self.want = t, self.metric(t)
        self.got = self.want.clone()
        for row, place in enumerate(zip(t.rollout.tolist(), t.position.tolist(), strict=True)):
            if place in self.given and t.mask[row]:
                value = self.given[place]
                # Of Clip-Cov: the package gives -1 where the reference gives -inf.
                self.got[row] = -torch.inf if self.candidates and value < 0 else value
        return self.got


def record(objective: Any) -> tuple[Any, list[Recorded | None]]:
    """An objective that keeps what its rules' functions give, and those, one for each part of the shaping."""
    kept = [Recorded(part.metric) if callable(getattr(part, "metric", None)) else None for part in objective.shaping]
    if not any(kept):
        return objective, kept
    shaping = tuple(
        part if mine is None else replace(part, metric=mine) for part, mine in zip(objective.shaping, kept, strict=True)
    )
    return replace(objective, shaping=shaping), kept


def give(objective: Any, kept: list[Recorded | None], candidates: bool) -> tuple[Any, list[Given]]:
    """The reference's objective, whose functions give what was kept, and those functions."""
    given = [
        None if mine is None else Given(part.metric, mine, candidates)
        for part, mine in zip(objective.shaping, kept, strict=True)
    ]
    if not any(given):
        return objective, []
    shaping = tuple(
        part if mine is None else replace(part, metric=mine)
        for part, mine in zip(objective.shaping, given, strict=True)
    )
    return replace(objective, shaping=shaping), [mine for mine in given if mine is not None]
