"""linear_token_logprobs: against fp64, in every dtype, frozen, padded, adapted, under autocast."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED, largest_error

import a3po_kernels
import reference
from a3po_kernels.core.tiles import column_tiles, row_tiles

ROWS, WIDTH, COLUMNS = 9, 6, 41
NAMES = ("hidden", "weight", "bias", "a", "b")


def head(seed=0, dtype=torch.float64, device="cpu", rows=ROWS, width=WIDTH, columns=COLUMNS, rank=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (columns, width), (columns,), (rank, width), (columns, rank))
    parameters = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    targets = torch.randint(0, columns, (rows,), generator=generator)
    gradients = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    return [x.to(device) for x in parameters], targets.to(device), gradients.to(device)


def exact(parameters, targets, gradients, vocabulary=COLUMNS, scale=0.5, **options):
    """(logp, entropy, gradients) of the reference in fp64."""
    leaves = [x.detach().cpu().double().requires_grad_() for x in parameters]
    hidden, weight, bias, a, b = leaves
    logits = (hidden @ (weight + scale * b @ a).T + bias)[:, :vocabulary]
    stats = reference.token_logprobs(logits, targets.cpu(), **options)
    total = (stats.logprobs * gradients[0].cpu() + stats.entropy * gradients[1].cpu()).sum()
    return stats.logprobs, stats.entropy, torch.autograd.grad(total, leaves)


def ours(parameters, targets, gradients, needs=NAMES, **options):
    leaves = [x.detach().clone().requires_grad_(name in needs) for name, x in zip(NAMES, parameters, strict=True)]
    hidden, weight, bias, a, b = leaves
    stats = a3po_kernels.linear_token_logprobs(hidden, weight, targets, bias=bias, lora=(a, b, 0.5), **options)
    total = (stats.logprobs * gradients[0] + stats.entropy * gradients[1]).sum()
    total.backward()
    return stats.logprobs, stats.entropy, [x.grad for x in leaves]


@pytest.mark.parametrize("compaction", ["exact", "none"])
@pytest.mark.parametrize("budget", [None, 8 * ROWS * 10, 100, 1])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "softcap": 4.0, "logit_scale": 1.3}, {"temperature": "per token"}], ids=str
)
def test_against_the_reference(options, budget, compaction, backend, device):
    if INTERPRETED and (budget == 1 or compaction == "exact"):
        pytest.skip("the interpreter is slow")
    parameters, targets, gradients = head(device=device)
    targets[2] = -100
    gradients[:, 4] = 0
    options = dict(options)
    if options.get("temperature") == "per token":
        options["temperature"] = torch.linspace(0.5, 2.0, ROWS, device=device)
    on_cpu = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    truth = exact(parameters, targets.clamp(max=36), gradients, vocabulary=37, **on_cpu)
    parameters[0][2] = torch.nan  # a row that is no token
    found = ours(
        parameters, targets.clamp(max=36), gradients, vocab_size=37, backend=backend, max_chunk_bytes=budget,
        compaction=compaction, **options,
    )  # fmt: skip
    assert largest_error(found[0], truth[0]) < 1e-12 and largest_error(found[1], truth[1]) < 1e-12
    for name, mine, expected in zip(NAMES, found[2], truth[2], strict=True):
        assert largest_error(mine, expected) < 1e-11, name
    assert not found[2][1][37:].any(), "padding of the vocabulary has no gradient"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [64, 512])
def test_low_precision_is_no_worse_than_plain_at_any_tile_size(dtype, columns, backend, device):
    """Sums over tiles are rounded once: the error does not grow as the tiles shrink, and is at most the plain way's."""
    if INTERPRETED and (columns != 64 or dtype is torch.bfloat16):
        pytest.skip("the interpreter is slow, and cuts fp32 off to bf16 where a GPU rounds")
    rows, vocabulary = (16, 300) if INTERPRETED else (256, 4096)
    parameters, targets, gradients = head(3, dtype, device, rows, 32, vocabulary)
    parameters = [0.3 * x for x in parameters]
    parameters[4] = torch.zeros_like(parameters[4])
    truth = exact(parameters, targets, gradients, vocabulary, scale=0.0)

    leaves = [x.detach().clone().requires_grad_() for x in parameters[:3]]
    logits = torch.nn.functional.linear(*leaves)
    log_p = torch.log_softmax(logits.float(), -1)
    logp = log_p.gather(-1, targets[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    (logp * gradients[0] + entropy * gradients[1]).sum().backward()
    plain = [largest_error(x, y) for x, y in zip((logp, entropy), truth[:2], strict=True)]
    plain += [(x.grad.cpu().double() - y).norm().item() for x, y in zip(leaves, truth[2], strict=False)]

    found = ours(
        parameters, targets, gradients, needs=NAMES[:3], backend=backend, max_chunk_bytes=rows * columns * 2
    )  # fmt: skip
    mine = [largest_error(x, y) for x, y in zip(found[:2], truth[:2], strict=True)]
    mine += [(x.cpu().double() - y).norm().item() for x, y in zip(found[2][:3], truth[2], strict=False)]
    # A tenth: both round the same logits, and the order of the sums differs. Two roundings of fp32 at 8 nats, 2e-6: a
    # GPU's log2 and exp2 are within 2 units, and on an H200 an entropy in fp16 was off by 1.58e-5 where the plain way's
    # was by 1.30e-5, of which the rounding of the logits is nearly all.
    own = [2 * torch.finfo(torch.float32).eps * x.abs().max().item() for x in truth[:2]] + [1e-6] * len(NAMES)
    for name, error, bound, slack in zip(("logp", "entropy", *NAMES), mine, plain, own, strict=False):
        assert error <= 1.1 * bound + slack, name


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("a",), ("b",), ("hidden", "a", "b"), ()])
def test_only_what_is_wanted_is_computed(needs, backend, device):
    parameters, targets, gradients = head(1, device=device)
    truth = exact(parameters, targets, gradients)
    if not needs:
        with torch.no_grad():
            stats = a3po_kernels.linear_token_logprobs(parameters[0], parameters[1], targets, backend=backend)
        assert not stats.logprobs.requires_grad
        return
    found = ours(parameters, targets, gradients, needs, backend=backend, max_chunk_bytes=1000)[2]
    for name, mine, expected in zip(NAMES, found, truth[2], strict=True):
        if name in needs:
            assert largest_error(mine, expected) < 1e-11, name
        else:
            assert mine is None


