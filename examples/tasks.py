"""The tasks by name, each a module with

CHARACTERS, MAX_RESPONSE, WARM_UP_STEPS; problems(split, size) of "warm-up", "train" and "held-out"; prompt(entry);
demonstration(entry, rng), a response to learn from in the warm-up; score(response, entry), 0 or 1.
"""

from __future__ import annotations

from examples import arithmetic, countdown

TASKS = {"chain_sum": arithmetic, "countdown": countdown}
