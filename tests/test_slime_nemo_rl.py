"""integrations.slime and nemo_rl: their functions of split logits and heads against the formula, on two ranks."""

from __future__ import annotations

import inspect
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from a3po_kernels.integrations import nemo_rl, slime
from tests.ranks import on_ranks, refused

V, H, B, T = 40, 6, 3, 8


def problem() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    keep = torch.rand(T, V, generator=g) > 0.7
    keep[3], keep[5, : V // 2] = False, False  # rows of which a rank keeps nothing, or the token alone
    return {
        "logits": 2 * normal(T, V), "tokens": torch.randint(0, V, (T,), generator=g), "factors": normal(2, T),
        "keep": keep, "hidden": normal(T, B, H), "weight": normal(V, H),
        "ids": torch.randint(0, V, (B, T), generator=g), "grad": normal(B, T - 1),
    }  # fmt: skip


def part(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


ENTROPY = ((False, True), (True, True), (True, False))  # wanted, with a gradient
SLIME = [(keep, *entropy) for keep in (False, True) for entropy in ENTROPY]


def run_slime(keep: bool, entropy: bool, grad: bool) -> dict:
    p = problem()
    logits = part(p["logits"], 1).requires_grad_()
    mask = part(p["keep"], 1) if keep else None
    found = slime.calculate_log_probs_and_entropy(
        logits, p["tokens"], dist.group.WORLD, with_entropy=entropy, log_prob_keep_mask=mask, with_entropy_grad=grad
    )
    assert found[0].shape == (T, 1) and (found[1] is None) is (not entropy)
    loss = (found[0].squeeze(-1) * p["factors"][0]).sum()
    if entropy:
        assert found[1].requires_grad is grad
        loss = loss + (found[1] * p["factors"][1]).sum()
    loss.backward()
    return {"logprobs": found[0][:, 0].detach(), "entropy": found[1] if entropy else None, "logits": logits.grad}


def slime_formula(keep: bool, entropy: bool, grad: bool) -> dict:
    p = problem()
    logits = p["logits"].clone().requires_grad_()
    rows = torch.arange(T)
    kept = p["keep"].clone() if keep else torch.ones(T, V, dtype=torch.bool)
    kept[rows, p["tokens"]] = True
    logprobs = logits[rows, p["tokens"]] - torch.logsumexp(logits.masked_fill(~kept, -torch.inf), -1)
    distribution = torch.log_softmax(logits if grad else logits.detach(), -1)
    expected = -(distribution.exp() * distribution).sum(-1)
    loss = (logprobs * p["factors"][0]).sum() + entropy * (expected * p["factors"][1]).sum()
    loss.backward()
    return {"logprobs": logprobs.detach(), "entropy": expected if entropy else None, "logits": logits.grad}


class Reloadable(dist.ProcessGroup):
    """slime's ReloadableProcessGroup: a group of its own rank and size, without a name, around the real one."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self.group = group

    def __getattr__(self, name: str):
        return getattr(self.group, name)


def run_wrapped() -> dict:
    p = problem()
    logits, keep = part(p["logits"], 1).requires_grad_(), part(p["keep"], 1)
    found = slime.calculate_log_probs_and_entropy(
        logits, p["tokens"], Reloadable(dist.group.WORLD), True, log_prob_keep_mask=keep
    )
    ((found[0].squeeze(-1) * p["factors"][0]).sum() + (found[1] * p["factors"][1]).sum()).backward()
    return {"logprobs": found[0][:, 0].detach(), "entropy": found[1].detach(), "logits": logits.grad}


def run_nemo(**options) -> dict:
    p, rank = problem(), dist.get_rank()
    hidden, weight = part(p["hidden"]).requires_grad_(), part(p["weight"]).requires_grad_()
    rows = len(weight)
    out = nemo_rl.from_parallel_hidden_states_to_logprobs(
        hidden, weight, None, p["ids"], rank * rows, (rank + 1) * rows, dist.group.WORLD, **options
    )
    if options.get("inference_only"):
        assert not out.requires_grad
        return {"logprobs": out}
    (out * p["grad"]).sum().backward()
    return {"logprobs": out.detach(), "hidden": hidden.grad, "weight": weight.grad}


def run_all() -> dict:
    p, world = problem(), dist.group.WORLD
    logits, hidden, weight = part(p["logits"], 1), part(p["hidden"]), part(p["weight"])
    rows, rank = len(weight), dist.get_rank()

    def nemo(first: int = rank * rows, gather: bool | None = None, **options):
        return nemo_rl.from_parallel_hidden_states_to_logprobs(
            hidden, weight, gather, p["ids"], first, first + rows, world, **options
        )

    empty = slime.calculate_log_probs_and_entropy(logits[:0], p["tokens"][:0], world, with_entropy=True)
    return {
        "slime": [run_slime(*case) for case in SLIME], "wrapped": run_wrapped(), "empty": [x.shape for x in empty],
        "nemo": [run_nemo(**options) for options in ({}, {"chunk_size": 2}, {"inference_only": True})],
        "refused": [refused(call) for call in (
            lambda: slime.calculate_log_probs_and_entropy(logits, p["tokens"], world, chunk_size=4),
            lambda: slime.calculate_log_probs_and_entropy(logits, p["tokens"], None),
            lambda: nemo(cp_group=world), lambda: nemo(gather=True), lambda: nemo(first=rank * rows + 1),
        )],
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(2, run_all)


def check(each: list[dict], expected: dict, split: dict[str, int]) -> None:
    for name, value in expected.items():
        parts = [rank[name] for rank in each]
        if name in split:
            parts = [torch.cat(parts, split[name])]
        for got in parts:
            assert (got is None) is (value is None)
            if value is not None:
                torch.testing.assert_close(got, value, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("number", range(len(SLIME)))
def test_slime(ranks, number):
    check([rank["slime"][number] for rank in ranks], slime_formula(*SLIME[number]), {"logits": 1})


def test_slime_in_the_group_that_slime_hands_over(ranks):
    check([rank["wrapped"] for rank in ranks], slime_formula(True, True, True), {"logits": 1})


def test_slime_without_a_group_on_one_process():
    p = problem()
    logprobs, entropy = slime.calculate_log_probs_and_entropy(p["logits"], p["tokens"], None, True, -1, p["keep"])
    expected = slime_formula(True, True, True)
    torch.testing.assert_close(logprobs[:, 0], expected["logprobs"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(entropy, expected["entropy"], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kept", "entropy", "passes"), [(False, True, 1), (True, False, 1), (True, True, 2)])
def test_slime_reads_the_logits_no_more_often_than_there_are_distributions(kept, entropy, passes):
    p = problem()
    with mock.patch.object(slime, "token_logprobs", wraps=slime.token_logprobs) as called:
        slime.calculate_log_probs_and_entropy(p["logits"], p["tokens"], None, entropy, -1, p["keep"] if kept else None)
    assert called.call_count == passes


def test_slime_gives_a_flat_log_prob_for_no_rows(ranks):
    assert ranks[0]["empty"] == [(0,), (0,)]


@pytest.mark.parametrize("number", range(3))
def test_nemo_rl(ranks, number):
    p = problem()
    hidden, weight = p["hidden"].requires_grad_(), p["weight"].requires_grad_()
    distribution = torch.log_softmax((hidden @ weight.t()).transpose(0, 1), -1)[:, :-1]
    logprobs = distribution.gather(-1, p["ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
    (logprobs * p["grad"]).sum().backward()
    expected = {"logprobs": logprobs.detach(), "hidden": hidden.grad, "weight": weight.grad}
    each = [rank["nemo"][number] for rank in ranks]
    check(each, {name: expected[name] for name in each[0]}, {"hidden": 0, "weight": 0})


def test_what_is_refused(ranks):
    for rank, found in enumerate(ranks):
        chunks, none, context, gather, start = found["refused"]
        assert "chunk_size must be -1" in chunks and "runtime_gather_output must not" in gather
        assert "tp_group must be a group" in none
        assert context == "cp_group must have one rank, as in NeMo-RL; got 2"
        first, rows = rank * V // len(ranks), V // len(ranks)
        assert start.endswith(f"must be {first} and {first + rows}, this rank's equal part; got {first + 1} and "
                              f"{first + rows + 1}")  # fmt: skip


def test_the_signatures_are_theirs():
    assert list(inspect.signature(slime.calculate_log_probs_and_entropy).parameters) == (
        "logits tokens tp_group with_entropy chunk_size log_prob_keep_mask with_entropy_grad".split()
    )
    assert list(inspect.signature(nemo_rl.from_parallel_hidden_states_to_logprobs).parameters) == (
        "tensor_parallel_hidden_states output_weight_layer runtime_gather_output target vocab_start_index "
        "vocab_end_index tp_group inference_only cp_group chunk_size".split()
    )
