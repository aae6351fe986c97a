"""integrations.trl_kernels: TRL's loss-head functions by ours in their signatures, and what install() swaps."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("trl")
from trl.kernels import ChunkedLogProbFunction as Theirs
from trl.trainer import utils

from a3po_kernels.integrations import trl_kernels
from a3po_kernels.integrations.trl_kernels import ChunkedLogProbFunction, selective_log_softmax_and_entropy

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]

ROWS, WIDTH, VOCABULARY = 9, 16, 203


@pytest.fixture(autouse=True)
def nothing_stays():
    before = dict(vars(utils))
    yield
    assert {name: value for name, value in vars(utils).items() if before.get(name) is not value} == {}


# -- signatures --------------------------------------------------------------------------------------------------------


def parameters(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


def test_signatures_are_trls():
    """Of the package, and of the Hub's trl-lib/trl-losses, version 0, which kernels.get_kernel loads."""
    published = [("logits", inspect.Parameter.empty), ("index", inspect.Parameter.empty), ("temperature", 1.0),
                 ("row_mask", None)]  # fmt: skip
    assert parameters(selective_log_softmax_and_entropy) == published
    assert parameters(Theirs.forward)[1:] == parameters(ChunkedLogProbFunction.apply)
    kernels = pytest.importorskip("trl.kernels.logprob_entropy")
    assert parameters(kernels.selective_log_softmax_and_entropy) == published


# -- logits ------------------------------------------------------------------------------------------------------------


def logits(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Rows of a longer sequence, as the trainers cut them: not contiguous.
    whole = (4.0 * torch.randn(3, ROWS + 2, VOCABULARY, generator=generator)).to(dtype)
    index = torch.randint(VOCABULARY, (3, ROWS), generator=generator)
    mask = torch.rand(3, ROWS, generator=generator) < 0.6
    weights = torch.randn(2, 3, ROWS, generator=generator)
    return whole.requires_grad_(), index, mask, weights


def logits_case(function, dtype, temperature, masked, flag=True):
    whole, index, mask, weights = logits(dtype)
    row_mask = mask.to({True: torch.bool, False: torch.int64}[flag]) if masked else None
    results = function(whole[:, 1:-1], index, temperature=temperature, row_mask=row_mask)
    sum((w * r).sum() for w, r in zip(weights, results, strict=True)).backward()
    return *(r.detach() for r in results), whole.grad


def exact(logits, index, temperature, row_mask):
    logps = (logits.double() / temperature).log_softmax(-1)
    results = logps.gather(-1, index.unsqueeze(-1))[..., 0], -(logps.exp() * logps).sum(-1)
    return results if row_mask is None else tuple(r.masked_fill(row_mask == 0, 0.0) for r in results)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits(dtype, temperature, masked):
    ours = logits_case(selective_log_softmax_and_entropy, dtype, temperature, masked)
    theirs = logits_case(utils.selective_log_softmax_and_entropy, dtype, temperature, masked)
    truth = logits_case(exact, dtype, temperature, masked)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert ours[0].dtype == ours[1].dtype == wide  # as TRL's kernel; its CPU path rounds half precision
    for mine, reference, true in zip(ours, theirs, truth, strict=True):
        error = (mine.double() - true.double()).abs().max()
        rounding = torch.finfo(wide if mine.dtype == wide else mine.dtype).eps
        assert error <= max(8 * rounding * true.abs().max(), (reference.double() - true.double()).abs().max())


def test_the_mask_may_be_integers():
    for mine, reference in zip(
        logits_case(selective_log_softmax_and_entropy, torch.float32, 0.7, True, flag=False),
        logits_case(selective_log_softmax_and_entropy, torch.float32, 0.7, True), strict=True,
    ):  # fmt: skip
        assert torch.equal(mine, reference)


def test_what_trl_passes_on_goes_to_ours():
    """Each of TRL's functions of logits, in the shapes and dtypes of its callers."""
    whole, index, mask, _ = logits(torch.bfloat16)
    rows = whole[:, 1:-1]
    with trl_kernels.install() as installed:
        both = utils.selective_log_softmax_and_entropy(rows, index, temperature=0.7, row_mask=mask)
        frozen = utils.selective_log_softmax_and_entropy(rows, index, entropy_requires_grad=False)
        alone = utils.selective_log_softmax(rows, index, temperature=0.7, row_mask=mask)
        entropy = utils.entropy_from_logits(rows[0])
        assert installed.calls == {"selective_log_softmax_and_entropy": 4}
        top = utils.selective_log_softmax(rows, index.unsqueeze(-1).expand(-1, -1, 2))
        assert installed.calls == {"selective_log_softmax_and_entropy": 4, "left to TRL": 1}
    expected = selective_log_softmax_and_entropy(rows, index, temperature=0.7, row_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(both, expected, strict=True))
    assert torch.equal(alone, expected[0])
    plain = selective_log_softmax_and_entropy(rows, index)
    assert torch.equal(frozen[0], plain[0])
    assert torch.equal(frozen[1], plain[1])
    assert frozen[0].requires_grad
    assert not frozen[1].requires_grad
    assert torch.equal(entropy, plain[1][0])
    torch.testing.assert_close(top[..., 0].float(), plain[0], rtol=1e-2, atol=5e-2)


def test_a_forbidden_token_has_no_entropy():
    """TRL's torch code gives NaN where a logit is -inf."""
    whole, index, _, _ = logits()
    banned = whole.detach().clone()
    banned[..., 5] = -torch.inf
    index[index == 5] = 6
    banned.requires_grad_()
    theirs = utils.selective_log_softmax_and_entropy(banned[:, 1:-1], index)
    assert theirs[1].isnan().all()
    ours = selective_log_softmax_and_entropy(banned[:, 1:-1], index)
    ours[1].sum().backward()
    kept = torch.cat([banned.detach()[..., :5], banned.detach()[..., 6:]], -1).double()[:, 1:-1]
    distribution = torch.distributions.Categorical(logits=kept)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), distribution.entropy(), rtol=1e-5, atol=1e-5)
    assert banned.grad.isfinite().all()
    assert (banned.grad[..., 5] == 0).all()


