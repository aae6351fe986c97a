"""integrations.megatron beside the output layer's own fused backward: main_grad has the gradients of both."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from a3po_kernels import dapo
from a3po_kernels.integrations import nemo_rl
from a3po_kernels.integrations.megatron import HeadContext, output_processor
from tests.megatron_stand_in import Model, OutputLayer

V, H, B, S = 12, 6, 2, 5


class Fused(torch.autograd.Function):
    """A product whose backward adds to weight.main_grad, as Megatron's with gradient_accumulation_fusion does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x, _), weight = ctx.saved_tensors, ctx.weight
        weight.main_grad += grad.flatten(0, 1).t() @ x.flatten(0, 1)
        weight.grad_added_to_main_grad = True
        memory = 0.0 if getattr(weight, "zero_out_wgrad", False) else 123.0  # whatever torch.empty finds
        return grad @ weight, torch.full_like(weight, memory)


class FusedLayer(OutputLayer):
    gradient_accumulation_fusion = True

    def forward(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        return Fused.apply(hidden, self.weight if weight is None else weight)


def data_parallel(weight: nn.Parameter) -> None:
    """What Megatron's DistributedDataParallel does with the gradient of a parameter."""
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False

    def take(p):
        if p.grad is not None and (not p.grad_added_to_main_grad or getattr(p, "zero_out_wgrad", False)):
            p.main_grad.add_(p.grad)
        p.grad = None

    weight.register_post_accumulate_grad_hook(take)


def model(tied: bool) -> tuple[Model, nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(V, H, generator=g, dtype=torch.float64) for name in ("embedding", "head")}
    made = Model({**whole, "body": torch.eye(H, dtype=torch.float64)}, tied, False)
    made.output_layer = FusedLayer(None if tied else whole["head"], None, False)
    weight = made.embedding if tied else made.output_layer.weight
    data_parallel(weight)
    return made, weight


def own_loss(**given) -> Tensor:
    """Of the layer's own logits."""
    return given["output_layer"](given["hidden_states"], given["output_weight"]).logsumexp(-1).sum()


def policy(**given) -> Tensor:
    return output_processor(**given).policy.loss


def both(**given) -> Tensor:
    """The layer's own first, as multi-token prediction is before the processor."""
    return own_loss(**given) + policy(**given)


def main_grad(tied: bool, *steps) -> Tensor:
    """Of the head, after one backward of each micro-batch; the layers below are on another pipeline stage."""
    made, weight = model(tied)
    ids, labels = torch.randint(0, V, (2, B, S), generator=torch.Generator().manual_seed(1))
    context = HeadContext(dapo(), torch.tensor([1.0, -0.5], dtype=torch.float64))
    for step in steps:

        def last_stage(*, hidden_states, step=step, **given):
            return step(hidden_states=hidden_states.detach(), **given)

        made(ids, labels, output_processor=last_stage, output_processor_context=context).backward()
    return weight.main_grad


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("steps", [(both,), (both, both), (own_loss, policy), (policy, own_loss), (policy, both)])
def test_main_grad_has_the_gradients_of_both(tied, steps):
    alone = {own_loss: main_grad(tied, own_loss), policy: main_grad(tied, policy)}
    parts = {own_loss: (own_loss,), policy: (policy,), both: (own_loss, policy)}
    expected = sum(alone[part] for step in steps for part in parts[step])
    assert all(part.norm() > 0.1 for part in alone.values())
    torch.testing.assert_close(main_grad(tied, *steps), expected, rtol=1e-12, atol=1e-12)


def test_a_weight_of_no_data_parallelism_gets_no_mark():
    made, _ = model(False)
    made.output_layer = FusedLayer(torch.zeros(V, H, dtype=torch.float64), None, False)
    ids = torch.zeros(B, S, dtype=torch.long)
    made(ids, ids, output_processor=output_processor)
    assert not hasattr(made.output_layer.weight, "zero_out_wgrad")


def test_nemo_rls_function_marks_the_weight_too():
    _, weight = model(False)
    ids = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
    hidden = torch.ones(S, B, H, dtype=torch.float64)

    def backward():
        nemo_rl.from_parallel_hidden_states_to_logprobs(
            hidden, weight, None, ids, 0, V, dist.group.WORLD
        ).sum().backward()
        found, weight.main_grad = weight.main_grad, torch.zeros_like(weight)
        return found

    alone = backward()
    weight.grad_added_to_main_grad = True
    assert alone.norm() > 0.1 and torch.equal(backward(), alone)


def under_fsdp(fused: bool = True, mtp_num_layers: int | None = 1, mtp_detach_heads: bool = False) -> None:
    made, weight = model(False)
    weight.__fsdp_param__ = True
    made.output_layer.gradient_accumulation_fusion = fused
    vars(made.config).update(mtp_num_layers=mtp_num_layers, mtp_detach_heads=mtp_detach_heads)
    ids = torch.zeros(B, S, dtype=torch.long)
    made(ids, ids, output_processor=output_processor)


def test_megatron_fsdp_drops_it_whatever_the_weight_says():
    with pytest.raises(ValueError, match="under Megatron-FSDP drops every gradient"):
        under_fsdp()
    under_fsdp(fused=False)
    under_fsdp(mtp_num_layers=None)
    under_fsdp(mtp_detach_heads=True)
