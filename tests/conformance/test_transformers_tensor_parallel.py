"""policy_loss_from_model on models whose head is split over tensor-parallel ranks, FSDP2 on top or not, equals one
process: loss, log-probs and every gradient."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import a3po_kernels as ak

pytest.importorskip("trl")
import tiny

from a3po_kernels.integrations.transformers import (
    check_head,
    min_p_logprobs_from_model,
    policy_loss_from_model,
    token_logprobs_from_model,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.ranks import on_ranks

pytestmark = pytest.mark.trl

OBJECTIVE = ak.a3po(entropy_coef=0.01)
# How the model is split, and which model it is. "plan": transformers' own; the others: PyTorch's styles on the head,
# whose logits stay split or are gathered. On four ranks FSDP2 is on top: on the head by itself, or in the root's group.
SPLIT = {
    2: {"plan": "llama", "plan-tied": "tied", "plan-softcap": "softcap", "split": "bias", "split-dtensor": "llama",
        "gathered": "divided"},
    4: {"plan-fsdp2": "llama", "plan-tied-fsdp2": "tied", "gathered-fsdp2": "bias", "split-fsdp2-root": "llama"},
}  # fmt: skip
NAMES = [(ranks, name) for ranks, names in SPLIT.items() for name in names]


def split(name: str, kind: str, mesh: Any, folder: str) -> torch.nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    if name.startswith("plan"):
        from transformers import AutoModelForCausalLM
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_size=2, fsdp_size=mesh.size(0))
        path = f"{folder}/{kind}"
        return AutoModelForCausalLM.from_pretrained(path, distributed_config=config, dtype=torch.float32).eval()
    model = tiny.build(kind)
    layout = Replicate() if name.startswith("gathered") else Shard(-1)
    style = ColwiseParallel(output_layouts=layout, use_local_output=name != "split-dtensor")
    parallelize_module(model, mesh["tp"], {"lm_head": style})
    if "fsdp2" in name:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        if not name.endswith("root"):
            fully_shard(model.lm_head, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


def one(name: str, kind: str, mesh: Any, folder: str) -> dict[str, Any]:
    model, batch = split(name, kind, mesh, folder), tiny.batch(rollouts=4)
    shares = 1
    if "fsdp2" in name:
        rank, shares = mesh["dp"].get_local_rank(), 2
        mine = {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}
    else:
        check_head(model)
        mine = batch
    tokens = batch["completion_mask"].sum() / shares  # FSDP2 averages over its ranks
    losses = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        out = policy_loss_from_model(model, mine, OBJECTIVE, denominator=tokens)
        out.loss.backward()
        losses.append(out.loss.detach())
    gradients = {key: getattr(p.grad, "full_tensor", lambda p=p: p.grad)()
                 for key, p in model.named_parameters() if p.grad is not None}  # fmt: skip
    assert hasattr(model.get_output_embeddings().weight.grad, "placements")
    with torch.no_grad():
        stats = token_logprobs_from_model(model, mine)
        proxy = min_p_logprobs_from_model(model, mine, 0.1)
    return {"losses": losses, "gradients": gradients, "logprobs": out.logprobs.detach(), "again": stats.logprobs,
            "entropy": stats.entropy, "proxy": proxy}  # fmt: skip


def refused(mesh: Any) -> dict[str, str]:
    """A head that was tied again after FSDP2 had wrapped the embedding: in its forward it has a shard alone."""
    from torch.distributed.fsdp import fully_shard

    model = tiny.build("tied")
    model.lm_head.weight = fully_shard(model.model.embed_tokens, mesh=mesh["dp"]).weight
    messages = {}
    try:
        policy_loss_from_model(model, tiny.batch(), OBJECTIVE)
    except ValueError as error:
        messages["tied"] = str(error)
    return messages


def work(folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("dp", "tp"))
    found: dict[str, Any] = {name: one(name, kind, mesh, folder) for name, kind in SPLIT[ranks].items()}
    return {**found, "refused": refused(mesh) if ranks == 4 else None}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for ranks, name in NAMES:
        if name.startswith("plan"):
            tiny.build(SPLIT[ranks][name]).save_pretrained(folder / SPLIT[ranks][name])
    return functools.cache(lambda ranks: on_ranks(ranks, work, str(folder)))


@functools.cache
def expected(kind: str) -> dict[str, Any]:
    model, batch = tiny.build(kind), tiny.batch(rollouts=4)
    out = policy_loss_from_model(model, batch, OBJECTIVE)
    out.loss.backward()
    gradients = tiny.gradients(model)
    with torch.no_grad():
        stats, proxy = token_logprobs_from_model(model, batch), min_p_logprobs_from_model(model, batch, 0.1)
    return {"loss": out.loss.detach(), "gradients": gradients, "logprobs": out.logprobs.detach(),
            "again": stats.logprobs, "entropy": stats.entropy, "proxy": proxy}  # fmt: skip


@pytest.mark.parametrize(("ranks", "name"), NAMES)
def test_split_heads_equal_one_process(results, ranks, name):
    whole, parts = expected(SPLIT[ranks][name]), [each[name] for each in results(ranks)]
    for i, part in enumerate(parts):
        mine = slice(None) if "fsdp2" not in name else slice(2 * (i // 2), 2 * (i // 2) + 2)
        for key in ("logprobs", "again", "entropy", "proxy"):
            torch.testing.assert_close(part[key], whole[key][mine], atol=2e-5, rtol=1e-5)
        assert part["gradients"].keys() == whole["gradients"].keys()
        for key, gradient in part["gradients"].items():
            reference = whole["gradients"][key]
            assert (gradient - reference).abs().max() <= 2e-5 * reference.abs().max() + 1e-8, key
    for i in range(2):
        mean = sum(part["losses"][i] for part in parts) / ranks
        torch.testing.assert_close(mean, whole["loss"], atol=1e-6, rtol=1e-5)


def test_a_shard_is_refused(results):
    for each in results(4):
        assert "FSDP2's shard" in each["refused"]["tied"]
