"""integrations.prime_rl: its head's contract against the formula, and the swap in a model as prime-rl builds it.

The stand-ins have the signatures that prime-rl published at the commit that the module names; where prime-rl is
installed its own classes are run beside.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types

import pytest
import torch
import torch.distributed as dist
from batches import INTERPRETED
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import a3po_kernels as ak
from a3po_kernels.integrations import prime_rl
from a3po_kernels.integrations._steps import OptimizerSteps
from tests.ranks import on_ranks

pytestmark = pytest.mark.skipif(INTERPRETED, reason="ops of the linear head, tested there")
B, S, H, V = 2, 5, 8, 30
REAL = "prime_rl.trainer.models.layers.lm_head"


class FusedOutputLinear(nn.Linear):
    """prime-rl's constructor and forward; softcap is GemmaFusedOutputLinear's."""

    def __init__(self, in_features: int, out_features: int, chunk_size: int, softcap: float | None = None):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size
        if softcap is not None:
            self.softcap = softcap

    def forward(self, hidden_states, labels=None, temperature=None):
        logprobs, entropy = formula(hidden_states, self.weight, labels, temperature, getattr(self, "softcap", None))
        return {"logprobs": logprobs, "entropy": entropy}


def formula(hidden, weight, labels, temperature, softcap):
    logits = hidden.double() @ weight.double().t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature.double().unsqueeze(-1), -1)
    return log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


class Model(nn.Module):
    """A causal LM as prime-rl asks for one: model.model gives last_hidden_state, model.lm_head is linear."""

    def __init__(self, tied: bool = False):
        super().__init__()
        self.model = nn.Embedding(V, H)
        self.lm_head = nn.Linear(H, V, bias=False)
        if tied:
            self.lm_head.weight = self.model.weight


def inject(model, chunk_size=None, softcap=None):
    """What inject_prime_lm_head does: another lm_head of the same weight, and a forward that calls it so."""
    weight = model.lm_head.weight
    model.lm_head = nn.Linear(H, V, bias=False) if chunk_size is None else FusedOutputLinear(H, V, chunk_size, softcap)
    model.lm_head.weight = weight

    def forward(self, input_ids, labels=None, temperature=None):
        hidden = self.model(input_ids)
        if chunk_size is None:
            return {"logits": self.lm_head(hidden)}
        return self.lm_head(hidden[:, slice(None), :], labels, temperature=temperature)

    model.forward = types.MethodType(forward, model)


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return {
        "input_ids": torch.randint(0, V, (B, S), generator=g), "labels": torch.randint(0, V, (B, S), generator=g),
        "temperature": 0.5 + torch.rand(B, S, generator=g),
    }  # fmt: skip


def gradients(model) -> tuple:
    """Log-probs, entropy, and the weights' gradients of a sum with a factor a token."""
    model.zero_grad()
    out = model(**batch())
    factors = torch.randn(B, S, generator=torch.Generator().manual_seed(5))
    (out["logprobs"] * factors).sum().backward()
    return out["logprobs"].detach(), out["entropy"].detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("tied", [False, True])
def test_the_swapped_head_gives_what_the_fused_one_gave(tied, softcap):
    """A temperature a token, a softcap before it, the gradients of hidden states and weight."""
    torch.manual_seed(0)
    model = Model(tied)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    inject(model, 4, softcap)
    weight, expected = model.lm_head.weight, gradients(model)
    head = prime_rl.swap_head(model)
    assert model.lm_head is head and head.weight is weight and head.softcap == softcap
    found = gradients(model)
    torch.testing.assert_close(found[0], expected[0].float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], expected[1].float(), rtol=1e-5, atol=1e-6)
    assert len(found[2]) == len(expected[2]) == 2 - tied
    for mine, theirs in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert found[0].dtype == found[1].dtype == torch.float32
    # Each position's own temperature counts: another one changes it alone.
    changed = batch()
    changed["temperature"][1, 2] *= 2
    rows = (model(**changed)["logprobs"] != found[0]).nonzero()
    assert rows.tolist() == [[1, 2]]


