"""integrations.megatron inside Megatron-Core's own GPTModel, on the CPU: its logits, and every parameter's gradient."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import itertools
import sys
from types import ModuleType, SimpleNamespace
from unittest import mock

import docs_examples
import pytest
import torch

pytest.importorskip("megatron.core", reason="megatron-core is not installed; make test-megatron")
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, layers
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer import torch_norm
from megatron.core.transformer.module import float16_to_fp32
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_stand_in import KEYWORDS
from ranks import on_ranks
from trainer_stand_ins import printed_losses

from a3po_kernels import a3po, logprob_policy_loss
from a3po_kernels.integrations.megatron import HeadContext, output_processor

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        "output_processor" not in inspect.signature(GPTModel.forward).parameters,
        reason="this Megatron-Core has no output processor; 0.18.0 is the first that has",
    ),
]

V, H, B, S, LAYERS = 64, 32, 2, 8, 2


def on_the_cpu() -> None:
    """Megatron asks CUDA for a device, a stream and a state of random numbers, and refuses torch's norm its flag."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = lambda: None
    CudaRNGStatesTracker.fork = lambda self, *_, **__: contextlib.nullcontext()
    make = torch_norm.WrappedTorchNorm.__new__

    def norm(cls, config, *arguments, **keywords):
        split, config.sequence_parallel = config.sequence_parallel, False
        made = make(cls, config, *arguments, **keywords)
        config.sequence_parallel = split
        return made

    torch_norm.WrappedTorchNorm.__new__ = norm


def model(tied: bool, split: bool, scale: float, **options) -> GPTModel:
    """scale: of the logits, by MuP. options: of the config."""
    given = {"gradient_accumulation_fusion": False, **options}
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=H, num_attention_heads=4, use_cpu_initialization=True,
        tensor_model_parallel_size=torch.distributed.get_world_size(), sequence_parallel=split,
        pipeline_dtype=torch.float32, params_dtype=torch.float32, bias_activation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False,
        attention_dropout=0.0, hidden_dropout=0.0, add_bias_linear=False, apply_rope_fusion=False,
        **given,
    )  # fmt: skip
    torch.manual_seed(0)
    layer = get_gpt_layer_local_spec()
    made = GPTModel(
        config=config, transformer_layer_spec=layer, vocab_size=V, max_sequence_length=S,
        share_embeddings_and_output_weights=tied, position_embedding_type="rope",
        mtp_block_spec=get_gpt_mtp_block_spec(config, layer, False) if config.mtp_num_layers else None,
    )  # fmt: skip
    config.use_mup, config.mup_output_mult = scale != 1.0, scale
    return made


def gradients(made: GPTModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    made.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in made.named_parameters()}


def compare(tied: bool, split: bool, scale: float) -> dict[str, float]:
    """On a rank: the largest differences, relative to the largest value; gradients by the parameter's name."""
    made = model(tied, split, scale)
    g = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(0, V, (2, B, S), generator=g)
    factors, old = torch.randn(2, B, S, generator=g), torch.randn(B, S, generator=g) / 3 - 4
    advantages = torch.tensor([1.0, -0.7])
    causal = torch.triu(torch.ones(S, S, dtype=torch.bool), 1)[None, None]
    inputs = (ids, torch.arange(S).repeat(B, 1), causal)
    found: dict[str, float] = {}

    def note(kind: str, mine, theirs) -> None:
        for name, value in theirs.items():
            found[f"{kind} {name}"] = ((mine[name] - value).abs().max() / value.abs().max()).item()

    def theirs():
        logits = gather_from_tensor_model_parallel_region(made(*inputs)) / 0.7
        distribution = torch.log_softmax(logits, -1)
        return distribution.gather(-1, labels.unsqueeze(-1))[..., 0], -(distribution.exp() * distribution).sum(-1)

    def ours(context):
        out = made(*inputs, labels=labels, output_processor=output_processor, output_processor_context=context)
        assert float16_to_fp32(out) is out  # as Float16Module returns it
        return out

    logprobs, entropy = theirs()
    expected = gradients(made, (logprobs * factors[0] + entropy * factors[1]).sum())
    out = ours(HeadContext(temperature=0.7))
    note("value", vars(out), {"logprobs": logprobs.detach(), "entropy": entropy.detach()})
    note("gradient", gradients(made, (out.logprobs * factors[0] + out.entropy * factors[1]).sum()), expected)

    logprobs, entropy = theirs()
    loss = logprob_policy_loss(logprobs, advantages, objective=a3po(), entropy=entropy, old_logprobs=old).loss
    expected = gradients(made, loss)
    out = ours(HeadContext(a3po(), advantages, old_logprobs=old, temperature=0.7))
    note("value", {"loss": out.policy.loss.detach()}, {"loss": loss.detach()})
    note("policy gradient", gradients(made, out.policy.loss), expected)

    if scale == 1.0:  # Megatron's own loss, its negative log-prob
        loss = made(*inputs, labels=labels)
        plain = ours(None)
        note("value", {"negative": -plain.logprobs.detach()}, {"negative": loss.detach()})
        note("default gradient", gradients(made, -plain.logprobs.sum()), gradients(made, loss.sum()))
    return found


