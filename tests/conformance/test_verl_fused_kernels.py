"""integrations.verl under use_fused_kernels=True: every backend of verl's, through verl's own forwards."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytest.importorskip("verl")
import verl
from omegaconf import OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.experimental import torch_functional as verl_torch
from verl.utils.kernel import linear_cross_entropy as verl_triton

from a3po_kernels.integrations import verl as integration

pytestmark = pytest.mark.verl

VERL = Path(verl.__file__).parent
DEFAULT = OmegaConf.load(VERL / "trainer/config/model/hf_model.yaml").fused_kernel_options.impl_backend
BACKENDS = ["torch", "liger", "triton"]
FAMILIES = ["dense_common", "glm4v", "qwen2_vl", "qwen3_5", "qwen3_vl"]
ORIGINAL = verl_torch.FusedLinearForPPOFunction


@pytest.fixture
def calls(monkeypatch):
    """The keywords of each call of our head; verl's own heads raise."""
    found = []

    def counted(*arguments, **keywords):
        found.append(keywords)
        return own(*arguments, **keywords)

    def forbidden(*arguments, **keywords):
        raise AssertionError("verl's own head was called")

    own = integration.linear_token_logprobs
    monkeypatch.setattr(integration, "linear_token_logprobs", counted)
    monkeypatch.setattr(verl_torch, "FusedLinearForPPOFunction", SimpleNamespace(apply=forbidden))
    monkeypatch.setattr(verl_torch, "_LIGER_FUSED_LINEAR_SCALED_CROSS_ENTROPY", SimpleNamespace(apply=forbidden))
    monkeypatch.setattr(verl_triton.LinearCrossEntropy, "forward", forbidden)
    return found


def rows(dtype=torch.float32, shape=(2, 5), seed=0):
    """hidden [..., 16], weight [40, 16] and ids, and the factors of log-probs and entropies in a loss."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(0, 40, shape, generator=generator)
    return hidden, weight, ids, torch.randn(2, *shape, generator=generator)


def plain(hidden, weight, ids, temperature):
    """The formula, in the dtype of its arguments."""
    distribution = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    return distribution.gather(-1, ids.unsqueeze(-1)).squeeze(-1), entropy


def loss(logprobs, entropy, factors):
    return (logprobs.reshape(-1) * factors[0].reshape(-1)).sum() - (entropy.reshape(-1) * factors[1].reshape(-1)).sum()


def relative(mine, exact):
    return ((mine.double() - exact.double()).norm() / exact.double().norm()).item()


# -- a model that verl has patched ------------------------------------------------------------------------------------


def model(tied):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied)).eval()


def model_gradients(made, logprobs, entropy, factors):
    loss(logprobs, entropy, factors).backward()
    return {name: parameter.grad for name, parameter in made.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("implementation", ["default", *BACKENDS])
def test_use_fused_kernels_is_our_head(implementation, temperature, tied, calls, monkeypatch):
    """As the FSDP engine does: verl's monkey patch, then a forward with a temperature and labels that are shifted."""
    backend = DEFAULT if implementation == "default" else implementation
    mine = model(tied)
    theirs, exact = copy.deepcopy(mine), copy.deepcopy(mine).double()
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, 40, (2, 2, 6), generator=generator)
    factors = torch.randn(2, 2, 6, generator=generator)

    expected = ORIGINAL.apply(theirs.model(ids)[0], theirs.lm_head.weight, labels, temperature, 5)
    their_gradients = model_gradients(theirs, *expected, factors)
    truth = plain(exact.model(ids)[0], exact.lm_head.weight, labels, temperature)
    true_gradients = model_gradients(exact, *truth, factors.double())

    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)  # verl patches the class
    apply_monkey_patch(mine, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend)
    output = mine(input_ids=ids, temperature=temperature, return_dict=True, shift_labels=labels)
    gradients = model_gradients(mine, output.log_probs, output.entropy, factors)

    assert len(calls) == 1 and calls[0]["temperature"] == temperature
    # Logits below 1 of sums of 32 terms, and statistics near 4, in fp32: a few roundings of 2^-22.
    for result, reference, true in zip((output.log_probs, output.entropy), expected, truth, strict=True):
        assert result.dtype == torch.float32
        assert result.shape == ((12,) if backend == "triton" else (2, 6))
        torch.testing.assert_close(result.view(2, 6), reference, atol=2e-6, rtol=0)
        torch.testing.assert_close(result.view(2, 6).double(), true, atol=2e-6, rtol=0)
    assert gradients.keys() == true_gradients.keys()
    for name, true in true_gradients.items():
        assert relative(gradients[name], true) < 4e-6, name
        assert relative(gradients[name], their_gradients[name]) < 4e-6, name