@pytest.mark.parametrize("route", ["token_logprobs", "one-pass", "recompute"])
def test_main_grad_is_added_to(route, backend, device):
    parameters, targets, _ = head(2, torch.float32, device)
    hidden, weight = (x.clone().requires_grad_() for x in parameters[:2])
    before = torch.randn(COLUMNS, WIDTH, device=device)

    def go(**options):
        if route == "token_logprobs":
            stats = a3po_kernels.linear_token_logprobs(hidden, weight, targets, backend=backend, **options)
            loss = stats.logprobs.sum()
        else:
            loss = a3po_kernels.linear_policy_loss(
                hidden[None], weight, targets[None], torch.ones(1, device=device), objective=a3po_kernels.dapo(),
                route=route, backend=backend, max_chunk_bytes=700, **options,
            ).loss  # fmt: skip
        (2 * loss).backward()

    go()
    expected, weight.grad = weight.grad, None
    main_grad = before.clone()
    go(main_grad=main_grad)
    assert weight.grad is None
    assert largest_error(main_grad, before + expected) < 1e-5


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has no grad_dtype")
@pytest.mark.parametrize("route", ["one-pass", "recompute"])
def test_fp32_gradient_of_a_low_precision_weight(route, backend, device):
    parameters, targets, _ = head(2, torch.bfloat16, device)
    hidden, weight = (x.clone().requires_grad_() for x in parameters[:2])
    weight.grad_dtype = torch.float32
    a3po_kernels.linear_policy_loss(
        hidden[None], weight, targets[None], torch.ones(1, device=device), objective=a3po_kernels.dapo(), route=route,
        backend=backend, max_chunk_bytes=300,
    ).loss.backward()  # fmt: skip
    assert weight.grad.dtype == torch.float32
    assert (weight.grad != weight.grad.bfloat16().float()).any(), "more than bf16 would hold"


