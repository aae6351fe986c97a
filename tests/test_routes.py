"""The two routes of policy_loss: the same numbers, where each is possible, and what they leave in memory."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED, keywords_for, largest_error, preset, random_batch, run

import a3po_kernels
import reference
from a3po_kernels import PolicyLoss, a3po, dapo, policy_loss

POSSIBLE = ("grpo", "dr_grpo", "dapo", "psr", "nsr", "w_reinforce", "a3po", "cispo", "sapo")
OVERRIDES = {"plain": {}, "regularised": {"kl_coef": 0.07, "entropy_coef": 0.02}}


@pytest.mark.parametrize("vocabulary", [37, 64])  # off the 16-byte grid and on it
@pytest.mark.parametrize("overrides", OVERRIDES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", POSSIBLE)
def test_routes_agree(name, dtype, overrides, vocabulary, backend, device):
    """Triton: to the bit, for the formulas are the same device functions. PyTorch: but for the order of one product."""
    if INTERPRETED and (dtype is torch.float64) == (vocabulary == 37):
        pytest.skip("the interpreter is slow")
    batch = random_batch(POSSIBLE.index(name), dtype=dtype, vocabulary=vocabulary, device=device)
    batch.keywords = keywords_for(name, batch.keywords)
    objective = preset(name, **OVERRIDES[overrides])[0]
    one, gradient = run(a3po_kernels, batch, objective, backend=backend, route="one-launch", step=3)
    two, other = run(a3po_kernels, batch, objective, backend=backend, route="two-stage", step=3)
    assert (one.route, two.route) == ("one-launch", "two-stage")
    assert torch.equal(one.loss, two.loss) and torch.equal(one.logprobs, two.logprobs)
    assert torch.equal(one.entropy, two.entropy) and torch.equal(one.weights, two.weights)
    assert all(torch.equal(one.metrics[key], two.metrics[key]) for key in one.metrics)
    if backend == "triton" or overrides == "plain":
        assert torch.equal(gradient, other)
    else:
        assert largest_error(gradient, other) <= 2 * torch.finfo(dtype).eps * other.abs().max().item()


@pytest.mark.parametrize("transform", [{}, {"temperature": 0.7, "softcap": 4.0, "logit_scale": 1.3}])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["dapo", "a3po"])
def test_one_launch_against_the_reference(name, inplace, transform, backend, device):
    batch = random_batch(9, dtype=torch.float64, vocabulary=64, device=device)
    batch.keywords = keywords_for(name, batch.keywords)
    ours, theirs = preset(name, kl_coef=0.1, entropy_coef=0.01)
    leaf = batch.logits.clone().requires_grad_()
    logits = leaf * 1.0
    output = policy_loss(
        logits, batch.targets, batch.advantages, objective=ours, route="one-launch", inplace_backward=inplace,
        backend=backend, **batch.keywords, **transform,
    )  # fmt: skip
    (output.loss * 1.5).backward()
    expected, gradient = run(reference, batch, theirs, double=True, **transform)
    assert largest_error(output.loss, expected.loss) < 1e-12
    assert largest_error(leaf.grad, 1.5 * gradient) < 1e-12


@pytest.mark.parametrize(
    "name, keep, reason",
    [
        ("gspo", (), "the ratio is the rollout's"), ("fork_tokens", (), "selects by the current policy"),
        ("lp_reg", ("min_p_logprobs",), "Lp-Reg selects"), ("a3po", (), None),
    ],
)  # fmt: skip
def test_where_one_launch_is_not_possible(name, keep, reason, backend, device):
    batch = random_batch(2, dtype=torch.float32, vocabulary=64, device=device)
    given = {key: batch.keywords[key] for key in ("mask", "old_logprobs", *keep)}
    if reason is None:  # on-policy the rule reads the current log-probs
        reason = "selects by the current policy"
        del given["old_logprobs"]
    arguments = (batch.logits.clone().requires_grad_(), batch.targets, batch.advantages)
    options = {"objective": getattr(a3po_kernels, name)(), "backend": backend, **given}
    with pytest.raises(ValueError, match=f"route='one-launch' is not possible here: .*{reason}"):
        policy_loss(*arguments, route="one-launch", **options)
    assert policy_loss(*arguments, **options).route == "two-stage"


@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_main_grad_keeps_its_fp32(factor, backend, device):
    """One chunk or several: what main_grad gets is summed in fp32 and never rounded to the weight's dtype."""
    if INTERPRETED:
        pytest.skip("the interpreter cuts fp32 off to bf16 where a GPU rounds")
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(4, 16, 32, generator=generator).bfloat16().to(device)
    weight = torch.randn(200, 32, generator=generator).bfloat16().to(device)
    targets = torch.randint(0, 200, (4, 16), generator=generator).to(device)
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0], device=device)

    def main_grad(route, dtype=torch.bfloat16, budget=None):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        buffer = torch.zeros(200, 32, device=device)
        output = a3po_kernels.linear_policy_loss(
            *leaves, targets, advantages, objective=dapo(), main_grad=buffer, route=route, max_chunk_bytes=budget,
            backend=backend,
        )  # fmt: skip
        (output.loss * factor).backward()
        assert leaves[1].grad is None
        return buffer

    recomputed = main_grad("recompute")
    one, several = main_grad("one-pass"), main_grad("one-pass", budget=20 * 200 * 2)
    assert (one.bfloat16().float() != one).any(), "not rounded"
    for found in (one, several):
        assert (found - recomputed).norm() < 3e-3 * recomputed.norm()
        # No systematic factor: projected on the other's, 1 to a part in a thousand.
        assert abs((found * recomputed).sum() / (recomputed * recomputed).sum() - 1) < 1e-3


