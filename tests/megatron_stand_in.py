"""A model that is split as Megatron-Core's GPTModel is, and calls an output processor as its _postprocess does."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The keywords of the call in megatron/core/models/gpt/gpt_model.py, 0.18.0 to 0.19.2.
KEYWORDS = """
    hidden_states output_layer output_weight labels loss_mask input_ids position_ids attention_mask decoder_input
    inference_context packed_seq_params runtime_gather_output context compute_language_model_loss scale_logits config
""".split()


class SumRanks(torch.autograd.Function):
    """Megatron's reduce from the tensor-parallel region: backward is the identity."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


class OwnPart(torch.autograd.Function):
    """This rank's part of the first dimension; backward gathers."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        parts = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, grad.contiguous())
        return torch.cat(parts)


class SumGradients(torch.autograd.Function):
    """Megatron's copy to the tensor-parallel region, which whoever sets disable_grad_reduce does for itself."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class OutputLayer(nn.Module):
    """What ColumnParallelLinear holds; its forward is not to be called."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, sequence_parallel: bool):
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.sequence_parallel = sequence_parallel and dist.get_world_size() > 1
        self.tp_group = dist.group.WORLD
        self.skip_bias_add = self.disable_grad_reduce = False
        self.gtp_remat_size = 1

    def forward(self, *_):
        raise AssertionError("the output layer was called")


class Model(nn.Module):
    """Vocabulary-parallel embedding, a layer, a head: with the parameters of a whole one, embedding [V, H] etc."""

    def __init__(self, whole: dict[str, Tensor], tied: bool, sequence_parallel: bool, scale: float = 1.0):
        super().__init__()
        ranks, rank = dist.get_world_size(), dist.get_rank()
        own = {name: x.chunk(ranks)[rank].clone() for name, x in whole.items() if name != "body"}
        self.embedding, self.body = nn.Parameter(own["embedding"]), nn.Parameter(whole["body"].clone())
        self.output_layer = OutputLayer(None if tied else own["head"], own.get("bias"), sequence_parallel)
        self.tied, self.scale = tied, scale
        self.config = SimpleNamespace(
            sequence_parallel=sequence_parallel, context_parallel_size=1, defer_embedding_wgrad_compute=False
        )

    def forward(self, ids: Tensor, labels: Tensor | None = None, **given):
        first = dist.get_rank() * len(self.embedding)
        here = (ids >= first) & (ids < first + len(self.embedding))
        embedded = self.embedding[(ids - first).where(here, 0)] * here.unsqueeze(-1)
        hidden = SumRanks.apply(embedded).transpose(0, 1).contiguous()  # [S, B, H]
        if self.output_layer.sequence_parallel:
            hidden = OwnPart.apply(hidden)
        hidden = torch.tanh(hidden @ self.body)
        if self.output_layer.disable_grad_reduce:
            hidden = SumGradients.apply(hidden)
        given = {"output_processor_context": None, **given}
        processor, context = given.pop("output_processor"), given.pop("output_processor_context")
        keywords = {
            **dict.fromkeys(KEYWORDS), "hidden_states": hidden, "output_layer": self.output_layer,
            "output_weight": self.embedding if self.tied else None, "labels": labels, "input_ids": ids,
            "context": context, "compute_language_model_loss": self.loss, "scale_logits": lambda x: x * self.scale,
            "config": self.config, **given,
        }  # fmt: skip
        return processor(**keywords)

    def loss(self, *_):
        raise AssertionError("Megatron's loss was called")

    def gradients(self) -> dict[str, Tensor]:
        """Of this rank; that of the body under sequence parallelism is a part, which Megatron sums as here."""
        found = {"embedding": self.embedding.grad, "body": self.body.grad}
        if self.output_layer.sequence_parallel:
            dist.all_reduce(found["body"])
        if not self.tied:
            found["head"] = self.output_layer.weight.grad
        if self.output_layer.bias is not None:
            found["bias"] = self.output_layer.bias.grad
        return found
