"""integrations.verl with a head that is split over two ranks, through verl's own modules for Megatron."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("verl")

from megatron_stand_in import Model
from ranks import on_ranks, refused
from verl_on_megatron import OldModel, load, put_in_place

pytestmark = pytest.mark.verl

V, H, S, TEMPERATURE = 40, 16, 12, 0.7
SPLITS = list(itertools.product([False, True], [True, False]))  # tied, sequence parallel


def problem() -> dict:
    g = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    whole = {"embedding": normal(V, H), "body": normal(H, H) / 4, "head": normal(V, H)}
    ids, labels = torch.randint(0, V, (2, 1, S), generator=g)
    return {"whole": whole, "ids": ids, "labels": labels, "factors": normal(2, S), "hidden": normal(S, 1, H)}


def part(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()].clone()


def total(p: dict, logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    assert logprobs.shape == entropy.shape == (S,)
    return (logprobs * p["factors"][0] + entropy * p["factors"][1]).sum()


def the_function(p: dict) -> dict:
    """linear_cross_entropy, called as verl's Megatron modules call it; and verl's own functions of split logits."""
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    from verl.utils.megatron import tensor_parallel

    torch._dynamo.config.disable = True  # verl compiles a product
    hidden, weight = p["hidden"].clone().requires_grad_(), part(p["whole"]["head"]).requires_grad_()
    weight.grad_added_to_main_grad = True  # of Megatron's data parallelism, after a fused backward
    found = linear_cross_entropy(hidden, weight, p["labels"], TEMPERATURE, "none", dist.group.WORLD)
    assert weight.zero_out_wgrad
    total(p, *found).backward()
    sums = [linear_cross_entropy(hidden, weight, p["labels"], TEMPERATURE, name, dist.group.WORLD)[0].detach()
            for name in ("sum", "mean")]  # fmt: skip

    logits = (hidden.detach()[:, 0] @ weight.detach().t() / TEMPERATURE).requires_grad_()
    entropy = tensor_parallel.vocab_parallel_entropy(logits)
    entropy.sum().backward()
    own = hidden.detach().clone().requires_grad_()
    linear_cross_entropy(own, weight.detach(), p["labels"], TEMPERATURE, "none", dist.group.WORLD)[1].sum().backward()
    return {
        "logprobs": found[0].detach(), "entropy": found[1].detach(), "hidden": hidden.grad, "weight": weight.grad,
        "reduced": sums, "their entropy": entropy.detach(), "of entropy": own.grad[:, 0],
        "their gradient": logits.grad @ weight.detach() / TEMPERATURE,
    }  # fmt: skip


def the_processor(p: dict, module, tied: bool, split: bool) -> dict:
    """fused_output_processor, called as Megatron-Core 0.18 does."""
    model = Model(p["whole"], tied, split)
    context = module.FusedOutputProcessorContext(temperature=TEMPERATURE)
    output = model(
        p["ids"], p["labels"], output_processor=module.fused_output_processor, output_processor_context=context
    )
    assert type(output) is module.CausalLMOutputForPPO
    assert output.hidden_states.shape == (S // 2 if split else S, 1, H) and output.logits is None
    total(p, output.log_probs, output.entropy).backward()
    return {"logprobs": output.log_probs.detach(), "entropy": output.entropy.detach(), **model.gradients()}


def the_old_forward(p: dict, module, tied: bool, split: bool) -> dict:
    """_fused_GPTModel_forward, bound as patch_fused_forward binds it."""
    hidden = (part(p["hidden"]) if split else p["hidden"].clone()).requires_grad_()
    model = OldModel(part(p["whole"]["head"]), tied, split)
    model.forward = module._fused_GPTModel_forward.__get__(model, OldModel)
    output = model(p["ids"], None, None, decoder_input=hidden, labels=p["labels"], temperature=TEMPERATURE)
    total(p, output.log_probs, output.entropy).backward()
    return {
        "logprobs": output.log_probs.detach(), "entropy": output.entropy.detach(), "hidden": hidden.grad,
        "weight": model.weight.grad,
    }  # fmt: skip


def run_all() -> dict:
    put_in_place()
    import a3po_kernels.integrations.verl as integration

    p, module = problem(), load("model_forward_fused")  # after the integration, as with verl's hook
    integration.install_head()
    integration.install_head()
    assert module.linear_cross_entropy is integration.linear_cross_entropy
    overlap = load("model_forward_1f1b_overlap").gptmodel_forward_1f1b_overlap
    bare = SimpleNamespace(config=SimpleNamespace(tensor_model_parallel_size=2, sequence_parallel=False))
    rows = {"labels": p["labels"].view(2, -1), "context": None, "config": None, "hidden_states": None}
    logged = []
    module.has_config_logger_enabled = lambda config: True
    module.log_config_to_disk = lambda config, payload, prefix: logged.append((sorted(payload), prefix))
    processors = [the_processor(p, module, *split) for split in SPLITS]
    return {
        "function": the_function(p), "processor": processors, "logged": logged,
        "old": [the_old_forward(p, module, *split) for split in SPLITS],
        "function after": the_function(p),
        "refused": [refused(lambda: overlap(bare)), refused(lambda: module.fused_output_processor(**rows))],
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(2, run_all)


def formula(p: dict, hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, 1, H] and [V, H] to log-probs and entropies [S]."""
    distribution = torch.log_softmax(hidden[:, 0] @ weight.t() / TEMPERATURE, -1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    return distribution.gather(-1, p["labels"].view(-1, 1))[:, 0], entropy


def head_expected() -> dict:
    """Of the head alone, on one process."""
    p = problem()
    hidden, weight = p["hidden"].clone().requires_grad_(), p["whole"]["head"].clone().requires_grad_()
    found = formula(p, hidden, weight)
    total(p, *found).backward()
    return {"logprobs": found[0].detach(), "entropy": found[1].detach(), "hidden": hidden.grad, "weight": weight.grad}


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["function", "function after"])
def test_the_function_leaves_each_rank_its_part_of_the_hidden_gradient(ranks, name):
    each, expected = [rank[name] for rank in ranks], head_expected()
    for key in ("logprobs", "entropy"):
        close(each[0][key], expected[key])
        assert torch.equal(each[0][key], each[1][key])
    close(each[0]["hidden"] + each[1]["hidden"], expected["hidden"])
    assert not torch.allclose(each[0]["hidden"], expected["hidden"], rtol=1e-2)
    close(torch.cat([rank["weight"] for rank in each]), expected["weight"])
    close(torch.stack(each[0]["reduced"]), torch.stack([expected["logprobs"].sum(), expected["logprobs"].mean()]))