def test_head_dtype_under_autocast(backend, device):
    """Autocast's dtype by default, as F.linear; an fp32 head where one is asked for."""
    parameters, targets, _ = head(4, torch.float32, device, width=64)
    truth = exact([*parameters[:2], 0 * parameters[2], *parameters[3:]], targets, torch.zeros(2, ROWS), scale=0.0)[0]

    def error(**options):
        hidden, weight = (x.clone().requires_grad_() for x in parameters[:2])
        with torch.autocast(targets.device.type, torch.bfloat16):
            stats = a3po_kernels.linear_token_logprobs(hidden, weight, targets, backend=backend, **options)
        stats.logprobs.sum().backward()
        assert stats.logprobs.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
        return largest_error(stats.logprobs, truth)

    assert error(head_dtype=torch.float32) < 1e-4 < 1e-2 < error()


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 1), (3, 100), (4096, 151936), (65536, 152064)])
@pytest.mark.parametrize("budget", [1, 100, 4096, 64 << 20, 1 << 30])
def test_tiles_cover_the_logits_within_the_budget(shape, budget):
    for tiles in (column_tiles(*shape, 2, budget), row_tiles(*shape, 2, budget)):
        assert sum(x.stop - x.start for x in tiles.row_slices()) == shape[0]
        assert sum(x.stop - x.start for x in tiles.column_slices()) == shape[1]
        assert len(list(tiles.row_slices())) == tiles.row_count
        smallest = 64 if tiles.columns < shape[1] else shape[1]  # columns are aligned; a row tile is a row at least
        assert tiles.rows * tiles.columns * 2 <= max(budget, 2 * smallest)
    if shape[0] and budget >= 2 * 1024 * shape[0]:
        assert column_tiles(*shape, 2, budget).row_count == 1, "a slice of the weight's gradient is written once"


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"weight": torch.zeros(4, 5)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must have shape"),
        ({"vocab_size": 42}, ValueError, "vocab_size must lie in"),
        ({"vocab_size": 4.0}, TypeError, "vocab_size must be an integer"),
        ({"lora": (torch.zeros(2, 6), torch.zeros(40, 2), 1.0)}, ValueError, "lora must hold"),
        ({"lora": torch.zeros(2, 6)}, TypeError, "lora must be a tuple"),
        ({"main_grad": torch.zeros(41, 6)}, ValueError, "main_grad was given for a weight"),
        ({"targets": torch.zeros(8, dtype=torch.long)}, ValueError, "targets must have shape"),
        ({"targets": torch.full((9,), 41)}, IndexError, "targets must lie in"),
        ({"max_chunk_bytes": 0}, ValueError, "max_chunk_bytes must be positive"),
        ({"max_chunk_bytes": 1e6}, TypeError, "max_chunk_bytes must be an integer"),
        ({"compaction": "some"}, ValueError, "compaction must be"),
        ({"head_dtype": torch.int8}, TypeError, "head_dtype"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    ],
)
def test_errors(change, error, message):
    (hidden, weight, *_), targets, _ = head(dtype=torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(error, match=message):
        a3po_kernels.linear_token_logprobs(**arguments)


def test_min_p_twin(backend, device):
    parameters, targets, _ = head(6, device=device)
    hidden, weight, bias, a, b = parameters
    logits = hidden @ (weight + 0.5 * b @ a).T + bias
    targets[1] = -100
    found = a3po_kernels.linear_min_p_token_logprobs(
        hidden, weight, targets, 0.1, bias=bias, lora=(a, b, 0.5), softcap=5.0, max_chunk_bytes=700, backend=backend
    )
    truth = reference.min_p_token_logprobs(logits.cpu(), targets.cpu(), 0.1, softcap=5.0)
    assert largest_error(found, truth) < 1e-11
