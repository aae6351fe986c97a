"""Public bug reports of other heads, tried here: log-probabilities, entropy and the linear head.

docs/reports.md lists every report that was looked at, and the test that proves what is not repeated here.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import triton
from batches import INTERPRETED, largest_error

import a3po_kernels as ak
import reference
from a3po_kernels.backends.torch.rows import CPU_CHUNK

ROOT = Path(__file__).resolve().parents[1]
native = pytest.mark.skipif(INTERPRETED, reason="the interpreter is slow: a handful of these tests covers the kernels")
fused = pytest.mark.skipif(
    INTERPRETED and triton.__version__.startswith("3.6"),
    reason="the interpreter of Triton 3.6 rounds the product inside tl.fma, as no GPU does",
)
INF = math.inf


def statistics(logits, targets, backend, **options):
    """(logp, entropy, gradient of logp + 0.3 H) of ours, and of the reference in fp64."""
    found = []
    for module, z in ((ak, logits), (reference, logits.cpu().double())):
        leaf = z.detach().clone().requires_grad_()
        extra = {"backend": backend} if module is ak else {}
        stats = module.token_logprobs(leaf, targets.to(leaf.device), **options, **extra)
        (stats.logprobs + 0.3 * stats.entropy).sum().backward()
        found.append((stats.logprobs, stats.entropy, leaf.grad))
    return found


def agree(found, tolerance):
    for name, mine, truth in zip(("logp", "entropy", "gradient"), *found, strict=True):
        assert largest_error(mine, truth) <= tolerance, name


def head(seed=0, rows=12, width=6, columns=41, dtype=torch.float64, device="cpu"):
    """(hidden [1, N, H], weight [V, H], targets [1, N], advantages [1]); the first two require a gradient."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(1, rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(columns, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, columns, (1, rows), generator=generator).to(device)
    leaves = [x.to(device=device, dtype=dtype).requires_grad_() for x in (hidden, weight)]
    return *leaves, targets, torch.ones(1, device=device)


def plain_logp(hidden, weight, targets, bias=0.0):
    """What a user would write."""
    return torch.log_softmax(hidden @ weight.T + bias, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_entropy_and_its_gradient_where_probabilities_underflow(dtype, backend, device):
    """huggingface/trl#7221, huggingface/trl#7252: exp(logp) * logp was 0 * -inf, and its mend left NaN in backward."""
    rows = [[65504.0, -65504.0, 0.0], [300.0, -300.0, 300.0], [0.0, -INF, -INF], [0.0, -INF, -200.0]]
    found = statistics(torch.tensor(rows, dtype=dtype, device=device), torch.tensor([0, 2, 0, 0]), backend)
    assert all(part.isfinite().all() for part in found[0])
    agree(found, 1e-3 if dtype is torch.float16 else 1e-6)


@fused
@pytest.mark.parametrize("columns", [3, 1031, 1032])
@pytest.mark.parametrize("offset, softcap", [(-3000.0, None), (-40.0, 30.0), (-2.0, 1.0)])
def test_columns_beyond_the_vocabulary_have_no_mass(offset, softcap, columns, backend, device):
    """verl-project/verl#7439, verl-project/verl#5349, unslothai/unsloth#10616: a block's end counted as logits of 0,
    or of -softcap, which shows where all logits lie far below."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-8, 9, (3, columns), generator=generator) / 8 + offset
    found = statistics(logits.to(device), torch.tensor([0, columns - 1, 1]), backend, softcap=softcap)
    # Capped logits of about -30 are right to 3 roundings of the cap, a few 1e-6.
    agree(found, 2e-5 if softcap else 2e-6)


@pytest.mark.parametrize("columns", [1, 33] if INTERPRETED else [1, 33, 127, 129, 511, 513, 517, 1025])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_probabilities_of_a_row_sum_to_one(dtype, columns, backend, device):
    """verl-project/verl#2656 had log-probs of 123, pytorch/pytorch#143644 sums far from 1 at 517 columns of fp64."""
    generator = torch.Generator().manual_seed(columns)
    row = (4 * torch.randn(1, columns, generator=generator, dtype=torch.float64)).to(dtype).to(device)
    logp = ak.token_logprobs(row.expand(columns, columns), torch.arange(columns, device=device), backend=backend)[0]
    assert (logp <= 0).all()
    assert abs(logp.double().exp().sum().item() - 1) < (1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("place", [0, 4500, 8999])
def test_a_row_with_one_finite_logit(place, backend, device):
    """Dao-AILab/flash-attention#1930: NaN where whole blocks before the finite one were -inf."""
    logits = torch.full((1, 9000), -INF, device=device)
    logits[0, place] = 10.0
    logp, entropy, gradient = statistics(logits, torch.tensor([place]), backend)[0]
    assert logp.item() == 0.0 and entropy.item() == 0.0 and not gradient.any()


def test_a_tile_of_the_head_without_a_finite_logit(backend, device):
    """Dao-AILab/flash-attention#1930, for the linear head: a bias of -inf bans whole tiles of 64 columns."""
    hidden, weight, targets, _ = head(columns=200, device=device)
    bias = torch.zeros(200, dtype=torch.float64, device=device)
    bias[:64] = bias[128:192] = -INF
    targets = 64 + targets % 64
    stats = ak.linear_token_logprobs(hidden, weight, targets, bias=bias, max_chunk_bytes=64 * 12 * 8, backend=backend)
    truth = reference.token_logprobs((hidden @ weight.T + bias).cpu(), targets.cpu())
    for mine, expected in zip(stats, truth, strict=True):
        assert largest_error(mine, expected) < 1e-12
    gradients = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), (hidden, weight))
    expected = torch.autograd.grad(truth.logprobs.sum() + truth.entropy.sum(), (hidden, weight))
    assert all(largest_error(x, y) < 1e-12 for x, y in zip(gradients, expected, strict=True))