def test_logits_refusals():
    whole, index, mask, _ = logits()
    rows = whole[:, 1:-1]
    with pytest.raises(ValueError, match=r"row_mask must be bool or integers of index's shape \[3, 9\]"):
        selective_log_softmax_and_entropy(rows, index, row_mask=mask[:, :-1])
    with pytest.raises(ValueError, match=r"row_mask must be bool or integers .* got torch\.float32"):
        selective_log_softmax_and_entropy(rows, index, row_mask=mask.float())
    with pytest.raises(ValueError, match="temperature"):
        selective_log_softmax_and_entropy(rows, index, temperature=0.0)
    with pytest.raises(IndexError, match="-100"):  # a label that is to be ignored is for row_mask to say, as in TRL
        selective_log_softmax_and_entropy(rows, index.masked_fill(~mask, -100))
    with pytest.raises(ValueError, match="targets"):
        selective_log_softmax_and_entropy(rows, index.unsqueeze(-1))


# -- hidden states -----------------------------------------------------------------------------------------------------


def head(dtype=torch.float32, weight_dtype=None, bias=False, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(VOCABULARY, WIDTH, generator=generator)).to(weight_dtype or dtype)
    # A wide bias makes softcap and maximum matter; the target is the first maximum in some rows.
    offset = torch.linspace(-2.0, 2.0, VOCABULARY).to(weight_dtype or dtype) if bias else None
    product = hidden.float() @ weight.float().t() + (0.0 if offset is None else offset.float())
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    targets[::3] = product.argmax(-1)[::3]
    for tensor in (hidden, weight, offset):
        if tensor is not None:
            tensor.requires_grad_()
    return hidden, weight, offset, targets


HEADS = {
    "plain": {}, "bias": {"bias": True}, "cap": {"cap": 1.5}, "scale": {"scale": 0.25},
    "all": {"bias": True, "cap": 1.5, "scale": 0.25},
}  # fmt: skip


def head_case(function, dtype=torch.float32, weight_dtype=None, bias=False, cap=None, scale=1.0, chunk=64, seed=0):
    hidden, weight, offset, targets = head(dtype, weight_dtype, bias)
    results = function.apply(hidden, weight, offset, targets, 0.7, chunk, cap, scale, trl_kernels.OUTPUTS)
    ups = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(5))
    ups[:, 4:6] = 0.0  # rows that the trainer masks
    sum((up * r).sum() for up, r in zip(ups, results, strict=False)).backward()
    gradients = [t.grad for t in (hidden, weight, offset) if t is not None]
    return [r.detach() for r in results], gradients


