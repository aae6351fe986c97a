"""The peers that the benchmarks measure on a CPU compute what "eager" computes: a ratio of times is one of equals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
from bench import providers
from bench.harness import Problem

pytestmark = pytest.mark.trl
PROBLEM = Problem("linear", 40, 300, 16)


@pytest.mark.parametrize(
    "name",
    ["TRL head", "TRL head, 8192 columns", "Liger chunked GRPO", "Liger scaled cross entropy, fallback"],
)
def test_a_peer_gives_eagers_loss_and_gradients(name):
    if name.startswith("Liger"):
        pytest.importorskip("liger_kernel")
    batch = providers.inputs(PROBLEM, torch.device("cpu"))

    def run(provider):
        inputs = providers.leaves(provider.prepare(batch))
        loss = provider.forward(inputs)
        return loss.detach(), *torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"]])

    expected = run(providers.named(f"linear:{providers.BASELINE}"))
    for found, right in zip(run(providers.named(f"linear:{name}")), expected, strict=True):
        # Sums of 300 or fewer fp32 products in another order.
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def call(*arguments: str) -> subprocess.CompletedProcess:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, *arguments], cwd=root, capture_output=True, text=True)


def test_trls_kernels_need_nothing_of_trl_but_their_files():
    code = """
import sys
from bench import trl_kernels
made = [trl_kernels.load(name).__file__ for name in ("chunked_logprob", "logprob_entropy")]
assert not {"trl", "datasets", "accelerate"} & set(sys.modules), "the whole chain was imported"
from trl.kernels import chunked_logprob, logprob_entropy
assert made == [chunked_logprob.__file__, logprob_entropy.__file__]
"""
    ran = call("-c", code)
    assert ran.returncode == 0, ran.stderr


def test_both_trainers_take_their_steps_and_give_one_loss(tmp_path):
    ran = call("-m", "bench.bench_trainer", "--device", "cpu", "--folder", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "trainer.jsonl").read_text().splitlines()]
    assert [row["trainer"] for row in rows] == [
        "GRPOTrainer, dapo", "A3POTrainer, dapo", "A3POTrainer, a3po", "difference"
    ]  # fmt: skip
    assert all(len(row["step_ms"]) == len(row["loss_ms"]) == 3 and min(row["tokens"]) > 0 for row in rows[:-1])
    assert rows[0]["losses"] == pytest.approx(rows[1]["losses"], rel=1e-3)
    assert rows[2]["losses"] != pytest.approx(rows[0]["losses"], rel=1e-3), "a3po weighs tokens otherwise"
    assert rows[-1]["equal"] and rows[-1]["losses"][0] != 0
