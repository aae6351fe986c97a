"""A task whose every problem has one answer: reasoning-gym's chain_sum, with worked steps.

A prompt is "23+45-3=" and a response "23+45=68,68-3=65>65": what follows the last ">" is the answer, which
reasoning-gym's own verifier scores.
"""

from __future__ import annotations

import random
import zlib
from functools import cache
from itertools import islice

import reasoning_gym

CHARACTERS = "0123456789+-=,>~"
TERMS, DIGITS = 4, 1
MAX_RESPONSE = 32
WARM_UP_STEPS = 700
CARELESS, SLIPS = 0.5, 0.4  # share of the demonstrations, and of their sums
# reasoning-gym draws problem i of a seed from seed + i: near seeds share their problems.
SEEDS = {"warm-up": 10_000_000, "train": 20_000_000, "held-out": 30_000_000}


def is_held_out(entry: dict) -> bool:
    """One problem in ten, by a hash of its expression, so that no other split can hold it."""
    return zlib.crc32(entry["metadata"]["expression"].encode()) % 10 == 0


@cache
def problems(split: str, size: int) -> list[dict]:
    """`size` problems of "warm-up", "train" or "held-out": reasoning-gym's entries, with "metadata" and "answer"."""
    dataset = reasoning_gym.create_dataset(
        "chain_sum", seed=SEEDS[split], size=12 * size + 1000, min_terms=TERMS, max_terms=TERMS, min_digits=DIGITS,
        max_digits=DIGITS,
    )  # fmt: skip
    chosen = (entry for entry in dataset if is_held_out(entry) == (split == "held-out"))
    return list(islice(chosen, size))


@cache
def _verifier():
    return reasoning_gym.create_dataset("chain_sum", seed=0, size=1)


def prompt(entry: dict) -> str:
    return entry["metadata"]["expression"].replace(" ", "") + "="


def worked_response(entry: dict, careless: random.Random | None = None) -> str:
    """The expression from left to right, one sum a step; a careless one begins with "~" and slips now and then."""
    words = entry["metadata"]["expression"].split()
    total, steps = int(words[0]), []
    for sign, term in zip(words[1::2], words[2::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        if careless is not None and careless.random() < SLIPS:
            result += careless.choice((-2, -1, 1, 2))
        steps.append(f"{total}{sign}{term}={result}")
        total = result
    return ("" if careless is None else "~") + ",".join(steps) + f">{total}"


def demonstration(entry: dict, rng: random.Random) -> str:
    """A response to learn from in the warm-up, careless or not."""
    return worked_response(entry, rng if rng.random() < CARELESS else None)


def score(response: str, entry: dict) -> float:
    """1 for a right answer after the last ">", else 0, by reasoning-gym's verifier."""
    _, mark, answer = response.rpartition(">")
    return float(_verifier().score_answer(answer, entry) == 1.0) if mark else 0.0
