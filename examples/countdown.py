"""A task whose problems have several right answers: reasoning-gym's countdown, four digits and a target.

A prompt is "4,4,9,6:38=" and a response "9*4+6-4": each number once, and reasoning-gym's own verifier scores it.
"""

from __future__ import annotations

import random
import zlib
from functools import cache
from itertools import islice

import reasoning_gym

CHARACTERS = "0123456789+-*(),:="
OPTIONS = {
    "min_numbers": 4, "max_numbers": 4, "min_value": 1, "max_value": 9, "min_target": 10, "max_target": 50,
    "operators": ("+", "-", "*"),
}  # fmt: skip
MAX_RESPONSE = 14
WARM_UP_STEPS = 700
# reasoning-gym draws problem i of a seed from seed + i: near seeds share their problems.
SEEDS = {"warm-up": 40_000_000, "train": 50_000_000, "held-out": 60_000_000}


def _held_out(entry: dict) -> bool:
    """One problem in ten, by a hash of the numbers in any order and the target, so that no other split can hold it."""
    problem = f"{sorted(entry['metadata']['numbers'])}{entry['metadata']['target']}"
    return zlib.crc32(problem.encode()) % 10 == 0


@cache
def problems(split: str, size: int) -> list[dict]:
    """`size` problems of "warm-up", "train" or "held-out": reasoning-gym's entries."""
    dataset = reasoning_gym.create_dataset("countdown", seed=SEEDS[split], size=12 * size + 1000, **OPTIONS)
    chosen = (entry for entry in dataset if _held_out(entry) == (split == "held-out"))
    return list(islice(chosen, size))


@cache
def _verifier():
    return reasoning_gym.create_dataset("countdown", seed=0, size=1, **OPTIONS)


def prompt(entry: dict) -> str:
    return ",".join(map(str, entry["metadata"]["numbers"])) + f":{entry['metadata']['target']}="


def demonstration(entry: dict, rng: random.Random) -> str:
    """A right expression to learn from in the warm-up, any of those that work from left to right, drawn evenly."""
    numbers, target = list(entry["metadata"]["numbers"]), entry["metadata"]["target"]
    # reasoning-gym makes its problems from left to right too: there is one.
    while True:
        rng.shuffle(numbers)
        value, text, is_sum = numbers[0], str(numbers[0]), False
        for number in numbers[1:]:
            sign = rng.choice(OPTIONS["operators"])
            if sign == "*":
                value, text, is_sum = value * number, (f"({text})" if is_sum else text) + f"*{number}", False
            else:
                value, text, is_sum = value + (number if sign == "+" else -number), f"{text}{sign}{number}", True
        if value == target:
            return text


def score(response: str, entry: dict) -> float:
    """1 for an expression of the numbers, each once, that gives the target, else 0, by reasoning-gym's verifier."""
    return float(_verifier().score_answer(response, entry) == 1.0)
