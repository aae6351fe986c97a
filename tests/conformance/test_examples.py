"""The examples run end to end, briefly; the task's prompts, responses and verifier."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")
from bench import dynamics
from examples import arithmetic

pytestmark = pytest.mark.trl
ROOT = Path(__file__).resolve().parents[2]


def run(*command: str) -> str:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_worked_responses_are_right_and_the_verifier_is_reasoning_gyms():
    tokens = arithmetic.tokenizer()
    careless, wrong = random.Random(0), 0
    for entry in arithmetic.problems("held-out", 50):
        response = arithmetic.worked_response(entry)
        assert arithmetic.score(response, entry) == 1.0
        assert arithmetic.score(response + "1", entry) == 0.0
        assert arithmetic.score(response.replace(">", ","), entry) == 0.0  # no answer was given
        for step in response.split(">")[0].split(","):
            left, result = step.split("=")
            assert eval(left) == int(result)
        ids = tokens(arithmetic.prompt(entry) + response, add_special_tokens=False)["input_ids"]
        assert tokens.unk_token_id not in ids
        wrong += arithmetic.score(arithmetic.worked_response(entry, careless), entry) == 0.0
    assert 20 < wrong < 50


def test_problems_are_held_out():
    """reasoning-gym's datasets of near seeds are the same, shifted: the split must not rest on seeds."""
    train, held_out, warm_up = (
        {arithmetic.prompt(entry) for entry in arithmetic.problems(split, size)}
        for split, size in (("train", 4096), ("held-out", 256), ("warm-up", 400 * 64))
    )
    assert held_out.isdisjoint(train) and held_out.isdisjoint(warm_up)
    assert len(held_out) > 240 and len(warm_up) > 20_000
    # Two draws of 4096 and 25600 among 72000 problems share about a third of the smaller.
    assert len(train & warm_up) < 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


def test_the_demo_writes_its_files(folder):
    common = ("--folder", str(folder), "--warm-up-steps", "3", "--steps", "2")
    out = run("examples.demo", "--objective", "a3po", "--iterations", "2", *common)
    assert "held-out accuracy" in out
    found = {path.name: path.stat().st_size for path in (folder / "a3po").iterdir() if path.is_file()}
    assert found.keys() >= {"summary.json", "metrics.jsonl", "curves.png", "tokens.png"}
    assert min(found["curves.png"], found["tokens.png"]) > 10_000
    summary = json.loads((folder / "a3po" / "summary.json").read_text())
    assert 0 <= summary["after"]["accuracy"] <= 1 and summary["objective"] == "a3po"
    rows = [json.loads(line) for line in (folder / "a3po" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    out = run("examples.train_plain", "--objective", "lp_reg", *common)
    assert "held-out accuracy" in out


def test_the_plain_loop_is_short():
    assert len((ROOT / "examples" / "train_plain.py").read_text().splitlines()) < 150


def test_every_number_of_the_dynamics_page_is_in_its_data():
    """docs/dynamics.md holds the tables that bench.dynamics makes of its rows, to the letter."""
    page = (ROOT / "docs" / "dynamics.md").read_text()
    for step in dynamics.TABLES:
        assert f"After {step} steps:\n\n{dynamics.table(dynamics.rows(), step)}\n" in page


def test_a_piece_of_dynamics(folder, monkeypatch):
    if not (folder / "warm-up").exists():
        pytest.skip("needs the demo's model")
    monkeypatch.setattr(dynamics, "SETTING", {**dynamics.SETTING, "steps": 2, "prompts": 2, "samples": 4})
    monkeypatch.setattr(dynamics, "EVERY", 1)
    rows = dynamics.run_piece("lp_reg", 0, folder / "warm-up")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all({"accuracy", "standard_error", "entropy", "length", "reward", "seconds"} <= row.keys() for row in rows)
    again = dynamics.run_piece("lp_reg", 0, folder / "warm-up")
    assert [row["entropy"] for row in again] == [row["entropy"] for row in rows]
