"""The entries on a model in DistributedDataParallel: under each of its options, gradients are eager's under them."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

import a3po_kernels as ak

pytest.importorskip("trl")
import tiny
from ranks import on_ranks
from test_transformers_distributed import RANKS
from test_transformers_integration import assert_same_gradients, completion_logits, logits_loss

from a3po_kernels.integrations.transformers import policy_loss_from_model, token_logprobs_from_model

pytestmark = pytest.mark.trl

STEPS, MICRO_BATCHES = 3, 2
OBJECTIVE = ak.a3po(entropy_coef=0.01)
OPTIONS = {
    "default": {},
    "unused": {"find_unused_parameters": True},
    "unused-view": {"find_unused_parameters": True, "gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "static-view": {"static_graph": True, "gradient_as_bucket_view": True},
    "static-buffers": {"static_graph": True, "broadcast_buffers": False},
    "static-softcap": {"static_graph": True},
    "static-reentrant": {"static_graph": True},
    "default-accumulated": {},
    "unused-accumulated": {"find_unused_parameters": True},
    "static-accumulated": {"static_graph": True},
}


def own_loss(logprobs, entropy, batch):
    """A loss that a user makes of log-probs and entropies."""
    mask = batch["completion_mask"]
    return ((entropy * 0.1 - logprobs * batch["advantages"][:, None]) * mask).sum() / mask.sum()


def from_logits(model, batch):
    logits, targets = completion_logits(model, batch)
    logp = torch.log_softmax(logits, -1)
    return own_loss(logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1), batch)


LOSSES = {
    "eager": lambda model, batch: logits_loss(model, batch, OBJECTIVE).loss,
    "one-pass": lambda model, batch: policy_loss_from_model(model, batch, OBJECTIVE, route="one-pass").loss,
    "recompute": lambda model, batch: policy_loss_from_model(model, batch, OBJECTIVE, route="recompute").loss,
    "eager-own": from_logits,
    "own": lambda model, batch: own_loss(*token_logprobs_from_model(model, batch), batch),
}


def wrapped(name):
    model = tiny.build("softcap" if name.endswith("softcap") else "llama")
    if "find_unused_parameters" in OPTIONS[name] or "static_graph" in OPTIONS[name]:
        model.spare = torch.nn.Parameter(torch.zeros(3))
    if name.endswith("reentrant"):
        model.train().gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    return torch.nn.parallel.DistributedDataParallel(model, **OPTIONS[name])


def steps(rank, name, loss):
    """This rank's gradients of each optimizer step."""
    model = wrapped(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    taken = []
    for step in range(STEPS):
        # A static graph is recorded in the first backward, which torch wants with a reduction.
        count = MICRO_BATCHES if name.endswith("accumulated") and step else 1
        for micro in range(count):
            batch = tiny.batch(seed=RANKS * (MICRO_BATCHES * step + micro) + rank)
            with nullcontext() if micro == count - 1 else model.no_sync():
                LOSSES[loss](model, batch).backward()
        taken.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    return taken


def every_case() -> dict:
    return {(n, loss): steps(dist.get_rank(), n, loss) for n in OPTIONS for loss in LOSSES}


@pytest.fixture(scope="module")
def gradients():
    """By rank, options and loss: of each step. Two processes go through them all, since starting them takes longest."""
    return on_ranks(RANKS, every_case)


@pytest.mark.parametrize("loss", ["one-pass", "recompute", "own"])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_eagers(name, loss, gradients):
    reference = "eager-own" if loss == "own" else "eager"
    for step in range(STEPS):
        first, second = (ranks[name, loss][step] for ranks in gradients)
        assert all(torch.equal(first[key], second[key]) for key in first), "the ranks differ"
        # Steps add up rounding: the weights differ a little from the second on.
        assert_same_gradients(first, gradients[0][name, reference][step], rounding=2e-5 * (1 + step))


# -- the trainer ------------------------------------------------------------------------------------------------------


def train(folder: str) -> list[torch.Tensor]:
    from test_trl_integration import parameters, trained
    from trl import GRPOConfig, GRPOTrainer

    from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer

    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost"}
    # torch cannot record a static graph in a backward without a reduction, as accumulation begins with.
    both = {"ddp_static_graph": True, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    options = {**both, "loss_type": "dapo", "epsilon_high": 0.28}
    theirs = trained(GRPOTrainer, GRPOConfig, f"{folder}/model", f"{folder}/{rank}", **options)
    options = {**both, "objective": "dapo"}
    ours = trained(A3POTrainer, A3POConfig, f"{folder}/model", f"{folder}/{rank}", **options)
    return [parameters(made) for made in (theirs, ours)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_trainer_with_a_static_graph(tmp_path):
    """Its weights are TRL's after three steps, on both ranks."""
    tiny.build().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    before = torch.cat([p.detach().flatten() for p in tiny.build().parameters()])
    (theirs, ours), (_, second) = on_ranks(RANKS, train, str(tmp_path))
    moved = (theirs - before).abs().max()
    assert moved > 1e-4
    assert torch.equal(ours, second), "the ranks differ"
    assert (ours - theirs).abs().max() <= 3e-5 * max(1.0, moved)