def sharded_gradients() -> list:
    """By FSDP2 as prime-rl wraps a model: the swapped head a group of its own, and the rest; whole gradients."""
    torch.manual_seed(0)
    model = Model()
    prime_rl.swapping(inject)(model, chunk_size=4)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard([model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    logprobs, _, _ = gradients(model)
    return [logprobs, *(p.grad.full_tensor() for p in model.parameters())]


def test_the_swapped_head_under_fsdp():
    """Every rank has the same batch, so that the mean of their gradients is one process's."""
    torch.manual_seed(0)
    model = Model()
    inject(model, 4)
    logprobs, _, grads = gradients(model)
    for found in on_ranks(2, sharded_gradients):
        for mine, right in zip(found, [logprobs.float(), *grads], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_the_injection_swaps_fused_heads_alone():
    model = Model()
    injected = prime_rl.swapping(inject, max_chunk_bytes=4096)
    injected(model, chunk_size=3)
    assert type(model.lm_head) is prime_rl.OutputLinear and model.lm_head.max_chunk_bytes == 4096
    plain = Model()
    injected(plain, chunk_size=None)
    assert type(plain.lm_head) is nn.Linear and "logits" in plain(**batch())


def test_the_contract_is_the_published_one():
    theirs, ours = (inspect.signature(kind.forward) for kind in (FusedOutputLinear, prime_rl.OutputLinear))
    assert list(theirs.parameters) == list(ours.parameters)
    assert [p.default for p in theirs.parameters.values()] == [p.default for p in ours.parameters.values()]


def test_what_cannot_be_right_is_refused():
    head = prime_rl.OutputLinear(H, V)
    hidden, labels, temperature = torch.zeros(B, S, H), torch.zeros(B, S, dtype=torch.long), torch.ones(B, S)
    for given, message in (
        ({"temperature": temperature}, r"labels must have shape \[2, 5\].*got None"),
        ({"labels": labels}, r"temperature must have shape \[2, 5\].*got None"),
        ({"labels": labels, "temperature": torch.ones(B)}, r"temperature must have shape \[2, 5\].*got \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            head(hidden, **given)
    with pytest.raises(ValueError, match=r"fused head of prime-rl.*got Linear"):
        prime_rl.swap_head(Model())
    model = Model()
    inject(model, 4)
    model.lm_head.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="before FSDP"):
        prime_rl.swap_head(model)
    model.lm_head = FusedOutputLinear(H, V, 4)
    model.lm_head.bias = nn.Parameter(torch.zeros(V))
    with pytest.raises(ValueError, match="no bias"):
        prime_rl.swap_head(model)


def test_beside_prime_rls_own():
    """Where it is installed: the same signature, and the same numbers in fp32."""
    real = pytest.importorskip(REAL)
    gemma = importlib.import_module(REAL + "_gemma")
    hidden = torch.randn(B, S, H, generator=torch.Generator().manual_seed(6))
    given = {name: value for name, value in batch().items() if name != "input_ids"}
    for softcap, kind in ((None, real.FusedOutputLinear), (1.5, gemma.GemmaFusedOutputLinear)):
        assert list(inspect.signature(kind.forward).parameters) == [
            "self", "hidden_states", "labels", "temperature",
        ]  # fmt: skip
        theirs = kind(in_features=H, out_features=V, chunk_size=3, **({} if softcap is None else {"softcap": softcap}))
        found = []
        holder = Model()
        holder.lm_head = theirs
        for head in (theirs, prime_rl.swap_head(holder)):
            leaf = hidden.clone().requires_grad_()
            out = head(leaf, **given)
            grads = torch.autograd.grad(out["logprobs"].square().sum(), [leaf, theirs.weight])
            found.append((out["logprobs"], out["entropy"], *grads))
        for mine, right in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


# -- the loss ---------------------------------------------------------------------------------------------------------


LENGTHS = (7, 1, 5)
READS_THE_BATCH = ak.Objective(surrogate=ak.CustomSurrogate(lambda t: t.ratio, "batch"))


def rollouts(weighted: bool):
    """prime-rl's LossInputs of each rollout, some tokens of which are no tokens, with one reference policy."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for length, advantage in zip(LENGTHS, (1.3, -0.4, -0.9), strict=True):
        inference, noise, reference = (torch.randn(length, generator=generator).double() for _ in range(3))
        inference = -inference.abs() - 0.1
        mask = torch.rand(length, generator=generator) < 0.8
        mask[0] = True
        made.append(types.SimpleNamespace(
            trainer_logprobs=(inference + 0.3 * noise).clamp(max=0.0).requires_grad_(), inference_logprobs=inference,
            ref_logprobs=inference - 0.2 * reference.abs(), advantages=torch.full((length,), advantage).double(),
            loss_mask=mask, loss_weights=noise.exp() if weighted else None,
        ))  # fmt: skip
    return made


@pytest.mark.parametrize(
    ("name", "options"),
    [("a3po", {"rho": 3.0, "kl_coef": 0.1}), ("dapo", {}), ("gspo", {"aggregation": "token-mean"}), ("dppo", {})],
)
def test_the_rollouts_losses_are_the_packed_batchs(name, options):
    """Summed and divided by the step's tokens, as compute_loss does it."""
    inputs = rollouts(False)
    outputs = [prime_rl.policy_loss(one, objective=name, **options) for one in inputs]
    count = sum(int(one.loss_mask.sum()) for one in inputs)
    found = torch.stack([out.loss for out in outputs]).sum() / count
    grads = torch.autograd.grad(found, [one.trainer_logprobs for one in inputs])

    def packed(field):
        return torch.cat([getattr(one, field) for one in inputs])

    logprobs = packed("trainer_logprobs").detach().requires_grad_()
    expected = ak.logprob_policy_loss(
        logprobs, packed("advantages"), objective=ak.presets[name](**options), mask=packed("loss_mask"),
        old_logprobs=packed("inference_logprobs"), cu_seqlens=torch.tensor([0, *LENGTHS]).cumsum(0),
        ref_logprobs=packed("ref_logprobs") if options.get("kl_coef") else None,
    )  # fmt: skip
    assert abs(expected.loss) > 1e-2
    torch.testing.assert_close(found, expected.loss)
    torch.testing.assert_close(torch.cat(grads), torch.autograd.grad(expected.loss, logprobs)[0])
    assert all(value.ndim == 0 and value.isfinite() for out in outputs for value in out.metrics.values())


def of_prime_rl(one, kl_tau):
    """default_loss_fn of prime-rl's page of algorithms, adv_tau 1: DPPO's mask, the ratio, the squared log ratio."""
    log_ratio = one.trainer_logprobs - one.inference_logprobs
    moved = one.trainer_logprobs.exp() - one.inference_logprobs.exp()
    outside = torch.where(one.advantages > 0, moved > 0.02, moved < -0.02)
    per_token = one.loss_mask * (kl_tau * log_ratio**2 - ~outside * one.advantages * log_ratio.exp())
    return (per_token if one.loss_weights is None else per_token * one.loss_weights).sum()


@pytest.mark.parametrize(("weighted", "kl_tau"), [(False, 0.1), (True, 0.0)])
def test_dppo_is_prime_rls_own_loss(weighted, kl_tau):
    """In its gradient: the package's value is the one of -sg(r) A logp."""
    kept = 0
    for one in rollouts(weighted):
        ours = prime_rl.policy_loss(one, "dppo", delta_low=0.02, delta_high=0.02, log_ratio_coef=kl_tau)
        found, expected = (
            torch.autograd.grad(loss, one.trainer_logprobs)[0] for loss in (ours.loss, of_prime_rl(one, kl_tau))
        )
        torch.testing.assert_close(found, expected)
        kept += int((found != 0).sum())
    assert 3 < kept


WEIGHABLE = ("a3po", "dapo", "cispo", "dppo", "topr", "w_reinforce", "gspo", "sapo", "gmpo")


@pytest.mark.parametrize("name", WEIGHABLE)
def test_weights_of_two_are_twice_the_loss(name):
    for one in rollouts(False):
        found = {}
        for weight in (None, 2.0):
            one.loss_weights = None if weight is None else torch.full_like(one.advantages, weight)
            out = prime_rl.policy_loss(one, name, aggregation="token-mean")
            found[weight] = (out.loss, torch.autograd.grad(out.loss, one.trainer_logprobs)[0])
        for plain, doubled in zip(found[None], found[2.0], strict=True):
            torch.testing.assert_close(doubled, 2.0 * plain)


@pytest.mark.parametrize(
    ("name", "options", "term"),
    [("dapo", {"kl_coef": 0.1}, "kl_coef"), ("dppo", {"log_ratio_coef": 0.1}, "log_ratio_coef"),
     ("vespo", {}, "VESPO's factor")],
)  # fmt: skip
def test_weights_that_would_not_weigh_all_of_a_loss_are_refused(name, options, term):
    with pytest.raises(ValueError, match=f"loss_weights scale a token's whole loss, and {term} is not"):
        prime_rl.policy_loss(rollouts(True)[0], name, **options)
    assert prime_rl.policy_loss(rollouts(False)[0], name, **options).loss.isfinite()


class FullCPUOffloadOptimizer:
    """prime-rl's: steps by kernels of its own, or an optimizer of torch once a chunk."""

    def __init__(self, inner, chunks):
        self.inner, self.chunks = inner, chunks

    def step(self, closure=None):
        for _ in range(self.chunks):
            self.inner.step()
        return "stepped"


def test_the_schedule_counts_the_optimizers_steps(monkeypatch):
    """One a loss, whoever steps: two optimizers, one that follows no loss, prime-rl's own without a hook of torch's."""
    module = types.ModuleType("prime_rl.trainer.optim.offload")
    module.FullCPUOffloadOptimizer = type("FullCPUOffloadOptimizer", (FullCPUOffloadOptimizer,), {})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    prime_rl._steps.cache_clear()
    monkeypatch.setenv("A3PO_INITIAL_STEP", "100")
    one, two = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
    native, chunked = (module.FullCPUOffloadOptimizer(one, chunks) for chunks in (0, 3))
    betas = []
    for optimizers in ((one, one), (one, two), (native,), (chunked,), ()):
        for rollout in rollouts(False):
            betas.append(round(prime_rl.policy_loss(rollout).metrics["weight"].item(), 6))
        returned = [optimizer.step() for optimizer in optimizers]
    assert betas == [beta for beta in (1.5, 1.495, 1.49, 1.485, 1.48) for _ in LENGTHS] and returned == []
    assert chunked.step() == "stepped"
    prime_rl._steps.cache_clear()


@pytest.mark.parametrize("first", ["ten", "-1", ""])
def test_a_first_step_that_is_none(first, monkeypatch):
    monkeypatch.setenv("A3PO_INITIAL_STEP", first)
    with pytest.raises(ValueError, match="A3PO_INITIAL_STEP must be an integer of at least 0; got"):
        OptimizerSteps()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "grpo"}, "aggregation must be 'token-mean'; got 'seq-mean-token-mean'"),
        ({"objective": "psr"}, "normalize_over must be 'all'"),
        ({"objective": "kl_cov"}, "the objective reads the batch"),
        ({"objective": "fork_tokens", "normalize_over": "all"}, "the objective reads the batch"),
        ({"objective": READS_THE_BATCH}, "the objective reads the batch"),
        ({"objective": "a3po", "rhoo": 2.0}, "rhoo means nothing to the objective 'a3po'"),
        ({"objective": ak.dapo(), "rho": 2.0}, "rho is an option of the presets"),
        ({"objective": "appo"}, "did you mean"),
        ({"objective": "dapo", "kl_coef": 0.1}, "needs ref_logprobs"),
    ],
)
def test_what_one_rollout_does_not_show_is_refused(options, message):
    one = rollouts(False)[0]
    one.ref_logprobs = None
    with pytest.raises(ValueError, match=message):
        prime_rl.policy_loss(one, **options)


def test_the_loss_beside_prime_rls_own_fields():
    """Where prime-rl is installed: its LossInputs has the fields that are read, LossOutputs those given."""
    loss = pytest.importorskip("prime_rl.trainer.rl.loss")
    assert set(prime_rl.LossInputs.__annotations__) == set(loss.LossInputs.__dataclass_fields__)
    assert set(prime_rl.LossOutputs._fields) == set(loss.LossOutputs.__dataclass_fields__)
