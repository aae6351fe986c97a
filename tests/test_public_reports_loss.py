"""Public bug reports of other policy losses and cross entropies, tried here: the loss and what autograd does to it.

docs/reports.md lists every report that was looked at.
"""

from __future__ import annotations

import math

import pytest
import torch
from batches import INTERPRETED, largest_error
from torch.utils.checkpoint import checkpoint

import a3po_kernels as ak
import reference

native = pytest.mark.skipif(INTERPRETED, reason="the interpreter is slow: a handful of these tests covers the kernels")
INF = math.inf


def batch(seed=0, rollouts=2, length=5, columns=13, dtype=torch.float64, device="cpu"):
    """(logits [B, T, V], targets [B, T], advantages [B], old log-probs [B, T])."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rollouts, length, columns, generator=generator, dtype=torch.float64).to(dtype).to(device)
    targets = torch.randint(0, columns, (rollouts, length), generator=generator).to(device)
    old = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    old = old + 0.1 * torch.randn(rollouts, length, generator=generator, dtype=torch.float64).to(old)
    return logits, targets, torch.tensor([1.0, -0.5] * (rollouts // 2), device=device), old


@native
@pytest.mark.parametrize("route", ["one-launch", "two-stage"])
def test_two_losses_on_the_same_logits(route, backend, device):
    """unslothai/unsloth#5002, verl-project/verl#1672, NVIDIA/Megatron-LM#1594: the logits held a gradient, or exp, by
    the time something else read them."""
    logits, targets, advantages, old = batch(device=device)
    raw = logits.clone().requires_grad_()
    z = raw * 1.0
    out = ak.policy_loss(
        z, targets, advantages, objective=ak.dapo(), old_logprobs=old, route=route, backend=backend
    )
    (out.loss + z.square().mean() + torch.logsumexp(z, -1).mean()).backward()
    assert torch.equal(z, logits)
    exact = logits.cpu().clone().requires_grad_()
    loss = reference.policy_loss(
        exact, targets.cpu(), advantages.cpu(), objective=reference.dapo(), old_logprobs=old.cpu()
    ).loss
    (loss + exact.square().mean() + torch.logsumexp(exact, -1).mean()).backward()
    assert largest_error(raw.grad, exact.grad) < 1e-13


@native
@pytest.mark.parametrize("route", ["one-launch", "two-stage"])
def test_writing_over_logits_that_their_maker_saved_raises(route, backend, device):
    """linkedin/Liger-Kernel#1251, modelscope/ms-swift#10129: tanh and softmax save what they give, and a kernel's write
    went unnoticed."""
    logits, targets, advantages, old = batch(device=device)
    for maker in (torch.tanh, lambda x: torch.softmax(x, -1)):
        made = maker(logits.clone().requires_grad_())
        out = ak.policy_loss(
            made, targets, advantages, objective=ak.dapo(), old_logprobs=old, route=route, inplace_backward=True,
            backend=backend,
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.loss.backward()


@native
@pytest.mark.parametrize("linear", [False, True])
def test_a_second_backward_has_its_own_gradient(linear, backend, device):
    """Dao-AILab/quack#209: what backward saved was scaled in place, so that the next was refused, or wrong."""
    logits, targets, _, _ = batch(device=device)
    weight = torch.randn(13, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(device)
    leaf = logits.clone().requires_grad_()

    def statistics():
        if linear:
            return ak.linear_token_logprobs(leaf, weight, targets, backend=backend, max_chunk_bytes=700)
        return ak.token_logprobs(leaf, targets, backend=backend)

    kept = statistics()
    first, second = torch.randn(2, *targets.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = []
    for gradient in (first.to(device), second.to(device)):
        kept.logprobs.backward(gradient, retain_graph=True)
        found.append((leaf.grad.clone(), torch.autograd.grad(statistics().logprobs, leaf, gradient)[0]))
        leaf.grad = None
    assert all(torch.equal(mine, fresh) for mine, fresh in found) and not torch.equal(found[0][0], found[1][0])


@native
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("ignore_index", [-1, 255, 3])
def test_any_ignore_index_is_a_mask(ignore_index, linear, backend, device):
    """pytorch/pytorch#15508, pytorch/pytorch#20406, PaddlePaddle/Paddle#28622: one beyond the vocabulary failed, one
    within it kept its gradient."""
    logits, targets, advantages, _ = batch(device=device)
    targets[:, ::2] = 5
    mask = torch.ones_like(targets)
    mask[:, 1::2] = 0

    def run(targets, **keywords):
        leaf = logits.clone().requires_grad_()
        if linear:
            weight = torch.eye(13, dtype=torch.float64, device=device)
            head = ak.linear_policy_loss
            out = head(leaf, weight, targets, advantages, objective=ak.dapo(), backend=backend, **keywords)
        else:
            out = ak.policy_loss(leaf, targets, advantages, objective=ak.dapo(), backend=backend, **keywords)
        out.loss.backward()
        return out, leaf.grad

    ignored, gradient = run(targets.masked_fill(mask == 0, ignore_index), ignore_index=ignore_index)
    masked, expected = run(targets, mask=mask)
    assert torch.equal(ignored.loss, masked.loss) and torch.equal(gradient, expected)
    assert ignored.metrics["token_count"] == mask.sum() and not gradient[:, 1::2].any() and gradient.any()


@pytest.mark.parametrize("denominator", [0, 0.0, "tensor"])
def test_no_token_in_the_whole_global_batch(denominator, backend, device):
    """unslothai/unsloth-zoo#1286, NVIDIA-NeMo/Automodel#3796: 0 tokens divided by a global count of 0 were NaN."""
    logits, targets, advantages, old = batch(device=device)
    leaf = logits.requires_grad_()
    divisor = torch.tensor(0.0, device=device) if denominator == "tensor" else denominator
    out = ak.policy_loss(
        leaf, targets, advantages, objective=ak.dapo(kl_coef=0.1, entropy_coef=0.1), old_logprobs=old,
        ref_logprobs=old, mask=torch.zeros_like(targets), denominator=divisor, backend=backend,
    )  # fmt: skip
    out.loss.backward()
    assert out.loss.item() == 0.0 and not leaf.grad.any()
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("name", ["dapo", "gspo", "cispo", "sapo"])
def test_a_behaviour_log_prob_of_minus_infinity(name, backend, device):
    """NVIDIA-NeMo/RL#2962, vllm-project/vllm-ascend#2934: a sampler's truncated tokens are -inf; the ratio stops at
    e^20, without a gradient."""
    logits, targets, advantages, old = batch(device=device)
    old[0, 2] = -INF
    leaf, exact = logits.clone().requires_grad_(), logits.cpu().clone().requires_grad_()
    out = ak.policy_loss(
        leaf, targets, advantages, objective=getattr(ak, name)(), old_logprobs=old, backend=backend
    )
    out.loss.backward()
    truth = reference.policy_loss(
        exact, targets.cpu(), advantages.cpu(), objective=getattr(reference, name)(), old_logprobs=old.cpu()
    )
    truth.loss.backward()
    assert out.loss.isfinite() and out.metrics["ratio_max"].item() == pytest.approx(math.exp(20))
    assert largest_error(out.loss, truth.loss) < 1e-12 and largest_error(leaf.grad, exact.grad) < 1e-12
    assert name == "cispo" or not leaf.grad[0, 2].any()


@pytest.mark.parametrize("entry", ["old_logprobs", "ref_logprobs", "importance_weights", "advantages"])
def test_nan_in_what_a_sampler_gave_is_not_hidden(entry, backend, device):
    """huggingface/trl#6166, huggingface/trl#6693: a NaN log-prob means broken logits; at a masked token it is none."""
    logits, targets, advantages, old = batch(device=device)
    given = {
        "old_logprobs": old.clone(), "ref_logprobs": old.clone(), "importance_weights": torch.ones_like(old),
        "advantages": advantages[:, None].repeat(1, 5),
    }  # fmt: skip
    given[entry][1, 3] = torch.nan
    live = torch.ones_like(targets)
    masked = live.clone()
    masked[1, 3] = 0
    for mask, hidden in ((live, False), (masked, True)):
        leaf = logits.clone().requires_grad_()
        rest = {key: value for key, value in given.items() if key != "advantages"}
        out = ak.policy_loss(
            leaf, targets, given["advantages"], objective=ak.dapo(kl_coef=0.1), mask=mask, backend=backend, **rest
        )
        out.loss.backward()
        assert out.loss.isfinite() == hidden
        if hidden:
            assert leaf.grad.isfinite().all() and all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("estimator", ["k2", "k3", "k3-ratio"])
def test_a_log_ratio_that_no_exponential_holds(estimator, backend, device):
    """OpenRLHF/OpenRLHF#1335, verl-project/verl#891, PrimeIntellect-ai/prime-rl#1329: clamped after exp the value was
    finite and the gradient 0 * inf; the count of clamped tokens took in masked ones."""
    logits, targets, _, old = batch(dtype=torch.float32, device=device)
    logits[0, 1, targets[0, 1]] -= 300.0
    old[0, 1] -= 300.0
    reference_logp = old.clone()
    reference_logp[0, 1], reference_logp[1, 4], reference_logp[1, 0] = -0.5, -1e6, 500.0
    mask = torch.ones_like(targets)
    mask[1, 0] = 0

    def run(**keywords):
        leaf = logits.clone().requires_grad_()
        objective = ak.grpo(kl_coef=0.1, kl_estimator=estimator, **keywords)
        out = ak.policy_loss(
            leaf, targets, torch.zeros(2, device=device), objective=objective, old_logprobs=old, backend=backend,
            ref_logprobs=reference_logp, mask=mask,
        )  # fmt: skip
        out.loss.backward()
        return out, leaf.grad

    out, gradient = run(kl_clamp=10.0)
    assert out.loss.isfinite() and gradient.isfinite().all() and gradient[0, 0].any()
    assert out.metrics["kl_clamped_fraction"].item() == pytest.approx(2 / 9)
    if estimator != "k3-ratio":  # there the clamped estimate is still weighed by the ratio
        assert not gradient[0, 1].any() and not gradient[1, 4].any()
    if estimator == "k3":
        assert run()[0].loss == INF  # told, not clamped behind one's back


def test_an_entropy_bonus_over_a_masked_vocabulary(backend, device):
    """huggingface/trl#6140, huggingface/trl#6625, huggingface/trl#7252: the bonus had no gradient, or NaN where a token
    is banned."""
    logits, targets, _, old = batch(device=device)
    logits[..., 7:10] = -INF
    targets = targets % 7
    leaf, exact = logits.clone().requires_grad_(), logits.cpu().clone().requires_grad_()
    zero = torch.zeros(2, device=device)
    ak.policy_loss(
        leaf, targets, zero, objective=ak.dapo(entropy_coef=0.2), old_logprobs=old, backend=backend
    ).loss.backward()
    log_p = torch.log_softmax(exact, -1)
    (-0.2 * -(log_p.exp() * log_p.masked_fill(log_p == -INF, 0.0)).sum(-1).mean()).backward()
    assert leaf.grad.isfinite().all() and leaf.grad.any() and not leaf.grad[..., 7:10].any()
    assert largest_error(leaf.grad[..., :7], exact.grad[..., :7]) < 1e-14


@native
@pytest.mark.parametrize("entry", ["logits", "linear", "statistics"])
def test_ignored_rows_under_torch_compile(entry, backend, device):
    """linkedin/Liger-Kernel#1338: compiled, the loss took in whatever a buffer held at ignored rows."""
    logits, targets, advantages, _ = batch(rollouts=4, length=8, device=device)
    targets = targets.masked_fill(torch.arange(8, device=device) % 3 == 1, -100)
    weight = torch.eye(13, dtype=torch.float64, device=device)

    def step(leaf):
        if entry == "logits":
            return ak.policy_loss(leaf, targets, advantages, objective=ak.dapo(), backend=backend).loss
        if entry == "linear":
            head = ak.linear_policy_loss
            return head(leaf, weight, targets, advantages, objective=ak.dapo(), backend=backend).loss
        stats = ak.linear_token_logprobs(leaf, weight, targets, backend=backend)
        return (stats.logprobs * advantages[:, None] + stats.entropy).sum()

    torch._dynamo.reset()
    leaf = logits.requires_grad_()
    expected, found = step(leaf), torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
    assert largest_error(found, expected) < 1e-14
    (gradient,), (truth,) = (torch.autograd.grad(loss, leaf) for loss in (found, expected))
    assert largest_error(gradient, truth) < 1e-14 and not gradient[targets == -100].any()


@native
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("route", ["auto", "recompute"])
def test_a_checkpointed_head(route, reentrant, backend, device):
    """verl-project/verl#2448: the head's forward is run again in backward, on the one-pass route too."""
    logits, targets, advantages, old = batch(device=device)
    weight = torch.eye(13, dtype=torch.float64, device=device)

    def loss(hidden):
        return ak.linear_policy_loss(
            hidden, weight, targets, advantages, objective=ak.a3po(), old_logprobs=old, route=route,
            max_chunk_bytes=500, backend=backend,
        ).loss  # fmt: skip

    leaf = logits.requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    checkpoint(loss, leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, expected) and expected.any()
