"""Plants one small error at a time and asks whether the tests notice: python -m tests.mutation --help.

Each mutant is tried in a process of its own, by the fuzz and then by the tests that TESTS names for its file, until one
of them fails. Results are kept below build/mutation, a line each; what is there is not tried again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {"torch": ("losses", "ops", "backends/torch"), "triton": ("backends/triton",)}
FUZZ_SEED, FUZZ_CASES = 2, {"torch": 400, "triton": 150}
SECONDS = 90
# Of a file, or of a folder; the fuzz goes before all of them.
TESTS = {
    "losses/advantages.py": "test_reference_loss.py test_errors.py",
    "losses/batch.py": "test_errors.py test_policy_loss.py::test_empty_padded test_row_plan.py",
    "losses/linear.py": "test_errors.py test_row_plan.py test_linear_routes.py",
    "losses/logits.py": "test_errors.py test_routes.py test_autograd.py",
    "losses/logprobs.py": "test_errors.py test_logprob_policy_loss.py test_autograd.py",
    "losses/one_pass.py": "test_linear_routes.py test_row_plan.py test_routes.py",
    "losses/rows.py": "test_row_plan.py test_linear_policy_loss.py::test_overrides",
    "losses/stages.py": "test_shaping.py test_autograd.py test_policy_loss.py",
    "losses/custom.py": "test_custom_surrogate.py",
    "losses/token_values.py": "test_custom_surrogate.py",
    "losses/shaping.py": "test_shaping.py test_policy_loss.py test_new_rules.py test_rules_and_routes.py",
    "losses/ratio_weights.py": "test_new_objectives.py test_new_rules.py",
    "losses/denominator.py": "test_data_parallel.py",
    "losses/ranks.py": "test_data_parallel.py test_context_parallel.py",
    "losses/rollout_correction.py": "test_rollout_correction.py",
    "ops/linear_head.py": "test_linear_token_logprobs.py test_linear_routes.py test_memory.py",
    "ops/linear_token_logprobs.py": "test_linear_token_logprobs.py test_errors.py test_linear_routes.py",
    "ops/linear_min_p.py": "test_linear_routes.py test_linear_token_logprobs.py test_errors.py",
    "ops/select_tokens.py": "test_select_tokens.py test_errors.py",
    "ops": "test_pieces.py test_errors.py test_autograd.py test_routes.py test_token_logprobs.py",
    "backends/torch/selection.py": "test_select_tokens.py test_shaping.py test_invariance.py",
    "backends/torch/statistics.py": "test_merge_statistics.py test_token_logprobs.py test_invariance.py",
    "backends/torch/policy_terms.py": "test_policy_loss.py test_routes.py",
    "backends/torch/rows.py": "test_token_logprobs.py test_invariance.py",
    "backends": "test_pieces.py test_token_logprobs.py test_routes.py test_invariance.py",
    "backends/triton": "test_pieces.py test_merge_statistics.py test_select_tokens.py",  # the quick ones
}


def files(group: str) -> list[str]:
    folders = [ROOT / "a3po_kernels" / folder for folder in GROUPS[group]]
    found = [path for folder in folders for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    return [str(path.relative_to(ROOT / "a3po_kernels")) for path in found]


def tests_of(file: str) -> list[str]:
    names = [file, *(str(parent) for parent in Path(file).parents)]
    return [f"tests/{test}" for test in next(TESTS[name] for name in names if name in TESTS).split()]


def sample(group: str, count: int, seed: int) -> list[Mutant]:
    every = [m for file in files(group) for m in mutants(file, (ROOT / "a3po_kernels" / file).read_text())]
    return random.Random(seed).sample(every, min(count, len(every)))


def _fuzz(group: str) -> str:
    """What the fuzz finds first, or nothing."""
    import torch

    from tests.fuzz.judge import run_case

    torch.set_num_threads(1)
    for index in range(FUZZ_CASES[group]):
        verdict = run_case(FUZZ_SEED, index, group)
        if verdict.fault:
            return f"fuzz case {index}: {verdict.fault.strip().splitlines()[-1]}"[:200]
    return ""


def _try(mutant: Mutant, group: str, folder: Path, pipe: Any) -> None:
    """In a process of its own: sends what the fuzz finds with the mutant in the package, else which test fails."""
    package = folder / "a3po_kernels"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "a3po_kernels", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / mutant.file).write_text(mutant.source)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    with open(folder / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            import a3po_kernels

            assert Path(a3po_kernels.__file__).parent == package, "not the mutant's package"
            noticed = _fuzz(group)
        except Exception as error:
            noticed = f"import: {error!r}"[:200]
        pipe.send(noticed)
        if noticed:
            return
        import pytest

        for test in tests_of(mutant.file):
            arguments = [test, "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:randomly"]
            code = pytest.main([*arguments, "-m", "interpreter" if group == "triton" else "not slow"])
            assert code != pytest.ExitCode.USAGE_ERROR, test
            if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                pipe.send(test)
                return


def try_mutant(mutant: Mutant, group: str, folder: Path) -> str:
    """What noticed a mutant; "" if nothing did within SECONDS."""
    fork = multiprocessing.get_context("fork")
    mine, its = fork.Pipe(duplex=False)
    process = fork.Process(target=_try, args=(mutant, group, folder, its))
    process.start()
    its.close()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    said = []  # by the fuzz, and then by a test, if one noticed
    while mine.poll():
        try:
            said.append(mine.recv())
        except EOFError:
            break
    if not said:
        # Past SECONDS in the fuzz is a loop without an end; the tests may merely be slow.
        return f"the fuzz did not end, exit code {process.exitcode}"
    return said[-1]


def _key(mutant: Mutant) -> str:
    return hashlib.sha256(f"{mutant.name}\n{mutant.source}".encode()).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="mutants, drawn from all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--group", choices=tuple(GROUPS), default="torch")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="starts no mutant after these")
    given = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    if given.group == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    # Imported before any fork, so that no mutant waits for them.
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import triton  # noqa: F401

    import reference  # noqa: F401

    torch.set_num_threads(1)
    folder = ROOT / "build" / "mutation" / given.group
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder.parent / f"{given.group}.jsonl"
    known = {}
    if kept.exists():
        known = {record["key"]: record for record in map(json.loads, kept.read_text().splitlines())}
    chosen = sample(given.group, given.count, given.seed)
    records = []
    with tqdm(chosen, desc="mutants", unit="mutant") as bar, kept.open("a") as lines:
        for mutant in bar:
            record = known.get(_key(mutant))
            if record is None:
                if bar.format_dict["elapsed"] > given.seconds:
                    continue
                noticed = try_mutant(mutant, given.group, folder)
                record = {"key": _key(mutant), "mutant": mutant.name, "killed": bool(noticed), "by": noticed}
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                if not noticed:
                    bar.write(f"survived  {mutant.name}")
            records.append(record)
    survivors = sorted(record["mutant"] for record in records if not record["killed"])
    by_fuzz = sum(record["by"].startswith("fuzz") for record in records)
    killed = len(records) - len(survivors)
    print(f"{len(records)} of {len(chosen)} mutants tried: {killed} killed, {by_fuzz} of them by the fuzz")
    for name in survivors:
        print(f"survived  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
