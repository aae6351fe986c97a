"""integrations.megatron under context parallelism: parts of a policy loss on two ranks, against one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from a3po_kernels import Objective, TokenRule, a3po, dapo, gspo, logprob_policy_loss
from a3po_kernels.integrations.megatron import HeadContext, output_processor
from tests.megatron_stand_in import KEYWORDS, OutputLayer
from tests.ranks import on_ranks

V, H, B, S, RANKS = 40, 6, 3, 16, 2
# Most of its choices are among ties, which go to the earlier token.
TIES = Objective(shaping=(TokenRule(metric="ties", ratio=0.4, selected_scale=2.0, rest_scale=0.5),))
LENGTH = Objective(aggregation="seq-mean-token-sum-norm")
OBJECTIVES = {"a3po": a3po(kl_coef=0.1), "gspo": gspo(), "dapo": dapo(), "ties": TIES, "length": LENGTH}
# (objective, where the group comes from, whether packed)
CASES = [(name, "model", False) for name in OBJECTIVES]
CASES += [("ties", "context", False)]
CASES += [(name, where, True) for name in ("ties", "gspo") for where in ("model", "packed_seq_params")]


class Gpt:
    """As much of GPTModel as the processor is told of."""

    def __init__(self, cp: dist.ProcessGroup | None):
        self.pg_collection = SimpleNamespace(cp=cp)

    def compute_language_model_loss(self, *_):
        raise AssertionError("Megatron's loss was called")


def problem() -> dict:
    """The same whole one on every rank."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "hidden": normal(B, S, H), "head": normal(V, H), "labels": torch.randint(0, V, (B, S), generator=g),
        "advantages": torch.tensor([1.0, -0.5, 0.7]).double(), "old": normal(B, S) - 3.0, "ref": normal(B, S) - 3.0,
        "ties": torch.randint(0, 2, (B, S), generator=g).double(), "mask": torch.rand(B, S, generator=g) > 0.3,
    }  # fmt: skip


def columns(rank: int) -> Tensor:
    """Chunks r and 2 cp - 1 - r of 2 cp."""
    chunks = torch.arange(S).chunk(2 * RANKS)
    return torch.cat([chunks[rank], chunks[2 * RANKS - 1 - rank]])


def given(p: dict, flat: bool = False) -> dict:
    """Per-token keywords of a policy loss."""

    def own(name: str) -> Tensor:
        return p[name].reshape(-1) if flat else p[name]

    found = {"old_logprobs": own("old"), "ref_logprobs": own("ref"), "mask": own("mask")}
    return {**found, "scores": {"ties": own("ties")}}


def part(name: str, where: str, packed: bool, groups: dict) -> dict:
    """On a rank: a policy loss of its tokens, scaled in place as Megatron's schedule does."""
    p, own = problem(), columns(dist.get_rank())
    mine = {key: p[key][:, own] for key in ("hidden", "labels", "old", "ref", "ties", "mask")}
    options, params = given(mine, packed), None
    if packed:
        options["cu_seqlens"] = torch.arange(B + 1) * len(own)
        if name == "ties":
            options["positions"] = own.repeat(B)
        mine = {key: value.reshape(1, -1, *value.shape[2:]) for key, value in mine.items()}
        params = SimpleNamespace(cp_group=None, local_cp_size=None)
    if where == "context":
        options["cp_group"] = groups["cp"]
    elif where == "packed_seq_params":
        params = SimpleNamespace(cp_group=groups["cp"], local_cp_size=RANKS)
    hidden = mine["hidden"].transpose(0, 1).clone().requires_grad_()
    layer = OutputLayer(p["head"], None, False)
    layer.tp_group = groups["tp"]
    model = Gpt(groups["cp"] if where == "model" else None)
    keywords = {
        **dict.fromkeys(KEYWORDS), "hidden_states": hidden, "output_layer": layer, "labels": mine["labels"],
        "context": HeadContext(OBJECTIVES[name], p["advantages"], **options), "scale_logits": lambda x: x,
        "compute_language_model_loss": model.compute_language_model_loss, "packed_seq_params": params,
        "config": SimpleNamespace(context_parallel_size=1 if where == "packed_seq_params" else RANKS),
    }  # fmt: skip
    out = output_processor(**keywords)
    loss = out.policy.loss
    loss *= RANKS
    loss.backward()
    dist.all_reduce(layer.weight.grad)
    return {
        "loss": loss.detach() / RANKS, "head": layer.weight.grad / RANKS,
        "hidden": hidden.grad.transpose(0, 1).reshape(B, -1, H) / RANKS,
        "logprobs": out.logprobs.detach().reshape(B, -1), "entropy": out.entropy.detach().reshape(B, -1),
    }  # fmt: skip


