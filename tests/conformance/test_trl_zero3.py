"""Heads that ZeRO-3 partitions: a stand-in that has nothing outside of a gather, and DeepSpeed where it is installed.

DeepSpeed is in no environment of this project: with DeepSpeed 0.19.8, hjson, py-cpuinfo, msgpack, ninja and einops on
PYTHONPATH and DS_ACCELERATOR=cpu the last tests run on two processes.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("trl")
import tiny
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

from a3po_kernels.integrations import trl_kernels
from a3po_kernels.integrations.transformers import check_head, policy_loss_from_model, token_logprobs_from_model
from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]


# -- a stand-in --------------------------------------------------------------------------------------------------------


class BeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, gather: Callable[[], None]) -> Tensor:
        ctx.gather = gather
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.gather()
        return gradient, None


class Partitioned:
    """A model whose parameters have no values but inside their module's forward and its backward, as ZeRO-3's.

    What the head's were is NaN afterwards: nobody may have kept a view of them, as PyTorch's own layers may.
    Gradients are taken off the parameters as they come, and put together by name.
    """

    def __init__(self, model: nn.Module):
        self.values = {parameter: parameter.data.clone() for parameter in model.parameters()}
        self.gradients: dict[str, Tensor] = {}
        self.head = set(model.get_output_embeddings().parameters())
        names = {parameter: name for name, parameter in model.named_parameters()}
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own:
                module.register_forward_pre_hook(lambda _module, _args, own=own: self.gather(own))
                module.register_forward_hook(lambda _module, _args, output, own=own: self.after(own, output))
        for parameter in self.values:
            parameter.register_post_accumulate_grad_hook(lambda p: self.take(p, names[p]))
        self.release(self.values)

    def gather(self, parameters) -> None:
        for parameter in parameters:
            parameter.data = self.values[parameter].clone()

    def release(self, parameters) -> None:
        for parameter in parameters:
            if parameter in self.head:
                parameter.data.fill_(torch.nan)
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def after(self, parameters, output: Tensor) -> Tensor:
        self.release(parameters)
        return BeforeBackward.apply(output, lambda: self.gather(parameters))

    def take(self, parameter: Tensor, name: str) -> None:
        self.gradients[name], parameter.grad = parameter.grad, None
        self.release([parameter])

    def all_away(self) -> bool:
        return all(parameter.numel() == 0 for parameter in self.values)


@pytest.mark.parametrize("options", [{}, {"route": "recompute"}, {"route": "one-pass"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "tied", "softcap", "bias"])
def test_the_head_is_read_inside_its_hooks(name, options):
    batch = tiny.batch()
    model = tiny.build(name)
    whole = policy_loss_from_model(model, batch, "grpo", **options)
    whole.loss.backward()
    expected = tiny.gradients(model)
    parts = Partitioned(model)
    for _ in range(2):  # the first use is checked
        out = policy_loss_from_model(model, batch, "grpo", **options)
        assert parts.all_away()
        assert torch.equal(out.loss, whole.loss)
        assert torch.equal(out.logprobs, whole.logprobs)
        out.loss.backward()
        assert parts.all_away()
        assert parts.gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            assert torch.equal(parts.gradients.pop(key), gradient), key
    with torch.no_grad():
        assert torch.equal(token_logprobs_from_model(model, batch).logprobs, whole.logprobs)
    assert parts.all_away()


def test_the_stand_in_notices_a_read_outside():
    model = tiny.build("llama")
    Partitioned(model)
    with pytest.raises(RuntimeError):
        torch.ones(1, 32) @ model.lm_head.weight.t()
    with pytest.raises(ValueError, match=r"the head's weight has shape \[0\] outside of its own forward"):
        check_head(model)


# -- TRL's fused head, whose weight is read beside its module ----------------------------------------------------------


class PartitionedWeight:
    """A parameter as DeepSpeed's, and TRL's context that gathers it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, weight: Tensor):
        self.parameter, self.value = nn.Parameter(weight.clone()), weight
        self.parameter.ds_id, self.parameter.ds_shape, self.entered = 0, weight.shape, 0
        monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", self.gathered)
        self.parameter.data = torch.empty(0)

    @contextmanager
    def gathered(self, *_: Tensor | None):
        self.entered += 1
        self.parameter.data = self.value.clone()
        yield
        self.parameter.data.fill_(torch.nan)
        self.parameter.data = torch.empty(0)


def fused(weight: Tensor, hidden: Tensor, targets: Tensor):
    return trl_kernels.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 0.7, 64)


@pytest.mark.parametrize("gathered", [False, True], ids=["away", "gathered-by-its-module"])
def test_backward_gathers_the_weight_again(gathered, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator).requires_grad_()
    targets = torch.arange(7)
    stats = fused(weight, hidden, targets)
    expected = torch.autograd.grad((stats[0] + 0.1 * stats[1]).sum(), (hidden, weight))
    part = PartitionedWeight(monkeypatch, weight.detach())
    with utils.maybe_gather_lm_head_ctx(part.parameter):
        stats = fused(part.parameter, hidden, targets)
    assert part.parameter.numel() == 0
    if gathered:
        part.parameter.data = part.value
    found = torch.autograd.grad((stats[0] + 0.1 * stats[1]).sum(), (hidden, part.parameter))
    assert part.entered == (1 if gathered else 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="weight must have shape"):
        part.parameter.data = torch.empty(0)
        fused(part.parameter, hidden, targets)


