"""Runs by name: where one is kept, what it is made of, and several of them in one figure."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from a3po_kernels import Objective, TokenRule
from examples import figures

# What a run is made of: one that is there is taken again if these are the same.
SETTINGS = ("task", "steps", "rate", "iterations", "seed", "warm_up_steps", "reward_noise")


@dataclass
class Trained:
    """The rows of a training, as they are written and with the names that figures knows; evaluations around it."""

    rows: list[dict]
    history: list[dict]
    before: dict
    after: dict
    device: str


def run_folder(args: argparse.Namespace, objective: str) -> Path:
    """OBJECTIVE-seedSEED, below the folder of the task where that is not chain_sum."""
    folder = args.folder if args.task == "chain_sum" else args.folder / args.task
    return folder / f"{objective}-seed{args.seed}"


def settings(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)}


def renamed(row: dict, names: dict[str, str], objective: Objective) -> dict:
    """The values that figures draws, by its names: those that the row has, and β where a rule selects tokens."""
    found = {ours: row[theirs] for ours, theirs in names.items() if row.get(theirs) is not None}
    if not any(isinstance(rule, TokenRule) for rule in objective.shaping):
        found.pop("beta", None)
    return {"step": row["step"], **found}


def kept(folder: Path, args: argparse.Namespace) -> figures.Run | None:
    """The run of these settings that a folder holds, if it does."""
    if not (folder / "summary.json").exists():
        return None
    summary = json.loads((folder / "summary.json").read_text())
    if summary["settings"] != settings(args):
        print(f"{folder} holds a run with other options: it is trained anew")
        return None
    history = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    print(f"{folder} is there: {said(summary)}")
    return figures.Run(summary["objective"], history, summary["before"], summary["after"])


def said(summary: dict) -> str:
    before, after = summary["before"], summary["after"]
    return (
        f"held-out accuracy, sampled: {before['accuracy']:.3f} -> {after['accuracy']:.3f} (standard error "
        f"{after['standard_error']:.3f}); greedy: {before['greedy_accuracy']:.3f} -> {after['greedy_accuracy']:.3f}; "
        f"{summary['seconds']} s"
    )


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def made(folder: Path, args: argparse.Namespace, objective: str, train: Callable[..., Trained]) -> figures.Run:
    """Trains, and writes metrics.jsonl, curves.jsonl, curves.png and, last of all, summary.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    start, spent = time.perf_counter(), time.process_time()
    found = train(args, objective, folder)
    run = figures.Run(objective, found.history, found.before, found.after)
    (folder / "metrics.jsonl").write_text(_lines(found.rows))
    (folder / "curves.jsonl").write_text(_lines(found.history))
    figures.draw_curves([run], f"{objective}, seed {args.seed}: {args.task}", folder / "curves.png")
    summary = {
        "objective": objective, "settings": settings(args), "before": found.before, "after": found.after,
        "seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - spent, 1),
        "device": found.device,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(said(summary))
    print(f"see {', '.join(sorted(str(path) for path in folder.glob('*.png')))}")
    return run


def run_all(args: argparse.Namespace, train: Callable[..., Trained]) -> None:
    """The run of --objective; or those of --compare that are not there yet, and their curves in one figure.

    train(args, objective, folder) gives what it Trained.
    """
    if not args.compare:
        made(run_folder(args, args.objective), args, args.objective, train)
        return
    runs = []
    for objective in args.compare:
        folder = run_folder(args, objective)
        runs.append(kept(folder, args) or made(folder, args, objective, train))
    path = run_folder(args, "-".join(args.compare)).with_suffix(".png")
    figures.draw_curves(runs, f"{args.task}, seed {args.seed}", path)
    print(f"see {path}")
