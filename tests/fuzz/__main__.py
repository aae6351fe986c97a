"""Runs many cases in several processes and prints a line for each that is wrong: python -m tests.fuzz --help."""

from __future__ import annotations

import argparse
import sys

from .runner import environment, run, summary, work


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10000, help="in all")
    parser.add_argument("--interpreted", type=float, default=0.2, help="share of the cases in Triton's interpreter")
    parser.add_argument("--case", type=int, help="this one alone, and in this process")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--backend", choices=("torch", "triton"), default="torch", help="of --case")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--most-faults", type=int, default=20, help="ends the run")
    given = parser.parse_args()
    if given.case is not None:
        with environment(given.backend):
            entry, kind, command, fault = work((given.seed, given.case, given.backend))
        print(f"{command}  # {entry}: {fault or kind}")
        return bool(fault)
    interpreted = round(given.cases * given.interpreted)
    cases = {
        "torch": range(given.first, given.first + given.cases - interpreted),
        "triton": range(given.first, given.first + interpreted),
    }
    counted, faults = run(given.seed, cases, given.workers, given.most_faults)
    print(f"{sum(counted.values())} cases of seed {given.seed}: {summary(counted)}")
    for fault in faults:
        print(fault)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