def test_double_backward_of_log_probs_raises(backend, device):
    logits = torch.randn(2, 5, 7, device=device, dtype=torch.float64, requires_grad=True)
    logp = torch.log_softmax(logits, -1)[..., 0]
    options = {"objective": dapo(), "backend": backend, "old_logprobs": logp.detach()}
    loss = a3po_kernels.logprob_policy_loss(logp, torch.tensor([1.0, -1.0], device=device), **options).loss
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("route", ["one-launch", "two-stage"])
def test_double_backward_in_place_raises(route, backend, device):
    leaf = torch.randn(2, 5, 64, device=device, requires_grad=True)
    targets = torch.randint(0, 64, (2, 5), device=device)
    options = {"objective": dapo(), "old_logprobs": torch.full((2, 5), -4.0, device=device), "backend": backend}
    advantages = torch.tensor([1.0, -1.0], device=device)
    loss = policy_loss(leaf * leaf, targets, advantages, route=route, inplace_backward=True, **options).loss
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_transforms_go_by_the_operators(backend, device):
    """torch.func's wrappers look like tensors: a plain call would hand them to a kernel."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from a3po_kernels.core.operators import runs_plainly

    x = torch.randn(2, 3, device=device)
    assert runs_plainly(x) and runs_plainly(torch.nn.Parameter(x))
    seen = []
    torch.vmap(lambda row: seen.append(runs_plainly(row)) or row)(x)
    with FakeTensorMode() as mode:
        seen.append(runs_plainly(mode.from_tensor(x)))
    seen.append(runs_plainly(mode.from_tensor(x)))
    assert seen == [False, False, False]


def test_one_launch_double_backward_and_module(backend, device):
    module = PolicyLoss(a3po(), route="one-launch", backend=backend)
    logits = torch.randn(2, 5, 64, device=device, requires_grad=True)
    targets = torch.randint(0, 64, (2, 5), device=device)
    old = torch.full((2, 5), -4.0, device=device)
    output = module(logits, targets, torch.tensor([1.0, -1.0], device=device), old_logprobs=old)
    assert output.route == "one-launch"
    weights = torch.ones(3, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(output.loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        (weights.square().sum() + gradient.square().sum()).backward()
    with torch.no_grad():
        assert module(logits, targets, torch.ones(2, device=device), old_logprobs=old).route == "statistics"
    with pytest.raises(ValueError, match="route must be one of auto, one-launch, two-stage"):
        module(logits, targets, torch.ones(2, device=device), route="three-stage")


def test_few_rows_and_columns_apart_take_two_stages(backend, device):
    """Where a program a row leaves a GPU idle, or columns are apart, the two stages are faster; on a CPU they are."""
    rows = 1024 if device.type == "cuda" else 6
    few, many = torch.randn(1, 1, 63, device=device), torch.randn(1, rows, 63, device=device)
    apart = torch.randn(1, 63, rows, device=device).transpose(1, 2)
    for logits, route in ((few, "two-stage"), (many, "one-launch"), (apart, "two-stage")):
        targets = torch.zeros(logits.shape[:2], dtype=torch.long, device=device)
        options = {"objective": dapo(), "backend": backend, "old_logprobs": torch.zeros(targets.shape, device=device)}
        logits = logits.requires_grad_()
        route = route if backend == "triton" else "two-stage"
        assert policy_loss(logits, targets, torch.ones(1, device=device), **options).route == route


@pytest.mark.cuda
@pytest.mark.parametrize("vocabulary", [32000, 50257, 151936])
def test_in_place_with_idle_rows_on_a_gpu(vocabulary):
    """Half of the tokens clipped or without advantage: no row reads what another thread has zeroed already."""
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(8, 256, vocabulary, device="cuda", generator=generator).bfloat16()
    targets = torch.randint(0, vocabulary, (8, 256), device="cuda", generator=generator)
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 0.0, -1.0, 0.0], device="cuda")
    old = a3po_kernels.token_logprobs(logits, targets).logprobs + torch.randn(8, 256, device="cuda") * 0.5
    expected = None
    for _ in range(5):
        leaf = logits.clone().requires_grad_()
        output = policy_loss(
            leaf * 1, targets, advantages, objective=dapo(), old_logprobs=old, inplace_backward=True, route="one-launch"
        )
        output.loss.backward()
        found = output.logprobs, leaf.grad
        if expected is None:
            expected = found
            two = policy_loss(logits, targets, advantages, objective=dapo(), old_logprobs=old)
            assert torch.equal(two.logprobs, output.logprobs)
        assert all(map(torch.equal, found, expected))


@pytest.mark.cuda
def test_a_step_on_the_cpu():
    """0-d tensors on the CPU are numbers to a batch on a GPU."""
    batch = random_batch(1, dtype=torch.float32, device="cuda")
    batch.keywords.pop("min_p_logprobs")
    options = {"step": torch.tensor(10), "denominator": torch.tensor(7.0)}
    output, gradient = run(a3po_kernels, batch, a3po(), **options)
    same, other = run(a3po_kernels, batch, a3po(), step=10, denominator=7.0)
    assert torch.equal(output.loss, same.loss) and torch.equal(gradient, other)