def refused(groups: dict) -> list[str]:
    """On a rank: the messages."""
    p = problem()
    config = SimpleNamespace(context_parallel_size=RANKS)

    def call(model: Gpt, columns: int = S, **options) -> str:
        layer = OutputLayer(p["head"], None, False)
        layer.tp_group = groups["tp"]
        try:
            output_processor(**{
                **dict.fromkeys(KEYWORDS), "hidden_states": p["hidden"].transpose(0, 1)[:columns],
                "output_layer": layer, "labels": p["labels"][:, :columns],
                "context": HeadContext(TIES, p["advantages"], **options), "scale_logits": lambda x: x,
                "compute_language_model_loss": model.compute_language_model_loss, "config": config,
            })  # fmt: skip
        except (ValueError, TypeError) as error:
            return str(error)
        return "nothing"

    return [
        call(Gpt(None)), call(Gpt(groups["tp"])), call(Gpt(groups["cp"]), cp_group=groups["tp"]),
        call(Gpt(groups["cp"]), S - 1), call(Gpt(None), cp_group="cp"),
    ]  # fmt: skip


REFUSALS = [
    "a policy loss under context parallelism (2 ranks) needs cp_group in the context: the model tells none",
    "cp_group must hold the 2 context-parallel ranks; got a group of 1",
    "cp_group must hold the 2 context-parallel ranks; got a group of 1",
    "labels [B, S] of Megatron's load balancing have an even S, or need positions; got S = 15",
    "cp_group must be a torch.distributed ProcessGroup or None; got str",
]


def run_all() -> tuple[list[dict], list[str]]:
    alone = [dist.new_group([rank]) for rank in range(RANKS)][dist.get_rank()]
    groups = {"cp": dist.group.WORLD, "tp": alone}
    return [part(*case, groups) for case in CASES], refused(groups)


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(RANKS, run_all)


def whole(name: str) -> dict:
    """The formula on one process."""
    p = problem()
    hidden, head = p["hidden"].clone().requires_grad_(), p["head"].clone().requires_grad_()
    distribution = torch.log_softmax(hidden @ head.t(), -1)
    logprobs = distribution.gather(-1, p["labels"].unsqueeze(-1)).squeeze(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    loss = logprob_policy_loss(
        logprobs, p["advantages"], objective=OBJECTIVES[name], entropy=entropy, **given(p)
    ).loss  # fmt: skip
    loss.backward()
    mask = p["mask"]
    return {
        "loss": loss.detach(), "head": head.grad, "hidden": hidden.grad, "logprobs": logprobs.detach() * mask,
        "entropy": entropy.detach() * mask,
    }  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: " ".join(map(str, CASES[number])))
def test_the_parts_are_the_loss_of_one_process(ranks, number):
    each, expected = [rank[0][number] for rank in ranks], whole(CASES[number][0])
    torch.testing.assert_close(sum(rank["loss"] for rank in each), expected["loss"], rtol=1e-11, atol=1e-11)
    for name in ("hidden", "logprobs", "entropy"):
        for rank, found in enumerate(each):
            torch.testing.assert_close(found[name], expected[name][:, columns(rank)], rtol=1e-11, atol=1e-11)
    for found in each:
        torch.testing.assert_close(found["head"], expected["head"], rtol=1e-11, atol=1e-11)


def test_where_a_token_stands_decides():
    """Without their order the same choices would not be made: blocks in the order of the ranks give another loss."""
    p = problem()
    order = torch.cat([columns(rank) for rank in range(RANKS)])
    moved = {key: value[:, order] if value.shape[:2] == (B, S) else value for key, value in p.items()}

    def loss(q):
        return logprob_policy_loss(q["old"] + 0.1 * q["ref"], q["advantages"], objective=TIES, **given(q)).loss

    assert (loss(p) - loss(moved)).abs() > 1e-3


def test_what_it_cannot_know_is_refused(ranks):
    assert [rank[1] for rank in ranks] == [REFUSALS] * RANKS
