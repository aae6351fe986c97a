"""policy_loss_from_model on wrapped models, on two processes: gradients are those of the joined batch on one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import a3po_kernels as ak

pytest.importorskip("trl")
import tiny
from ranks import on_ranks

from a3po_kernels.integrations.transformers import policy_loss_from_model

pytestmark = pytest.mark.trl

RANKS = 2
# How the model is wrapped, and which model: an untied head that FSDP2 shards by itself, a tied one in the root's group.
WRAPPED = {
    "ddp": "llama", "ddp-unused": "moe", "fsdp2-root": "tied", "fsdp2-head": "llama", "fsdp2-recompute": "bias",
    "fsdp2-root-recompute": "softcap",
}  # fmt: skip
OBJECTIVE = ak.a3po(entropy_coef=0.01)


def wrap(name, model):
    from torch.distributed.fsdp import fully_shard

    if name.startswith("ddp"):
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=name == "ddp-unused")
    for layer in model.model.layers:
        fully_shard(layer)
    if not name.startswith("fsdp2-root"):
        fully_shard(model.lm_head)
    # Told to, the root too drops its weights after forward, and gathers them for backward where that enters its output.
    return fully_shard(model, reshard_after_forward=True if name == "fsdp2-root-recompute" else None)


def work(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This rank's loss and, of the wrapped model, whole gradients; of a second step like the first."""
    rank = dist.get_rank()
    model = wrap(name, tiny.build(WRAPPED[name]))
    batch = tiny.batch(rollouts=4)
    mine = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
    tokens = batch["completion_mask"].sum() / RANKS  # the wrappers average over ranks
    options = {"route": "recompute"} if name.endswith("recompute") else {}
    for _ in range(2):
        out = policy_loss_from_model(model, mine, OBJECTIVE, denominator=tokens, **options)
        out.loss.backward()
        gradients = {
            key.removeprefix("module."): getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
            for key, p in model.named_parameters()
            if p.grad is not None
        }
        model.zero_grad(set_to_none=True)
    return out.loss.detach(), gradients


@pytest.mark.parametrize("name", WRAPPED)
def test_two_ranks_are_one_batch(name):
    ranks = on_ranks(RANKS, work, name)
    model, batch = tiny.build(WRAPPED[name]), tiny.batch(rollouts=4)
    out = policy_loss_from_model(model, batch, OBJECTIVE)
    out.loss.backward()
    expected = tiny.gradients(model)
    torch.testing.assert_close(sum(loss for loss, _ in ranks) / RANKS, out.loss.detach(), atol=1e-6, rtol=1e-5)
    for _, gradients in ranks:
        assert gradients.keys() >= expected.keys()
        for key, gradient in gradients.items():
            reference = expected.get(key, torch.zeros_like(gradient))
            # fp32 sums in another order, relative to the parameter's largest gradient.
            assert (gradient - reference).abs().max() <= 2e-5 * reference.abs().max() + 1e-8, key


def sharded_and_scaled():
    model = tiny.build("multiplied")
    model.logit_scale = 3.0  # the config says .25
    return wrap("fsdp2-root", model)


REFUSED = {sharded_and_scaled: "logit_scale = 0.25"}


def refusals() -> dict[str, str]:
    messages = {}
    for build in REFUSED:
        with pytest.raises(ValueError) as error:
            policy_loss_from_model(build(), tiny.batch(seed=dist.get_rank()), OBJECTIVE)
        messages[build.__name__] = str(error.value)
    return messages


def test_heads_that_are_refused():
    """On every rank at once, so that none waits for another."""
    for messages in on_ranks(RANKS, refusals):
        for build, message in REFUSED.items():
            assert message in messages[build.__name__]