def test_verl_calls_its_own_head_elsewhere():
    """What the test above rests on: the default is FusedLinearForPPO, and these files alone have fused forwards."""
    assert DEFAULT == "torch"
    found = {}
    for path in VERL.rglob("*.py"):
        text = path.read_text()
        name = path.relative_to(VERL).as_posix()
        if re.search(r"\bFusedLinearForPPO\(impl|[= ]linear_cross_entropy\($", text, re.MULTILINE):
            found[name] = text
    families = {f"models/transformers/{family}.py" for family in FAMILIES}
    megatron = {f"models/mcore/{name}.py" for name in ("model_forward_fused", "model_forward_1f1b_overlap")}
    assert found.keys() == families | megatron
    # Megatron's import the name at their top, where install_head puts ours.
    for name in megatron:
        assert "\nfrom verl.utils.kernel.linear_cross_entropy import linear_cross_entropy\n" in found[name]


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_of_every_family(family, implementation, calls):
    """On a stand-in for the model, whose body gives hidden states."""
    module = importlib.import_module(f"verl.models.transformers.{family}")
    hidden, weight, ids, factors = rows()
    stand_in = SimpleNamespace(
        model=lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden),
        lm_head=SimpleNamespace(weight=weight), _verl_fused_kernels_backend=implementation,
        config=SimpleNamespace(output_attentions=False, output_hidden_states=False),
    )  # fmt: skip
    forward = module.forward_with_triton_backend if implementation == "triton" else module.forward_with_torch_backend
    positions = torch.zeros(4, *ids.shape, dtype=torch.long)  # as vision-language models want them
    output = forward(stand_in, input_ids=ids, position_ids=positions, temperature=0.7, return_dict=True)
    loss(output.log_probs, output.entropy, factors).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = plain(*exact, ids.roll(-1, dims=-1), 0.7)
    loss(*truth, factors.double()).backward()
    assert len(calls) == 1
    torch.testing.assert_close(output.log_probs.view(2, 5).double(), truth[0].detach(), atol=5e-6, rtol=0)
    torch.testing.assert_close(output.entropy.view(2, 5).double(), truth[1].detach(), atol=5e-6, rtol=0)
    for mine, true in zip((hidden, weight), exact, strict=True):
        assert relative(mine.grad, true.grad) < 2e-6


# -- the class --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", ["both", "log-probs", "entropy"])
@pytest.mark.parametrize("shape", [(90,), (3, 30)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_class_is_at_least_as_exact_as_verls(dtype, shape, outputs, calls):
    hidden, weight, ids, factors = rows(dtype, shape)
    factors = factors * torch.tensor([outputs != "entropy", outputs != "log-probs"]).view(2, *[1] * len(shape))
    results = {}
    for name, function, kind in (
        ("ours", verl_torch.FusedLinearForPPO(), dtype), ("theirs", lambda *a: ORIGINAL.apply(*a, 512), dtype),
        ("exact", plain, torch.float64),
    ):  # fmt: skip
        given = [x.detach().to(kind).requires_grad_() for x in (hidden, weight)]
        found = function(*given, ids.int() if name == "ours" else ids, 0.7)
        loss(*found, factors.to(kind)).backward()
        results[name] = [*(x.detach() for x in found), *(x.grad for x in given)]
    assert len(calls) == 1
    assert [x.dtype for x in results["ours"]] == [torch.float32, torch.float32, dtype, dtype]
    assert [x.shape for x in results["ours"]] == [x.shape for x in results["theirs"]]
    slack = 1.25 if dtype == torch.float32 else 1.0  # in fp32 both are a few roundings off
    for mine, theirs, exact in zip(results["ours"], results["theirs"], results["exact"], strict=True):
        assert relative(mine, exact) <= slack * relative(theirs, exact) + 1e-7


def test_the_class_stays_the_class_it_is(calls):
    """Its constructor, and what was imported or made before: the replacement is on the class."""
    with pytest.raises(ValueError, match="backend: triton"):
        verl_torch.FusedLinearForPPO(impl_backend="triton")
    made = verl_torch.FusedLinearForPPO(chunk_size=3, impl_backend="liger")
    hidden, weight, ids, _ = rows(shape=(7,))
    made(hidden, weight, ids)
    verl_torch.FusedLinearForPPO.forward(
        verl_torch.FusedLinearForPPO(), hidden_states=hidden, vocab_weights=weight, input_ids=ids, temperature=1.0
    )
    # Three rows of 40 logits in fp32; the default leaves the tile to us.
    assert [call["max_chunk_bytes"] for call in calls] == [3 * 40 * 4, None]


def test_a_module_that_has_imported_the_function_before(monkeypatch):
    theirs = verl_triton.LinearCrossEntropy.apply
    early, outside = ModuleType("verl.early"), ModuleType("mine")
    early.linear_cross_entropy = early.head = outside.head = theirs
    early.other = other = object()
    for module in (early, outside):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(verl_triton, "linear_cross_entropy", theirs)
    integration.install_head()
    assert early.linear_cross_entropy is early.head is integration.linear_cross_entropy
    assert verl_triton.linear_cross_entropy is integration.linear_cross_entropy
    assert outside.head is theirs and early.other is other


def test_what_the_class_cannot_do_is_refused():
    hidden, weight, ids, _ = rows()
    with pytest.raises(ValueError, match=r"input_ids must have shape \[2, 5\]; got \[10\]"):
        verl_torch.FusedLinearForPPO()(hidden, weight, ids.flatten())
    with pytest.raises(TypeError, match="temperature must be a number; got str"):
        verl_torch.FusedLinearForPPO()(hidden, weight, ids, "0.7")


def test_a_split_head_is_refused(tmp_path):
    """An untied head under FSDP2, which verl wraps by itself."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        hidden, weight, ids, _ = rows()
        split = distribute_tensor(weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match=r"vocab_weights is a DTensor .*tied head"):
            verl_torch.FusedLinearForPPO()(hidden, split, ids)
        with pytest.raises(ValueError, match=r"weight is a DTensor .*tied head"):
            integration.linear_cross_entropy(hidden, split, ids)
    finally:
        torch.distributed.destroy_process_group()