def compare_verl(tied: bool, split: bool) -> dict[str, float]:
    """On a rank: verl's processor as integrations.verl replaces it, beside verl's functions of split logits."""
    import a3po_kernels.integrations.verl  # noqa: F401

    module = importlib.import_module("verl.models.mcore.model_forward_fused")
    theirs = importlib.import_module("verl.utils.megatron.tensor_parallel")
    assert module.fused_output_processor.ours
    torch._dynamo.config.disable = True  # verl compiles a product
    made = model(tied, split, 1.0)
    g = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(0, V, (2, 1, S), generator=g)
    factors = torch.randn(2, S, generator=g)
    causal = torch.triu(torch.ones(S, S, dtype=torch.bool), 1)[None, None]
    inputs = (ids, torch.arange(S).unsqueeze(0), causal)
    logits = made(*inputs)[0] / 0.7
    logprobs = theirs.vocab_parallel_log_probs_from_logits(logits.clone(), labels[0])
    entropy = theirs.vocab_parallel_entropy(logits)
    expected = gradients(made, (logprobs * factors[0] + entropy * factors[1]).sum())
    context = module.FusedOutputProcessorContext(temperature=0.7)
    out = made(*inputs, labels=labels, output_processor=module.fused_output_processor, output_processor_context=context)
    assert module._use_output_processor_hook(made) is False  # not patched, and patching changes nothing:
    module.patch_fused_forward(made)
    assert module._use_output_processor_hook(made)
    found = gradients(made, (out.log_probs * factors[0] + out.entropy * factors[1]).sum())
    pairs = {name: (found[name], value) for name, value in expected.items()}
    pairs |= {"log-probs": (out.log_probs, logprobs), "entropy": (out.entropy, entropy)}
    return {name: ((mine - value).abs().max() / value.abs().max()).item() for name, (mine, value) in pairs.items()}


class Extension(ModuleType):
    """Megatron's CUDA extension for gradient_accumulation_fusion, as its name and its calls say."""

    @staticmethod
    def wgrad_gemm_accum_fp32(x: torch.Tensor, grad: torch.Tensor, main_grad: torch.Tensor) -> None:
        main_grad.add_(grad.t() @ x)


def predicting(fused: bool) -> DistributedDataParallel:
    """With multi-token prediction, an untied head, and Megatron's data parallelism."""
    made = model(False, False, 1.0, mtp_num_layers=1, gradient_accumulation_fusion=fused)
    wrapped = DistributedDataParallel(made.config, DistributedDataParallelConfig(overlap_grad_reduce=False), made)
    wrapped.zero_grad_buffer()
    return wrapped


def main_grad(fused: bool, scale: float) -> tuple[torch.Tensor, bool]:
    """(the head's, of the prediction's loss and the policy's times scale; whether a fused backward ran)."""
    wrapped = predicting(fused)
    g = torch.Generator().manual_seed(3)
    ids, labels = torch.randint(0, V, (2, B, S), generator=g)
    causal = torch.triu(torch.ones(S, S, dtype=torch.bool), 1)[None, None]
    context = HeadContext(a3po(), torch.tensor([1.0, -0.7]))
    for _ in range(2):  # micro-batches
        out = wrapped(
            ids, torch.arange(S).repeat(B, 1), causal, labels=labels, output_processor=output_processor,
            output_processor_context=context,
        )  # fmt: skip
        (scale * out.policy.loss).backward()
    weight = wrapped.module.output_layer.weight
    return weight.main_grad.clone(), weight.grad_added_to_main_grad


