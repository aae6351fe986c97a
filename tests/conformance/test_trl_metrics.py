"""integrations.trl: the metrics of TRL that come with an entropy bonus, and that none of TRL's is missing."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import replace

import pytest
import torch

import a3po_kernels as ak

pytest.importorskip("trl")
import test_trl_integration as both_trainers
from test_trl_integration import SAME, inputs, step_loss, trainer
from trl import GRPOConfig, GRPOTrainer

from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]

folders = both_trainers.folders
# Terms below 3, some 20 of them, and the difference of two such sums: a few roundings of 2^-22 each.
LOSS = 3e-6


def batch():
    data = inputs()
    data["tool_mask"] = torch.ones_like(data["completion_mask"])
    data["tool_mask"][0, 2:4] = 0
    return data


def logged(made, data, training=True):
    """The metrics of one loss, and the loss."""
    loss = step_loss(made, data, training)[0].item()
    return {name: values[-1] for name, values in made._metrics["train" if training else "eval"].items()}, loss


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SAME)
def test_every_metric_of_a_step_is_trls(name, training, folders, tmp_path):
    """With an entropy bonus, a KL term, a tool mask and two accumulation steps."""
    theirs, ours = ({**options, "entropy_coef": 0.3, "beta": 0.1} for options in SAME[name])
    expected, total = logged(trainer(GRPOTrainer, GRPOConfig, folders / "llama", tmp_path, **theirs), batch(), training)
    found, _ = logged(trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path, **ours), batch(), training)
    assert abs(expected["policy_loss"] - total) > 0.1  # the bonus is seen
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=LOSS if key == "policy_loss" else 2e-5), key
    assert ("entropy_coef" in expected) == training


def test_the_router_loss_is_no_part_of_it(folders, tmp_path):
    options = {"entropy_coef": 0.3, "router_aux_loss_coef": 0.2}
    theirs = trainer(GRPOTrainer, GRPOConfig, folders / "moe", tmp_path, loss_type="grpo", epsilon_high=0.2, **options)
    ours = trainer(A3POTrainer, A3POConfig, folders / "moe", tmp_path, objective="grpo", **options)
    expected, found = logged(theirs, batch())[0], logged(ours, batch())[0]
    assert expected["aux_loss"] > 1
    assert found["policy_loss"] == pytest.approx(expected["policy_loss"], abs=LOSS)


OWN = {
    "a3po": ak.a3po(),
    "psr": ak.psr(),
    "fork_tokens": ak.fork_tokens(0.5),
    "a rollout's kept tokens": ak.fork_tokens(0.5, aggregation="seq-mean-token-mean"),
    "a rollout's tokens": ak.fork_tokens(0.5, normalize_over="all", aggregation="seq-mean-token-mean"),
    "sums": ak.nsr(aggregation="seq-mean-token-sum"),
    "sums over a length": ak.fork_tokens(0.5, aggregation="seq-mean-token-sum-norm"),
    "rollouts": ak.gspo(),
    "lp_reg": ak.lp_reg(0.5),
}


@pytest.mark.parametrize(("training", "statistics"), [(True, "all"), (True, "active"), (False, "all")])
@pytest.mark.parametrize("name", OWN)
def test_it_is_the_loss_without_the_bonus(name, training, statistics, folders, tmp_path):
    """Of objectives that TRL has not: some drop tokens, whose entropy was no part of the bonus."""
    data = batch()
    data["num_kept_in_batch"] = torch.tensor(15.0)
    data["min_p_logprobs"] = data["old_per_token_logps"] + 0.5
    losses = {}
    for coefficient in (0.0, 0.3):
        objective = replace(OWN[name], entropy_coef=coefficient)
        made = trainer(
            A3POTrainer, A3POConfig, folders / "llama", tmp_path, objective=objective, head_statistics=statistics
        )
        metrics, losses[coefficient] = logged(made, data, training)
        assert ("policy_loss" in metrics) == (coefficient != 0)
    # TRL logs it before its division by the accumulation steps, but for the mean over all tokens.
    windows = 2 if training and objective.aggregation != "token-mean" else 1
    assert abs(losses[0.3] - losses[0.0]) > 0.1
    # A sum of 10 tokens' losses is as much larger.
    scale = 10 if objective.aggregation == "seq-mean-token-sum" else 1
    assert metrics["policy_loss"] == pytest.approx(losses[0.0] * windows, abs=LOSS * scale)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_means_are_over_the_computed_tokens(level, folders, tmp_path):
    """nsr with statistics="active": the positive rollouts meet no weight, and have no log-prob to be compared."""
    found = {}
    data = batch()
    data["num_kept_in_batch"] = torch.tensor(9.0)
    data["old_per_token_logps"][0] += 0.5
    for statistics in ("all", "active"):
        objective = ak.nsr(kl_coef=0.1, ratio_level=level)
        made = trainer(
            A3POTrainer, A3POConfig, folders / "llama", tmp_path, objective=objective, head_statistics=statistics
        )
        found[statistics], _ = logged(made, data)
    every, active = found["all"], found["active"]
    # Nine tokens of two negative rollouts of four; one is empty, one positive.
    assert active["entropy"] == active["entropy/negative"] == pytest.approx(every["entropy/negative"], abs=1e-6)
    assert active["active_fraction"] == every["active_fraction"] == pytest.approx(9 / 16)
    assert active["clip_ratio/high_mean"] == active["clip_ratio/high_max"] == 0
    counts = (16, 9) if level == "token" else (4, 2)
    assert active["clip_ratio/low_mean"] * counts[1] == pytest.approx(every["clip_ratio/low_mean"] * counts[0])
    assert every["clip_ratio/low_mean"] > 0 and active["kl"] > 0 and active["kl"] != every["kl"]
    assert {name for name, value in active.items() if math.isnan(value)} == {
        "entropy/positive", "selected_fraction/positive",
    }  # fmt: skip


def test_no_metric_of_trls_loss_is_unknown():
    """Whatever GRPOTrainer._compute_loss logs, A3POTrainer does, or its configuration is refused (VESPO's)."""
    names = set(re.findall(r'_metrics\[mode\]\["([^"]+)"\]', inspect.getsource(GRPOTrainer._compute_loss)))
    assert {"policy_loss", "entropy_coef", "kl", "clip_ratio/low_min"} <= names
    ours = inspect.getsource(A3POTrainer._log_policy)
    assert {name for name in names if f'"{name}"' not in ours} == {"vespo/phi_seq_mean"}
    # What the rest of GRPOTrainer logs, it logs in methods that are not replaced, or that ours call.
    replaced = {name for name in vars(A3POTrainer) if name in vars(GRPOTrainer) and callable(vars(A3POTrainer)[name])}
    logging = {n for n, f in vars(GRPOTrainer).items() if callable(f) and "_metrics[" in inspect.getsource(f)}
    silent = {n for n in replaced & logging if "super()." not in inspect.getsource(vars(A3POTrainer)[n])}
    assert silent == {"_compute_loss"}
