"""estimate_memory against what the allocator saw."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED
from measured import peak_bytes

from a3po_kernels import dapo, estimate_memory, linear_policy_loss, lp_reg
from a3po_kernels.planning.cards import CARDS

ROWS, WIDTH, VOCABULARY = 1000, 256, 16000


@pytest.mark.skipif(INTERPRETED, reason="the torch backend, natively")
@pytest.mark.parametrize("active, statistics", [(1.0, "all"), (0.2, "all"), (0.2, "active")])
@pytest.mark.parametrize("budget", [None, 8 << 20, 1 << 20])
@pytest.mark.parametrize("route", ["one-pass", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_five_percent(dtype, route, budget, active, statistics):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, ROWS // 10, WIDTH, generator=generator).to(dtype)
    weight = (0.1 * torch.randn(VOCABULARY, WIDTH, generator=generator)).to(dtype)
    targets = torch.randint(0, VOCABULARY, (10, ROWS // 10), generator=generator)
    advantages = torch.tensor([1.0, -1.0]).repeat(5) * (torch.arange(10) < 10 * active)

    def go():
        # Its own leaves: memory that was there before is not measured.
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        output = linear_policy_loss(
            *leaves, targets, advantages, objective=dapo(), route=route, max_chunk_bytes=budget, statistics=statistics,
            backend="torch",
        )  # fmt: skip
        output.loss.backward()
        return output, leaves

    go()
    measured = peak_bytes(go)
    estimate = estimate_memory(
        ROWS, WIDTH, VOCABULARY, dtype, dapo(), route=route, active_fraction=active, statistics=statistics,
        max_chunk_bytes=budget, backend="torch",
    )  # fmt: skip
    assert estimate["total"] == sum(estimate.peak.values())
    assert estimate["total"] == pytest.approx(measured, rel=0.05), (estimate, measured)


def test_every_part_and_those_of_the_peak():
    """Recomputation's copies of dHidden exist at the end alone, the buffers of a tile before it."""
    found = estimate_memory(1000, 64, 32000, route="recompute", device="h200")
    assert found.moment == "gradient" and set(found) == {*found.peak, "total"}
    assert found.peak["hidden_gradient"] == 1000 * 64 * 4  # an fp32 sum
    assert found["hidden_gradient"] == 1000 * 64 * (4 + 2)  # and its copy in bf16
    assert all(found[name] >= size for name, size in found.peak.items())
    assert found["total"] == sum(found.peak.values()) < sum(size for name, size in found.items() if name != "total")
    few = estimate_memory(1000, 64, 32000, route="one-pass", device="h200", active_fraction=0.1)
    assert few.moment == "statistics" and few.peak["weight_gradient"] == 32000 * 64 * 2


@pytest.mark.parametrize("name", CARDS)
def test_a_card_by_its_name(name):
    sizes = (9000, 64, 152000)
    found = estimate_memory(*sizes, device=name.upper())
    assert found == estimate_memory(*sizes, device_memory=CARDS[name].memory)
    assert found["logits_chunk"] <= max(CARDS[name].memory // 32, 64 << 20)


def test_auto_is_what_the_head_would_take():
    """Lp-Reg on-policy needs the batch in one chunk, GSPO whole rollouts, DAPO nothing: 64 MiB on a CPU."""
    sizes = (4096, 64, 32000)
    for objective, rollouts, route in (
        ("dapo", 16, "one-pass"), ("gspo", 16, "one-pass"), ("gspo", 1, "recompute"), (lp_reg(), 16, "recompute"),
    ):  # fmt: skip
        known = {"objective": objective, "rollouts": rollouts, "on_policy": True}
        assert estimate_memory(*sizes, **known) == estimate_memory(*sizes, **known, route=route)
    assert estimate_memory(*sizes) != estimate_memory(*sizes, route="recompute")
    with pytest.raises(ValueError, match="needs a chunk that holds a whole batch; max_chunk_bytes = 67108864 does not"):
        estimate_memory(*sizes, objective="lp_reg", on_policy=True, route="one-pass")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"route": "onepass"}, "^route must be one of auto, one-pass, recompute, statistics; got 'onepass'"),
        ({"rows": 0}, "^rows must be positive; got 0"), ({"width": 0}, "^width must be positive"),
        ({"vocabulary": 0}, "^vocabulary must be positive"), ({"rollouts": 0}, "^rollouts must be positive"),
        ({"statistics": "some"}, "^statistics must be one of all, active; got 'some'"),
        ({"backend": "cuda"}, "^backend must be one of auto, torch, triton; got 'cuda'"),
        ({"active_fraction": 1.5}, r"^active_fraction must be finite and lie in \[0.0, 1.0\]; got 1.5"),
        ({"max_chunk_bytes": 0}, "^max_chunk_bytes must be positive or None; got 0"),
        ({"device": "h2000"}, "^device must be one of cpu, cuda, a100, .*; got 'h2000'; did you mean 'h200'"),
        ({"device": "tpu"}, "^device must be one of cpu, cuda, .*; got 'tpu'$"),
        ({"device": torch.device("meta")}, "^device must be one of cpu, cuda, .*; got device"),
        ({"device": 80}, "^device must be one of .*; got 80"),
        ({"device": "h200", "device_memory": 5}, "^device = 'h200' has a memory of its own; give device_memory = 5 al"),
        ({"device": "cpu", "device_memory": 5}, "^device_memory is the size of a GPU; got 5 for device 'cpu'"),
        ({"device_memory": 0}, "^device_memory must be positive; got 0"),
        ({"objective": "a3p0"}, "^objective must be .*; did you mean 'a3po'"),
    ],
)  # fmt: skip
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(**{"rows": 10, "width": 8, "vocabulary": 100, **changes})


def test_other_types():
    for changes in ({"rows": 1.5}, {"width": True}, {"device_memory": 8e10}):
        name, value = next(iter(changes.items()))
        with pytest.raises(TypeError, match=f"^{name} must be a whole number; got {type(value).__name__}"):
            estimate_memory(**{"rows": 10, "width": 8, "vocabulary": 100, **changes})
    with pytest.raises(TypeError, match=r"^dtype must be one of torch.float16, .*; got torch.int8"):
        estimate_memory(10, 8, 100, torch.int8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to ask")
def test_a_gpu_that_is_not_here():
    with pytest.raises(ValueError, match="device = 'cuda' asks the GPU that is here, and none is: name a card, or"):
        estimate_memory(10, 8, 100, device="cuda")
    assert estimate_memory(10, 8, 100, device="cuda", max_chunk_bytes=1 << 20)["total"] > 0
