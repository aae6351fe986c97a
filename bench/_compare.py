"""The run that bench_logits and bench_linear share: every provider on every problem, time and peak."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from bench import harness, providers, verdict
from bench.harness import Problem


def peak(problem: Problem, provider: harness.Provider, device: torch.device) -> int:
    """Peak bytes above the inputs of forward + backward, here."""
    batch = provider.prepare(providers.inputs(problem, device))
    return harness.peak_bytes(lambda: step(provider, batch), device)


def step(provider: harness.Provider, batch: dict) -> None:
    provider.forward(providers.leaves(batch)).backward()


def failures(listed: list[harness.Provider], batch: dict, device: torch.device) -> dict[str, str]:
    """Why those cannot run here that cannot: each is tried once, which also compiles and loads what it needs."""
    found = {}
    for provider in listed:
        reason = provider.missing(device)
        if reason is None:
            try:
                provider.forward(providers.leaves(provider.prepare(batch), copy=True)).backward()
            except Exception as error:  # a peer may fail in any way, and the others go on
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        if reason is not None:
            found[provider.name] = reason
    return found


def _peak(problem: Problem, name: str, device: torch.device, threads: int) -> int:
    if device.type == "cpu":
        torch.set_num_threads(threads)
    return peak(problem, providers.named(f"{problem.operation}:{name}"), device)


def peak_in_a_process(problem: Problem, provider: harness.Provider, args: argparse.Namespace) -> int:
    """A CPU's high-water mark is the process's: each measurement gets one of its own."""
    return harness.in_a_process(_peak, problem, provider.name, args.device, args.threads)


def compare(problems: list[Problem], args: argparse.Namespace, repeats: int, path: Path) -> None:
    """Writes the rows of all providers on all problems, after each problem those so far; a table of each on stdout.

    After args.limit seconds no further problem is begun.
    """
    device, end = args.device, time.monotonic() + args.limit
    known = harness.ceilings(device, {problem.dtype for problem in problems}, args.quick)
    rows = []
    for position, problem in enumerate(problems):
        if time.monotonic() > end:
            print(f"\nout of time: {', '.join(map(str, problems[position:]))}")
            break
        listed = providers.table(problem)
        torch.compiler.reset()  # a shape of its own for each, and no limit on how many
        batch = providers.inputs(problem, device)
        skipped = failures(listed, batch, device)
        present = [p for p in listed if p.name not in skipped]
        made = {p.name: partial(providers.leaves, p.prepare(batch), copy=p.inplace) for p in present}
        with tqdm(total=len(present) * repeats, desc=str(problem), leave=False) as bar:
            times = harness.measure(present, made, device, repeats, bar)
        del made
        measure = peak if device.type == "cuda" else None
        peaks = {}
        measured = present if harness.measures_peaks(device) else []
        for provider in tqdm(measured, desc=f"{problem}: memory", leave=False):
            found = measure(problem, provider, device) if measure else peak_in_a_process(problem, provider, args)
            peaks[provider.name] = found / 1e6
        found = harness.make_rows(problem, listed, times, providers.BASELINE, known, device, skipped, peaks)
        print(f"\n{problem}, {harness.device_name(device)}")
        harness.print_rows(found)
        print(verdict.of_times(found, {p.name for p in listed if p.dapo}, known))
        rows += found
        harness.write(rows, path, quiet=position + 1 < len(problems))