@pytest.mark.parametrize("tile", [None, 1024])  # bytes; the latter is 64 columns of one row
@pytest.mark.parametrize("name", HEADS)
def test_hidden_states(name, tile):
    theirs, gradients = head_case(Theirs, **HEADS[name])
    with trl_kernels.install(max_chunk_bytes=tile):
        ours, my_gradients = head_case(ChunkedLogProbFunction, **HEADS[name])
    assert len(ours) == len(theirs) == 5
    for mine, reference in zip(ours[:4], theirs[:4], strict=True):
        assert mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, rtol=2e-6, atol=4e-6)
    assert torch.equal(ours[4], theirs[4])
    assert ours[4].any()
    assert not ours[4].all()
    for mine, reference in zip(my_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_in_half_precision(weight_dtype):
    """The products are in the hidden states' dtype, as TRL's; both round there, and no farther from fp32 than TRL."""
    kinds = {"dtype": torch.bfloat16, "weight_dtype": weight_dtype, "bias": True}
    (ours, my_gradients), (theirs, gradients) = (head_case(f, **kinds) for f in (ChunkedLogProbFunction, Theirs))

    class Exact:
        @staticmethod
        def apply(hidden, weight, offset, *rest):
            return Theirs.apply(hidden.float(), weight.float(), offset.float(), *rest)

    (true, true_gradients) = head_case(Exact, **kinds)
    for mine, reference, truth in zip(ours[:4], theirs[:4], true[:4], strict=True):
        assert mine.dtype == torch.float32
        assert (mine - truth).norm() <= 1.2 * (reference - truth).norm() + 1e-5
    for mine, reference, truth in zip(my_gradients, gradients, true_gradients, strict=True):
        assert mine.dtype == reference.dtype
        error, bound = (mine.float() - truth.float()).norm(), (reference.float() - truth.float()).norm()
        assert error <= 1.2 * bound + 1e-6


def test_the_products_are_in_the_hidden_states_dtype():
    hidden, weight, _, targets = head(torch.bfloat16, torch.float32)
    wide = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64)
    narrow = ChunkedLogProbFunction.apply(hidden, weight.bfloat16(), None, targets, 1.0, 64)
    assert all(torch.equal(a, b) for a, b in zip(wide, narrow, strict=True))
    assert torch.autograd.grad(wide[0].sum(), weight)[0].dtype == torch.float32


def test_under_autocast():
    def both(function):
        with torch.autocast("cpu", torch.bfloat16):
            return head_case(function)

    (ours, my_gradients), (theirs, gradients) = both(ChunkedLogProbFunction), both(Theirs)
    for mine, reference in zip([*ours[:4], *my_gradients], [*theirs[:4], *gradients], strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-2, atol=2e-2)
    assert not torch.equal(ours[0], head_case(ChunkedLogProbFunction)[0][0])


def test_the_first_of_two_maxima_is_the_prediction():
    weight = head()[1].detach()
    weight[100] = weight[40]
    hidden = (4.0 * weight[40]).expand(2, WIDTH)
    targets = torch.tensor([40, 100])
    for tile in (None, 1024):
        with trl_kernels.install(max_chunk_bytes=tile):
            for function in (Theirs, ChunkedLogProbFunction):
                assert function.apply(hidden, weight, None, targets, 1.0, 64)[4].tolist() == [True, False]


def test_only_what_is_asked_for():
    hidden, weight, _, targets = head()
    for outputs in ((), ("log_probs",), ("entropy",), ("log_probs", "is_top1")):
        results = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, outputs)
        there = [name for name, value in zip(trl_kernels.OUTPUTS, results, strict=True) if value is not None]
        assert set(there) == {"log_probs", *outputs}
    none = ChunkedLogProbFunction.apply(hidden[:0], weight, None, targets[:0], 1.0, 64)
    assert [tuple(value.shape) for value in none] == [(0,)] * 5


def test_head_refusals():
    hidden, weight, _, targets = head()
    with pytest.raises(ValueError, match=r"outputs must be among .* got 'margin'"):
        ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ("margin",))
    with pytest.raises(ValueError, match="chunk_size"):
        ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 0)
    with pytest.raises(IndexError, match="-100"):
        ChunkedLogProbFunction.apply(hidden, weight, None, targets.fill_(-100), 1.0, 64)


# -- install -----------------------------------------------------------------------------------------------------------


def test_install_and_undo():
    own = utils._ChunkedLogProbFunction
    assert own is Theirs
    installed = trl_kernels.install(max_chunk_bytes=1 << 20, compaction="none")
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with pytest.raises(RuntimeError, match="in force already"):
        trl_kernels.install()
    installed.undo()
    installed.undo()
    assert utils._ChunkedLogProbFunction is own
    with pytest.raises(KeyError), trl_kernels.install():
        raise KeyError
    assert utils._ChunkedLogProbFunction is own
    with pytest.raises(ValueError, match="max_chunk_bytes"):
        trl_kernels.install(max_chunk_bytes=0)
    with pytest.raises(ValueError, match="compaction"):
        trl_kernels.install(compaction="some")


def test_options_reach_the_head(monkeypatch):
    found = []
    monkeypatch.setattr(
        trl_kernels, "linear_token_logprobs", lambda *a, **k: found.append((k["max_chunk_bytes"], k["compaction"]))
    )
    hidden, weight, _, targets = head()

    def call():
        with pytest.raises(AttributeError):
            ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64)

    call()
    with trl_kernels.install(max_chunk_bytes=1 << 20, compaction="none"):
        call()
    assert found == [(64 * 4096 * 4, "exact"), (1 << 20, "none")]


def test_another_trl_is_refused(monkeypatch):
    monkeypatch.delattr(utils, "_supports_trl_loss_kernel")
    with pytest.raises(RuntimeError, match=r"no _supports_trl_loss_kernel, which TRL 1\.16 has; this is TRL 1"):
        trl_kernels.install()
