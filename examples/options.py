"""The options that the demo and the plain loop share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from a3po_kernels.core.checks import did_you_mean
from a3po_kernels.named_objectives import find_preset
from examples.tasks import TASKS

Number = TypeVar("Number", int, float)


def objective_name(text: str) -> str:
    """The name of a preset; the error of another lists them and the nearest."""
    try:
        find_preset(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def task_name(text: str) -> str:
    """The name of a task; the error of another lists them and the nearest."""
    if text in TASKS:
        return text
    hint = did_you_mean(text.lower(), TASKS)
    raise argparse.ArgumentTypeError(f"task must be one of {', '.join(TASKS)}; got {text!r}{hint}")


def above(bound: int, kind: Callable[[str], Number]) -> Callable[[str], Number]:
    """A reader of finite numbers of a kind, int or float, above a bound."""

    def read(text: str) -> Number:
        value = kind(text)
        if not bound < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above {bound}; got {text}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number
    return read


def share(text: str) -> float:
    """A number of 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1]; got {text}")
    return value


def shared_parser(description: str | None, folder: str) -> argparse.ArgumentParser:
    """The options of both, with `folder` as the default of the folder of the runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--objective", type=objective_name, default="a3po", help="a preset of a3po_kernels")
    compared = "trains those that are not there yet from the same seed, and draws their curves in one figure"
    which.add_argument("--compare", type=objective_name, nargs="+", metavar="OBJECTIVE", help=compared)
    parser.add_argument("--task", type=task_name, default="chain_sum", help=" or ".join(TASKS))
    whole, real = above(0, int), above(0, float)
    parser.add_argument("--steps", type=whole, default=120, help="batches of rollouts")
    parser.add_argument("--rate", type=real, default=2e-4, help="learning rate")
    parser.add_argument("--iterations", type=whole, default=1, help="updates on each batch of rollouts")
    parser.add_argument("--seed", type=above(-1, int), default=0)
    parser.add_argument("--threads", type=whole, help="default: by the cores that are idle, at most 4")
    parser.add_argument("--warm-up-steps", type=whole, help="of the model, if it is not there yet")
    parser.add_argument("--folder", type=Path, default=Path(folder), help="of the runs")
    parser.add_argument("--warm-up-folder", type=Path, default=Path("build/warm-up"), help="of warmed-up models")
    return parser


def read(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; of --compare two objectives at least, each once."""
    args = parser.parse_args(arguments)
    if args.compare and (len(args.compare) < 2 or len(set(args.compare)) < len(args.compare)):
        parser.error(f"argument --compare: takes two objectives or more, each once; got {' '.join(args.compare)}")
    return args