def test_entropy_and_its_gradient_are_those_of_verls_split_logits(ranks):
    for rank in ranks:
        close(rank["function"]["entropy"], rank["function"]["their entropy"])
        close(rank["function"]["of entropy"], rank["function"]["their gradient"])


@pytest.mark.parametrize("number", range(len(SPLITS)))
def test_the_processor_sums_the_hidden_gradient_once(ranks, number):
    tied, _ = SPLITS[number]
    p = problem()
    leaves = {name: x.requires_grad_() for name, x in p["whole"].items()}
    hidden = torch.tanh(leaves["embedding"][p["ids"]] @ leaves["body"]).transpose(0, 1)
    found = formula(p, hidden, leaves["embedding" if tied else "head"])
    total(p, *found).backward()
    each = [rank["processor"][number] for rank in ranks]
    for rank in each:
        close(rank["logprobs"], found[0].detach())
        close(rank["entropy"], found[1].detach())
        close(rank["body"], leaves["body"].grad)
    for name in ("embedding",) if tied else ("embedding", "head"):
        close(torch.cat([rank[name] for rank in each]), leaves[name].grad)


@pytest.mark.parametrize("number", range(len(SPLITS)))
def test_the_old_forward_sums_the_hidden_gradient_once(ranks, number):
    _, split = SPLITS[number]
    each, expected = [rank["old"][number] for rank in ranks], head_expected()
    for rank in each:
        close(rank["logprobs"], expected["logprobs"])
        close(rank["entropy"], expected["entropy"])
    hidden = [rank["hidden"] for rank in each]
    for got in [torch.cat(hidden)] if split else hidden:
        close(got, expected["hidden"])
    close(torch.cat([rank["weight"] for rank in each]), expected["weight"])


def test_what_verls_loggers_get(ranks):
    names = ["attention_mask", "decoder_input", "entropy", "input_ids", "logprobs", "position_ids"]
    assert ranks[0]["logged"] == [(names, "input_and_logits")] * 2 * len(SPLITS)  # ours as their old forward


def test_what_is_refused(ranks):
    overlap, rows = ranks[0]["refused"]
    assert "needs sequence_parallel=True" in overlap
    assert rows == "labels must be one packed row [1, S], as verl's; got [2, 6]"