# -- DeepSpeed ---------------------------------------------------------------------------------------------------------

RANKS, ROLLOUTS, STEPS = 2, 8, 3
# Nothing is kept gathered: neither small parameters, nor those that come again soon.
ZERO3 = {
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0,
    },
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}  # fmt: skip


def inputs(rank: int, ranks: int) -> dict[str, Tensor]:
    """One rank's rows of a batch as GRPOTrainer makes it."""
    batch = tiny.batch(rollouts=ROLLOUTS)
    prompt = batch["input_ids"].shape[1] - batch["completion_mask"].shape[1]
    shape = batch["completion_mask"].shape
    whole = {
        "prompt_ids": batch["input_ids"][:, :prompt], "prompt_mask": batch["attention_mask"][:, :prompt],
        "completion_ids": batch["input_ids"][:, prompt:], "completion_mask": batch["attention_mask"][:, prompt:],
        "advantages": batch["advantages"],
        "old_per_token_logps": -3.3 + 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(3)),
    }  # fmt: skip
    rows = slice(rank * ROLLOUTS // ranks, (rank + 1) * ROLLOUTS // ranks)
    return {name: values[rows] for name, values in whole.items()} | {
        "num_items_in_batch": whole["completion_mask"].sum()
    }


def train(kind: str, folder: str, output: str, rank: int = 0, ranks: int = 1, lora: bool = False):
    """(trained parameters by name, losses) of three steps on that batch."""
    options = {"deepspeed": ZERO3} if ranks > 1 else {"use_cpu": True}
    options |= {"objective": "dapo"} if kind == "ours" else {"loss_type": "dapo", "epsilon_high": 0.28}
    trainer, configuration = (A3POTrainer, A3POConfig) if kind == "ours" else (GRPOTrainer, GRPOConfig)
    args = configuration(
        output, per_device_train_batch_size=ROLLOUTS // ranks, num_generations=4, max_steps=STEPS, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], logging_steps=1, bf16=False, save_strategy="no", optim="sgd",
        disable_tqdm=True, gradient_checkpointing=False, max_grad_norm=1e9, max_completion_length=7, **options,
    )  # fmt: skip
    more = {}
    if lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    made = trainer(
        model=folder, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1+2="] * 32}), **more,
    )  # fmt: skip
    made._prepare_inputs = lambda _batch: inputs(rank, ranks)
    if ranks > 1:
        from accelerate import PartialState

        # On a CPU accelerate does not count DeepSpeed's ranks.
        PartialState._shared_state.update(num_processes=ranks, process_index=rank, local_process_index=rank)
    if kind == "swapped":
        with trl_kernels.install() as installed:
            made.train()
        assert installed.calls == {"ChunkedLogProbFunction": STEPS}
    else:
        made.train()
    losses = [entry["loss"] for entry in made.state.log_history[:-1]]
    if ranks == 1:
        return {name: p.detach().clone() for name, p in made.model.named_parameters()}, losses
    import deepspeed

    named = dict(made.deepspeed.module.named_parameters())
    assert all(p.numel() == 0 for p in named.values()), "nothing stays gathered"
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: p.detach().clone() for name, p in named.items()}, losses


def worker(rank: int, port: int, kind: str, folder: str, output: str, lora: bool) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", RANK=str(rank), LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    result = train(kind, folder, output, rank, RANKS, lora)
    if rank == 0:
        torch.save(result, f"{output}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize(
    ("kind", "name"), [("ours", "llama"), ("ours", "tied"), ("ours", "lora"), ("swapped", "llama"), ("swapped", "tied")]
)
def test_deepspeed_trains_as_one_process(kind, name, tmp_path, monkeypatch):
    """A3POTrainer, and GRPOTrainer with trl_kernels, on two ranks of ZeRO-3 beside GRPOTrainer on one process."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    folder, lora = str(tmp_path / "model"), name == "lora"
    tiny.build("llama" if lora else name).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    head = tiny.build("llama" if lora else name).get_output_embeddings().weight.detach()
    expected, losses = train("theirs", folder, str(tmp_path / "one"), lora=lora)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    output = str(tmp_path / "two")
    mp.spawn(worker, args=(port, kind, folder, output, lora), nprocs=RANKS)
    found, my_losses = torch.load(f"{output}.pt")
    assert my_losses == pytest.approx(losses, abs=1e-6)
    assert found.keys() == expected.keys()
    if not lora:
        trained = expected["lm_head.weight" if name == "llama" else "model.embed_tokens.weight"]
        assert (trained - head).abs().max() > 1e-4
    for key, value in expected.items():
        assert (found[key] - value).abs().max() <= 1e-6, key
