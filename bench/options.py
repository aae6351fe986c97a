"""The options that the benchmarks share: device, repeats, where the rows go, and a shape of one's own.

Rows go to build/bench/<device>/. Those that are committed, in bench/results/<device>/, are written with --save alone,
and never from a quick run or from one at another shape than the benchmark's own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import providers
from bench.harness import ROOT, Problem, results_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Option -> field of a Problem.
SHAPE = {"rows": "rows", "vocab": "vocabulary", "hidden": "hidden", "dtype": "dtype", "active": "active_fraction"}


def arguments(description: str | None, rows: bool = True, timed: bool = True) -> argparse.ArgumentParser:
    """The options of a benchmark that writes rows of times; of one without rows, or whose rows hold no times, fewer."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--quick", action="store_true", help="one small problem, few repeats")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch, on a CPU")
    if rows and timed:
        parser.add_argument("--repeats", type=int, help="measured calls")
        parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which nothing is begun")
    if rows:
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--folder", type=Path, help="where the rows go; default build/bench/<device>")
        where.add_argument("--save", action="store_true", help="to bench/results/<device>, over the committed rows")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer; got {text}")
    return int(text)


def _dtype(text: str) -> torch.dtype:
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(DTYPES)}; got {text}")
    return DTYPES[text]


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must lie in (0, 1]; got {text}")
    return share


def add_shape(parser: argparse.ArgumentParser, hidden: bool) -> None:
    """The sizes of one problem; what is not given is that of the benchmark's first."""
    shape = parser.add_argument_group("a shape of your own", "what is not given is as in the first of its problems")
    shape.add_argument("--rows", type=_count, help="tokens N")
    shape.add_argument("--vocab", type=_count, help="V")
    if hidden:
        shape.add_argument("--hidden", type=_count, help="H")
    shape.add_argument("--dtype", type=_dtype, help=f"of logits, hidden states and weight: {', '.join(DTYPES)}")
    shape.add_argument("--active", type=_share, help="share of the rollouts with an advantage, in (0, 1]")


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """Field of a Problem -> what the options say of it."""
    options = vars(args)
    return {field: options[name] for name, field in SHAPE.items() if options.get(name) is not None}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, settled; exits with a message where two contradict each other."""
    args = parser.parse_args(argv)
    if vars(args).get("save"):
        if args.quick:
            parser.error("--save keeps whole runs: leave out --quick, or name a --folder")
        if shape_of(args):
            parser.error("--save keeps the benchmark's own problems: for a shape of your own name a --folder")
    return settle(args)


def settle(args: argparse.Namespace) -> argparse.Namespace:
    """Sets torch's threads, and the folder where none was given."""
    if args.device.type == "cpu":
        torch.set_num_threads(args.threads)
    if "folder" in args and args.folder is None:
        results = results_folder(args.device)
        args.folder = results if args.save else ROOT / "build" / "bench" / results.name
    return args


def chosen(parser: argparse.ArgumentParser, args: argparse.Namespace, own: Iterable[Problem]) -> list[Problem]:
    """The benchmark's own problems, or the first of them in the shape that was given."""
    listed, given = list(own), shape_of(args)
    return [fitting(parser, replace(listed[0], **given))] if given else listed


def fitting(parser: argparse.ArgumentParser, problem: Problem) -> Problem:
    """The problem, where its rollouts have equal lengths and its share of them is whole; else exits with a message."""
    rollouts = providers.rollouts(problem.rows)
    active = problem.active_fraction * rollouts
    if abs(active - round(active)) > 1e-6 or round(active) == 0:
        parser.error(
            f"argument --active: {problem.rows} rows are {rollouts} rollouts, of which a share must be a whole number; "
            f"got {problem.active_fraction}, take {max(round(active), 1) / rollouts:g}, or rows that 10 divides"
        )
    return problem
