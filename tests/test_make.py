"""What the make targets run, as `make --dry-run` says it: set-ups that speak, and the demo's options."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = (".venv", ".venv-trl", ".venv-verl", ".venv-megatron", ".venv-triton36", ".venv-docs")


# Not the variables of a make that runs these tests.
GIVEN = re.compile(r"MAKE|MFLAGS|PYTHON$|OBJECTIVE|COMPARE|SEED|STEPS|DEMO_ARGS")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not GIVEN.match(name)}


def make(*arguments: str) -> str:
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout


def commands(target: str, *arguments: str) -> list[str]:
    """The commands of a target whose environment is to be made anew (its stamp) or is there (any other)."""
    fresh = ["--always-make"] if target.endswith(".stamp") else [f"--old-file={name}/.stamp" for name in ENVIRONMENTS]
    return make(*fresh, target, *arguments).splitlines()


def test_every_environment_is_here():
    stamps = re.findall(r"^(\.\S+)/\.stamp:", make("--print-data-base", "help"), re.MULTILINE)
    assert set(stamps) == set(ENVIRONMENTS)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_set_up_begins_with_what_it_costs_and_pip_tells_what_it_does(name):
    lines = commands(f"{name}/.stamp")
    assert re.fullmatch(rf'echo "== {re.escape(name)}: .*\d [MG]B .*minute.*"', lines[0])
    installs = [line for line in lines if " pip install " in line]
    assert installs and not any(re.search(r"--quiet|\s-q", line) for line in installs)
    if name != ".venv-docs":
        for at, line in enumerate(lines):
            if " pip install " in line:  # each step has a line of its own before it
                said = lines[at - 1] if "echo" in lines[at - 1] else lines[at - 2]
                assert re.match(rf'echo "== {re.escape(name)}, \d of 4: ', said)


@pytest.mark.parametrize(("target", "module"), [("demo", "examples.demo"), ("train-plain", "examples.train_plain")])
def test_the_demo_and_the_plain_loop_take_the_same_variables(target, module):
    def ran(*arguments: str) -> str:
        return commands(target, *arguments)[-1].partition(module)[2].strip()

    assert ran() == "--objective a3po --seed 0"
    assert ran("OBJECTIVE=dapo", "SEED=2", "STEPS=5", "DEMO_ARGS=--iterations 2") == (
        "--objective dapo --seed 2 --steps 5 --iterations 2"
    )
    assert ran("COMPARE=dapo a3po") == "--compare dapo a3po --seed 0"