def run_fused() -> dict[str, torch.Tensor]:
    sys.modules["fused_weight_gradient_mlp_cuda"] = Extension("fused_weight_gradient_mlp_cuda")
    on_the_cpu()
    layers.fused_weight_gradient_mlp_cuda = sys.modules["fused_weight_gradient_mlp_cuda"]
    layers._grad_accum_fusion_available = True
    # What memory that nobody has written holds.
    layers.torch = SimpleNamespace(**{**vars(torch), "empty": lambda *shape, **kw: torch.empty(*shape, **kw).fill_(9)})
    parallel_state.initialize_model_parallel()
    found = {}
    for fused in (False, True):
        for scale in (0.0, 1.0):
            found[fused, scale], ran = main_grad(fused, scale)
            assert ran is fused
    return found


def test_the_heads_gradient_beside_a_fused_one():
    [found] = on_ranks(1, run_fused)
    own = found[False, 1.0] - found[False, 0.0]  # of the policy
    assert own.norm() > 0.1 * found[False, 0.0].norm() > 0
    for scale in (0.0, 1.0):
        error = (found[True, scale] - found[False, scale]).abs().max() / found[False, scale].abs().max()
        assert error < 2e-5, scale


def run_verl() -> list[dict[str, float]]:
    on_the_cpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=torch.distributed.get_world_size())
    return [compare_verl(*case) for case in itertools.product((False, True), (False, True))]


def run_all(cases: list[tuple]) -> list[dict[str, float]]:
    on_the_cpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=torch.distributed.get_world_size())
    return [compare(*case) for case in cases]


CASES = {
    1: [(tied, False, 1.0) for tied in (False, True)],
    2: [*itertools.product((False, True), (False, True), (1.0,)), (False, True, 0.5)],
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_gpt_model_through_the_processor(ranks):
    for each in on_ranks(ranks, run_all, CASES[ranks]):
        for case, found in zip(CASES[ranks], each, strict=True):
            assert len(found) > 20
            for name, error in found.items():
                assert error < 2e-5, (case, name)  # fp32 through two layers


def test_gpt_model_through_verls_processor():
    pytest.importorskip("verl", reason="verl is not installed beside Megatron-Core")
    for each in on_ranks(2, run_verl):
        for found in each:
            assert len(found) > 10
            assert max(found.values()) < 2e-5, found


def run_script(script: str, tensor_parallel: int) -> str:
    """What a rank prints of the manual's script, in the group that is there already."""
    on_the_cpu()
    sys.argv = ["train_megatron.py", "--tp", str(tensor_parallel)]
    dist, printed = torch.distributed, io.StringIO()
    with (
        mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"),
        mock.patch.object(torch.cuda, "is_available", return_value=False), contextlib.redirect_stdout(printed),
    ):  # fmt: skip
        exec(compile(script, "train_megatron.py", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def test_the_script_of_the_manual():
    """Four steps that lower the loss, the same split over two ranks; two data-parallel ranks have twice the tokens."""
    [script] = docs_examples.blocks(docs_examples.ROOT / "docs" / "trainers" / "megatron.md")
    [whole], [split, _], [data, _] = (
        on_ranks(ranks, run_script, script, tensor_parallel) for ranks, tensor_parallel in ((1, 1), (2, 2), (2, 1))
    )
    losses = printed_losses(whole)
    assert len(losses) == 4 and abs(losses[0]) < 1e-6 and losses[3] < losses[2] < losses[1] < -1e-3
    assert printed_losses(split) == pytest.approx(losses, abs=2e-6)
    assert "'token_count': 192.0" in whole and "'token_count': 192.0" in split
    assert "'token_count': 384.0" in data and printed_losses(data)[3] < -1e-3


def test_the_call_has_the_keywords_of_ours():
    """KEYWORDS, from which the stand-in calls, are those of the installed GPTModel."""
    source = inspect.getsource(GPTModel._postprocess)
    call = source[source.index("return output_processor(") :]
    call = call[: call.index("\n            )")]
    assert [line.strip().split("=")[0] for line in call.splitlines()[1:]] == KEYWORDS
