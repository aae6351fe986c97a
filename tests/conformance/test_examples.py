"""The tasks' prompts, responses and verifiers; the studies of bench.dynamics, which rest on the plain loop."""

from __future__ import annotations

import argparse
import itertools
import random
import re
import statistics
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("reasoning_gym")
import a3po_kernels
from bench import dynamics
from bench.dynamics_studies import STUDIES, Arm, Study
from examples import arithmetic, countdown, small_model
from examples.rollouts import pass_at

pytestmark = pytest.mark.trl
ROOT = Path(__file__).resolve().parents[2]


def test_worked_responses_are_right_and_the_verifier_is_reasoning_gyms():
    tokens = small_model.tokenizer(arithmetic.CHARACTERS)
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
    return tmp_path_factory.mktemp("dynamics")


def test_every_number_of_the_dynamics_page_is_in_its_data():
    """docs/dynamics.md holds the tables that bench.dynamics makes of its rows, to the letter."""
    page = dynamics.PAGE.read_text()
    assert dynamics.with_tables(page) == page
    shown = set(re.findall(r"<!-- (\w+) (\d+) -->", page))
    assert shown == {(name, str(step)) for name, study in STUDIES.items() for step in study.tables}


def test_a_piece_of_dynamics_is_made_once_and_again_the_same(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(dynamics, "RESULTS", tmp_path / "rows.jsonl")
    setting = {**STUDIES["countdown"].setting, "warm_up": 3, "steps": 2, "prompts": 2, "samples": 4, "responses": 5}
    arms = (Arm("lp_reg"), Arm("psr", reward_noise=0.5))
    study = Study("countdown", setting, arms, seeds=1, every=1, tables=(2,))
    other = Study("countdown", setting, (Arm("lp_reg"), Arm("a3po", {"ratio": 0.5})), seeds=2, every=1, tables=(2,))
    monkeypatch.setattr(dynamics, "STUDIES", {"one": study, "other": other})
    assert len(dynamics.missing([study, other])) == 5  # lp_reg of seed 0 is in both
    args = {"folder": folder, "threads": 1, "worker": 0, "workers": 1}
    dynamics.run(argparse.Namespace(study=["one"], **args))
    made = dynamics.rows(study)
    assert [(row["objective"], row["step"]) for row in made] == [(arm.label, step) for arm in arms for step in range(3)]
    assert all({"accuracy", "pass_at_4", "solved_once", "ways", "entropy", "reward"} <= row.keys() for row in made)
    assert [(arm.label, seed) for _, arm, seed in dynamics.missing([study, other])] == [
        ("a3po(ratio=0.5)", 0), ("lp_reg", 1), ("a3po(ratio=0.5)", 1),
    ]  # fmt: skip
    again = dynamics.run_piece(study, arms[1], 0, folder / "countdown-3")
    assert [row["entropy"] for row in again] == [row["entropy"] for row in made[3:]]
    quiet = dynamics.run_piece(study, Arm("psr"), 0, folder / "countdown-3")
    assert quiet[-1]["entropy"] != again[-1]["entropy"]  # the wrong rewards arrive


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_an_arm_is_labelled_by_the_call_that_builds_it(study):
    assert len({arm.label for arm in study.arms}) == len(study.arms)
    for arm in study.arms:
        call = arm.label.split(" + ")[0]
        assert eval(call if "(" in call else call + "()", vars(a3po_kernels)) == arm.objective()


def test_pass_at_k():
    """1 - C(n - c, k) / C(n, k), against all choices of k."""
    for right in range(6):
        drawn = [True] * right + [False] * (5 - right)
        expected = statistics.fmean(any(chosen) for chosen in itertools.combinations(drawn, 3))
        assert pass_at(3, torch.tensor([float(right)]), 5) == pytest.approx(expected, abs=1e-15)


def test_countdown_has_several_right_answers_and_reasoning_gym_scores_them():
    rng, tokens = random.Random(0), small_model.tokenizer(countdown.CHARACTERS)
    ways = []
    for entry in countdown.problems("held-out", 50):
        drawn = {countdown.demonstration(entry, rng) for _ in range(20)}
        assert all(countdown.score(answer, entry) == 1.0 for answer in drawn)
        assert countdown.score(str(entry["metadata"]["target"]), entry) == 0.0  # not of the numbers
        assert max(map(len, drawn)) < countdown.MAX_RESPONSE  # with the end of the response
        ids = tokens(countdown.prompt(entry) + max(drawn), add_special_tokens=False)["input_ids"]
        assert tokens.unk_token_id not in ids
        ways.append(len(drawn))
    assert statistics.median(ways) >= 4
    problems = {
        split: {(*sorted(e["metadata"]["numbers"]), e["metadata"]["target"]) for e in countdown.problems(split, size)}
        for split, size in (("train", 4096), ("held-out", 256), ("warm-up", 4096))
    }
    assert problems["held-out"].isdisjoint(problems["train"] | problems["warm-up"])