@fused
@pytest.mark.parametrize("offset", [2.0**23, -(2.0**23), 1e8])
def test_a_common_offset_of_the_logits_cancels(offset, backend, device):
    """pytorch/pytorch#11752, pytorch/pytorch#38839, pytorch/pytorch#195829: lse - logit cancelled where max - logit
    does not."""
    step = 8.0 if offset == 1e8 else 1.0  # neighbours in fp32
    logits = (torch.tensor([[0.0, 1.0, 1.0, -2.0]]) * step + offset).to(device)
    assert logits[0, 1] - logits[0, 0] == step
    agree(statistics(logits, torch.tensor([1]), backend), 2e-6)


@fused
@pytest.mark.parametrize("value", [1e10, -1e10, 1e30])
def test_rows_of_huge_finite_logits(value, backend, device, request):
    """pytorch/pytorch#11752 again, further out: equal logits are a uniform distribution whatever they are."""
    if backend == "triton":
        reason = "the shift k * max is rounded by more than an exponent holds, from about 2^32 on: NaN or -inf"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    agree(statistics(torch.full((1, 5), value, device=device), torch.tensor([1]), backend), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_masked_whole_by_the_lowest_finite_number(dtype, backend, device, request):
    """allenai/allennlp#890: masked by finfo.min, not -inf, a row is finite, and uniform in PyTorch."""
    if backend == "triton":
        request.applymarker(pytest.mark.xfail(strict=True, reason="the running maximum starts at -1e38: NaN"))
    logits = torch.full((1, 5), torch.finfo(dtype).min, dtype=dtype, device=device)
    agree(statistics(logits, torch.tensor([1]), backend), 1e-2)


@fused
def test_a_tiny_temperature_does_not_overflow(backend, device):
    """vllm-project/vllm#2937: fp16 logits divided by 1e-4 pass 65504; here the quotient is taken in fp32."""
    logits = torch.tensor([[60.0, 59.5, -60.0], [8.0, 8.0, 8.0]], dtype=torch.float16, device=device)
    found = statistics(logits, torch.tensor([1, 2]), backend, temperature=1e-4)
    assert all(part.isfinite().all() for part in found[0])
    agree(found, 2.0)  # gradients of 6667, where fp16 has steps of 4
    assert max(largest_error(mine, truth) for mine, truth in zip(found[0][:2], found[1][:2], strict=True)) < 1e-3


@native
def test_a_vocabulary_wider_than_a_chunk(backend, device):
    """yandex/faster-rnnlm#24: the entropy was NaN from two million words on."""
    generator = torch.Generator().manual_seed(0)
    columns = CPU_CHUNK + 77_777
    logits = torch.randn(2, columns, generator=generator).to(device)
    agree(statistics(logits, torch.tensor([3, columns - 1]), backend), 5e-6)


@native
def test_strided_and_expanded_gradients_of_the_linear_head(backend, device):
    """verl-project/verl#6960, ROCm/TransformerEngine#623: kernels read a strided or stride-0 gradient as contiguous."""
    hidden, weight, targets, _ = head(device=device)
    logits = hidden @ weight.T
    truth = reference.token_logprobs(logits.cpu(), targets.cpu())
    stats = ak.linear_token_logprobs(hidden, weight, targets, backend=backend, max_chunk_bytes=1000)
    base = torch.randn(24, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for which, gradient in ((0, base[::2].t()), (1, base[::2].t()), (0, base[:1].expand(1, 12))):
        mine = torch.autograd.grad(stats[which], (hidden, weight), gradient.to(device), retain_graph=True)
        expected = torch.autograd.grad(truth[which], (hidden, weight), gradient, retain_graph=True)
        assert all(largest_error(x, y) < 1e-12 for x, y in zip(mine, expected, strict=True))


@native
def test_strided_hidden_states_and_weight(backend, device):
    """unslothai/unsloth-zoo#591: hidden states cut by logits_to_keep are a view that .view() refuses."""
    wide, weight, targets, advantages = head(rows=24, width=8, device=device)
    hidden = wide.detach()[:, ::2, 2:].requires_grad_()
    turned = weight.detach()[:, :6].t().contiguous().t().requires_grad_()
    assert not hidden.is_contiguous() and not turned.is_contiguous()
    arguments = (targets[:, ::2], advantages)
    gradients = []
    for pair in ((hidden, turned), [x.detach().contiguous().requires_grad_() for x in (hidden, turned)]):
        loss = ak.linear_policy_loss(*pair, *arguments, objective=ak.dapo(), max_chunk_bytes=900, backend=backend).loss
        gradients.append(torch.autograd.grad(loss, pair))
    assert all(x.any() and largest_error(x, y) < 1e-15 for x, y in zip(*gradients, strict=True))


@native
@pytest.mark.parametrize("route", ["one-pass", "recompute"])
def test_a_frozen_weight_leaves_the_hidden_states_their_gradient(route, backend, device):
    """verl-project/verl#3765: under LoRA, whose head is frozen, no gradient came back at all."""
    gradients = []
    for frozen in (False, True):
        hidden, weight, targets, advantages = head(dtype=torch.float32, device=device)
        weight.requires_grad_(not frozen)
        ak.linear_policy_loss(
            hidden, weight, targets, advantages, objective=ak.dapo(), route=route, max_chunk_bytes=500, backend=backend
        ).loss.backward()
        assert (weight.grad is None) == frozen
        gradients.append(hidden.grad)
    assert gradients[0].any() and torch.equal(*gradients)


@native
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_head_without_gradients(mode, backend, device):
    """linkedin/Liger-Kernel#930: under no_grad a buffer that was never made was used."""
    hidden, weight, targets, advantages = head(device=device)
    trained = ak.linear_policy_loss(hidden, weight, targets, advantages, objective=ak.a3po(), backend=backend)
    with mode():
        output = ak.linear_policy_loss(hidden, weight, targets, advantages, objective=ak.a3po(), backend=backend)
    assert output.route == "statistics" and not output.loss.requires_grad
    assert largest_error(output.loss, trained.loss) < 1e-14


@native
@pytest.mark.parametrize("route", ["one-pass", "recompute"])
def test_hidden_states_and_weight_of_two_dtypes(route, backend, device):
    """hiyouga/LlamaFactory#5583, linkedin/Liger-Kernel#305: 'mat1 and mat2 must have the same dtype'."""
    hidden, weight, targets, advantages = head(dtype=torch.float32, device=device)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = ak.linear_policy_loss(
        low, weight, targets, advantages, objective=ak.dapo(), route=route, max_chunk_bytes=500, backend=backend
    ).loss
    loss.backward()
    exact, truth = low.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    (-plain_logp(exact, truth, targets).mean()).backward()  # on policy: the gradient of -logp
    assert low.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert largest_error(weight.grad, truth.grad) < 1e-6 and largest_error(low.grad, exact.grad) < 1e-2


@native
@pytest.mark.parametrize("route", ["one-pass", "recompute"])
def test_many_chunks_do_not_cost_a_bf16_weight_its_gradient(route, backend, device):
    """linkedin/Liger-Kernel#512, apple/ml-cross-entropy#14: gradients summed over chunks in bf16 diverged."""
    hidden, weight, targets, advantages = head(rows=512, columns=64, dtype=torch.bfloat16, device=device)
    exact, truth = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    (-plain_logp(exact, truth, targets).mean()).backward()
    errors = []
    for budget in (1 << 20, 64 * 2 * 4):  # one chunk; four rows at a time
        weight.grad = None
        ak.linear_policy_loss(
            hidden, weight, targets, advantages, objective=ak.dapo(), route=route, max_chunk_bytes=budget,
            backend=backend,
        ).loss.backward()  # fmt: skip
        errors.append((weight.grad.double() - truth.grad).norm().item())
    assert errors[0] < 1e-2 * truth.grad.norm().item()
    assert errors[1] < 1.2 * errors[0]


@native
def test_a_target_in_the_padding_of_the_vocabulary_is_refused(backend, device):
    """apple/ml-cross-entropy#59: a target beyond the vocabulary matched a padded column, and the loss was inf."""
    hidden, weight, targets, advantages = head(device=device)
    targets[0, 3] = 37
    with pytest.raises(IndexError, match=r"\[0, 37\).*got 37"):
        ak.linear_policy_loss(
            hidden, weight, targets, advantages, objective=ak.dapo(), vocab_size=37, validate=True, backend=backend
        )


@native
@pytest.mark.parametrize("route", ["one-pass", "recompute"])
@pytest.mark.parametrize("compaction", ["exact", "none"])
def test_one_trainable_token_among_many(route, compaction, backend, device):
    """unslothai/unsloth#5230: with only the last turn's labels, chunks without any gave zero gradients."""
    hidden, weight, targets, advantages = head(rows=40, device=device)
    mask = torch.zeros(1, 40, dtype=torch.bool, device=device)
    mask[0, 37] = True
    loss = ak.linear_policy_loss(
        hidden, weight, targets, advantages, objective=ak.dapo(), mask=mask, route=route, compaction=compaction,
        max_chunk_bytes=41 * 8 * 3, backend=backend,
    ).loss  # fmt: skip
    mine = torch.autograd.grad(loss, (hidden, weight))
    expected = torch.autograd.grad(-plain_logp(hidden, weight, targets)[0, 37], (hidden, weight))
    assert all(x.any() and largest_error(x, y) < 1e-13 for x, y in zip(mine, expected, strict=True))


@pytest.mark.cuda
def test_more_rows_than_a_second_grid_dimension_holds():
    """linkedin/Liger-Kernel#1294: a grid with rows in its second dimension ends at 65535."""
    logits = torch.randn(1, 70_000, 64, device="cuda", requires_grad=True)
    targets = torch.randint(0, 64, (1, 70_000), device="cuda")
    output = ak.policy_loss(logits, targets, torch.ones(1, device="cuda"), objective=ak.dapo(), backend="triton")
    output.loss.backward()
    truth = torch.log_softmax(logits.detach()[0, -8:].double(), -1).gather(-1, targets[0, -8:, None])[:, 0]
    assert largest_error(output.logprobs[0, -8:], truth) < 1e-5 and logits.grad[0, -8:].any(-1).all()


def test_the_table_of_reports_names_tests_that_exist():
    """docs/reports.md: every test it names is there, and every report that a docstring here cites is in it."""
    table = (ROOT / "docs" / "reports.md").read_text()
    files = [*(ROOT / "tests").rglob("test_*.py")]
    defined = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    named = set(re.findall(r"`(test_\w+)`", table))
    assert len(named) > 40 and not named - defined
    cited = set()
    for path in (ROOT / "tests").glob("test_public_reports*.py"):
        cited |= set(re.findall(r"[\w.-]+/[\w.-]+#\d+", path.read_text()))
    listed = set(re.findall(r"[\w.-]+/[\w.-]+#\d+", table))
    assert len(listed) >= 60 and not cited - listed
