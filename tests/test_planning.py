"""The plan of a step over many ranks: collectives and times by hand, chunks and routes as the head takes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from batches import INTERPRETED
from torch.testing._internal.distributed.fake_pg import FakeStore

from a3po_kernels import TokenRule, dapo, gspo, linear_policy_loss, lp_reg, policy_loss, presets, select_tokens
from a3po_kernels.core.layout import token_layout
from a3po_kernels.losses.one_pass import plan_chunks
from a3po_kernels.losses.rows import find_rows
from a3po_kernels.objectives import Objective
from a3po_kernels.ops.linear_head import LinearHead
from a3po_kernels.parallel import groups
from a3po_kernels.planning import (
    HeadStep,
    Machine,
    collectives_of_step,
    estimate_memory,
    estimate_step,
    seconds_of_collective,
    wire_bytes,
)
from a3po_kernels.planning.step import weight_gradient_traffic

pytestmark = pytest.mark.skipif(INTERPRETED, reason="arithmetic, natively")

# Two ranks hold 50 rows of the weight each, and a budget eight rows of 50 fp32 logits, two chunks of four: 4, 4 and 2.
SMALL = HeadStep(10, 100, 6, torch.float32, tp=2, rollouts=5, max_chunk_bytes=1600, reduce_metrics=False)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [("all_gather", 2, 64), ("all_gather", 1, 32), ("all_reduce", 2, 96), ("all_reduce", 1, 48)]),
        ({"tp": 1}, []),
        # 6 rows in one chunk, and the statistics of the other 4.
        ({"active_fraction": 0.6}, [("all_gather", 1, 96), ("all_gather", 1, 64), ("all_reduce", 1, 144)]),
        ({"active_fraction": 0.6, "statistics": "active"}, [("all_gather", 1, 96), ("all_reduce", 1, 144)]),
        ({"active_fraction": 0.0}, [("all_gather", 1, 160)]),
        ({"route": "recompute"}, [("all_gather", 1, 160), ("all_reduce", 1, 240)]),
        ({"route": "recompute", "active_fraction": 0.6}, [("all_gather", 1, 160), ("all_reduce", 1, 144)]),
        ({"route": "recompute", "active_fraction": 0.6, "statistics": "active"},
         [("all_gather", 1, 96), ("all_reduce", 1, 144)]),
        ({"grad_hidden": "reduce_scatter"}, [("all_gather", 2, 64), ("all_gather", 1, 32), ("reduce_scatter", 1, 240)]),
        ({"grad_hidden": "partial"}, [("all_gather", 2, 64), ("all_gather", 1, 32)]),
        # 5 of 10 rows of 6 numbers a rank.
        ({"hidden_layout": "sequence_sharded"},
         [("all_gather", 1, 120), ("all_gather", 2, 64), ("all_gather", 1, 32), ("reduce_scatter", 1, 240)]),
        ({"lora_rank": 3, "grad_hidden": "partial", "route": "recompute"},
         [("all_gather", 1, 160), ("all_reduce", 1, 72)]),
        # Twice as wide: a chunk holds two rows, a number of the statistics 8 bytes.
        ({"dtype": torch.float64}, [("all_gather", 5, 64), ("all_reduce", 5, 96)]),
        # Half as wide: one chunk holds all.
        ({"dtype": torch.bfloat16}, [("all_gather", 1, 160), ("all_reduce", 1, 240)]),
        # An adapter adds to dHidden at the end: it is summed once, and so is A's gradient.
        ({"lora_rank": 3},
         [("all_gather", 2, 64), ("all_gather", 1, 32), ("all_reduce", 1, 240), ("all_reduce", 1, 72)]),
        # Lp-Reg on-policy: min-p of all rows in chunks of 5; its unit is the batch, which no chunk holds.
        ({"objective": lp_reg(), "on_policy": True},
         [("all_gather", 2, 20), ("all_gather", 2, 40), ("all_gather", 1, 160), ("all_reduce", 1, 240)]),
        ({"objective": lp_reg()}, [("all_gather", 1, 160), ("all_reduce", 1, 240)]),
    ],
)  # fmt: skip
def test_collectives_of_tensor_parallel_ranks(changes, expected):
    found = collectives_of_step(replace(SMALL, **changes))
    sizes: dict[tuple, int] = {}
    for kind, count, size in expected:  # of one kind and size together
        sizes[kind, size] = sizes.get((kind, size), 0) + count
    assert {(kind, size): count for kind, count, size in found} == sizes
    assert len(found) == len(sizes)


def test_collectives_of_data_and_context_parallel_ranks():
    rule = TokenRule(metric="entropy", side="high", ratio=0.5, rest_scale=0.0, scope="global")
    step = replace(SMALL, tp=1, dp=4, reduce_metrics=True, objective=Objective(shaping=(rule,)))
    assert collectives_of_step(step) == [
        ("all_reduce", 1, 8), ("all_reduce", 4, 2048), ("all_gather", 1, 8), ("all_gather", 1, 144),
    ]  # fmt: skip
    assert collectives_of_step(replace(step, dtype=torch.float64))[1] == ("all_reduce", 8, 2048)
    assert collectives_of_step(replace(step, objective=dapo(), reduce_metrics=False)) == []
    # 5 rollouts: a sum of 5 numbers and 2 in fp64; two rules' 5 numbers of tokens, and 7 rounds of 5 x 256 counts, of
    # an fp32's bytes and three of the position. GSPO's ratio goes there and back.
    step = replace(SMALL, tp=1, cp=2, objective=presets["a3po"]())
    assert collectives_of_step(step) == [
        ("all_reduce", 1, 56), ("all_reduce", 2, 40), ("all_reduce", 14, 5 * 256 * 8),
    ]  # fmt: skip
    assert collectives_of_step(replace(step, objective=gspo())) == [("all_reduce", 1, 56), ("all_reduce", 2, 20)]
    # Context-parallel ranks share the rows: 5 each.
    assert collectives_of_step(replace(step, tp=2, objective=dapo(), route="recompute"))[:2] == [
        ("all_gather", 1, 80), ("all_reduce", 1, 120),
    ]  # fmt: skip
    trainers = weight_gradient_traffic(replace(SMALL, dp=2, dtype=torch.bfloat16), "all_reduce")
    assert trainers is not None and (trainers.kind, trainers.bytes) == ("all_reduce", 50 * 6 * 2)
    assert weight_gradient_traffic(SMALL, "all_reduce") is None
    assert weight_gradient_traffic(replace(SMALL, dp=2, frozen_weight=True), "all_reduce") is None


def calls_of(monkeypatch, work) -> dict[tuple[str, int], int]:
    """(kind, bytes of a rank's input): how often, of what `work` calls on one of two ranks."""
    called: Counter[tuple[str, int]] = Counter()

    def counted(module, name, kind, position):
        original = getattr(module, name)

        def call(*args, **kwargs):
            called[kind, args[position].nbytes] += 1
            if kind == "all_reduce":
                args[position].mul_(2)  # the fake group does nothing: the other rank has the same
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        counted(dist, "all_reduce", "all_reduce", 0)
        counted(groups, "all_gather_single", "all_gather", 1)
        work()
    finally:
        dist.destroy_process_group()
    return dict(called)


@pytest.mark.parametrize(
    "name", ["dapo", "grpo", "psr", "a3po", "gspo", "gspo_token", "gmpo", "luspo", "topr", "vespo", "cispo"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_context_parallel_ranks_call_what_is_planned(monkeypatch, name, dtype):
    """5 rollouts of 4 tokens, two of each here."""
    logits = torch.randn(5, 2, 7, dtype=dtype, requires_grad=True)
    objective, old = presets[name](), torch.full((5, 2), -2.0, dtype=dtype)

    def work():
        policy_loss(
            logits, torch.zeros(5, 2, dtype=torch.int64), torch.ones(5), objective=objective, old_logprobs=old,
            cp_group=dist.group.WORLD,
        ).loss.backward()  # fmt: skip

    step = replace(SMALL, tp=1, cp=2, rows=20, rollouts=5, dtype=dtype, objective=objective)
    planned = {(kind, size): count for kind, count, size in collectives_of_step(step)}
    assert planned == calls_of(monkeypatch, work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_global_selection_calls_what_is_planned(monkeypatch, dtype):
    called = calls_of(
        monkeypatch, lambda: select_tokens(torch.randn(3, 7, dtype=dtype), ratio=0.5, side="low", scope="global")
    )
    rule = TokenRule(scope="global")
    step = replace(SMALL, tp=1, dp=2, dtype=dtype, objective=Objective(shaping=(rule,)))
    assert {(kind, size): count for kind, count, size in collectives_of_step(step)} == called


@pytest.mark.parametrize("rows_of_a_chunk", [1, 3, 5, 8, 20])
@pytest.mark.parametrize("unit, objective", [("token", dapo()), ("rollout", gspo()), ("batch", lp_reg())])
def test_chunks_are_the_heads(unit, objective, rows_of_a_chunk):
    """As plan_chunks cuts a batch of equal rollouts, all of which have a gradient."""
    rollouts, length, vocabulary = 4, 5, 50
    step = HeadStep(
        rollouts * length, vocabulary, 6, torch.float32, objective, rollouts=rollouts,
        max_chunk_bytes=4 * vocabulary * rows_of_a_chunk,
    )  # fmt: skip
    assert step.unit == unit
    every = torch.ones(rollouts * length, dtype=torch.bool)
    layout = token_layout("rows", every.view(rollouts, length).float(), None, validate=True)
    rows = find_rows(every, ~every, layout, objective, unit, True)
    head = LinearHead(
        torch.zeros(rollouts * length, 6), torch.zeros(vocabulary, 6), None, None, None, 1.0, vocabulary, torch.float32
    )
    tiles = plan_chunks(head, rows, unit, step.chunk_bytes(True))
    assert step.taken_route == ("recompute" if tiles is None else "one-pass")
    if tiles is not None:
        assert step.chunks() == [cut.stop - cut.start for cut in tiles.row_slices()]


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", presets)
def test_routes_are_the_heads(name, on_policy):
    objective, generator = presets[name](), torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, 6, generator=generator, requires_grad=True)
    weight, targets = torch.randn(50, 6, generator=generator), torch.randint(0, 50, (3, 4), generator=generator)
    others = {key: torch.full((3, 4), value) for key, value in
              (("old_logprobs", -2.0), ("old_entropy", 1.0), ("min_p_logprobs", -1.0))}  # fmt: skip
    for rows in (1, 4, 12):
        budget = 4 * 50 * rows
        found = linear_policy_loss(
            hidden, weight, targets, torch.tensor([1.0, -1.0, 1.0]), objective=objective, max_chunk_bytes=budget,
            **({} if on_policy else others),
        )  # fmt: skip
        step = HeadStep(
            12, 50, 6, torch.float32, objective, on_policy=on_policy, rollouts=3, max_chunk_bytes=budget,
        )  # fmt: skip
        assert step.taken_route == found.route, (rows, step.unit)
        known = {"objective": objective, "dtype": torch.float32, "max_chunk_bytes": budget, "rollouts": 3}
        auto = estimate_memory(12, 6, 50, **known, on_policy=on_policy)
        assert auto == estimate_memory(12, 6, 50, **known, on_policy=on_policy, route=found.route)
        assert auto != estimate_memory(12, 6, 50, **known, route="statistics")


def test_wire_bytes_and_seconds():
    assert [wire_bytes(kind, 100, 4) for kind in ("all_gather", "all_reduce", "reduce_scatter")] == [300, 150, 75]
    assert wire_bytes("all_reduce", 100, 1) == 0
    machine = Machine(node_bandwidth=100, node_latency=1, network_bandwidth=10, network_latency=5, gpus_per_node=4)
    assert seconds_of_collective("all_gather", 100, 4, 4, machine) == 2 + 3
    assert seconds_of_collective("all_reduce", 100, 4, 4, machine) == 4 + 1.5
    assert seconds_of_collective("all_reduce", 100, 4, 8, machine) == 20 + 15
    assert seconds_of_collective("reduce_scatter", 100, 5, 5, machine) == 15 + 8
    ring = replace(machine, algorithm="ring")
    assert seconds_of_collective("all_reduce", 100, 4, 4, ring) == 6 + 1.5
    assert seconds_of_collective("all_gather", 100, 1, 1, ring) == 0


def test_which_link_a_group_uses():
    """tp ranks are neighbours, then cp, then dp: of 2 x 2 x 2 ranks, four to a node, dp alone crosses nodes."""
    step = replace(SMALL, cp=2, dp=2, objective=presets["a3po"](), reduce_metrics=True)
    machine = Machine(gpus_per_node=4, node_latency=1, network_latency=100, node_bandwidth=1e12, network_bandwidth=1e12)
    for line in estimate_step(step, machine).collectives:
        # One step over two ranks, two over the four of cp and dp.
        expected = {"dp": 100, "data": 200}.get(line.traffic.group, 1) * (2 if line.traffic.kind == "all_reduce" else 1)
        assert line.seconds == pytest.approx(line.traffic.count * expected, rel=1e-6)
    whole = estimate_step(step, machine)
    # The four ranks of a replica beside one GPU.
    assert whole.efficiency == pytest.approx(whole.seconds_one_gpu / (4 * whole.seconds))
    found = whole.weight_gradient
    assert found is not None and found.ranks == 4 and found.seconds == pytest.approx(200, rel=1e-6)


def test_what_is_exposed():
    """Chunks of 4, 4 and 2 rows; a row's product with 50 x 6 numbers is 600 operations, here a second."""
    machine = Machine(flops=600, copy=1e12, node_bandwidth=8, node_latency=0)
    # Gathers send 64, 64, 32 bytes: 8 s behind the next chunk's 4 s, 8 behind 2, and the last 4 s behind nothing.
    # All-reduces send 96, 96, 48: 12, 12 and 6 s behind dWeight's 4, 4 and 2.
    found = estimate_step(SMALL, machine)
    assert [(line.traffic.what, line.exposed) for line in found.collectives] == [
        ("statistics", 4), ("statistics", 6), ("statistics", 4), ("dHidden", 16), ("dHidden", 4),
    ]  # fmt: skip
    assert found.seconds_exposed == 34 and found.seconds_products == 30
    assert found.seconds == pytest.approx(64) and found.wire_bytes == 160 + 240
    assert found.seconds_one_gpu == pytest.approx(60) and found.efficiency == pytest.approx(60 / (2 * 64))
    assert found.tokens_per_second == pytest.approx(10 / 64)
    waited = estimate_step(SMALL, replace(machine, overlap=False))
    assert waited.seconds_exposed == 20 + 30
    # No dWeight, nothing to hide behind.
    frozen = estimate_step(replace(SMALL, frozen_weight=True), machine)
    assert frozen.seconds_exposed == 14 + 30 and frozen.seconds_products == 20
    faster = estimate_step(SMALL, replace(machine, node_bandwidth=1000))
    assert faster.seconds_exposed == pytest.approx(32 / 1000)


@pytest.mark.parametrize(
    "changes, factor, passes",
    [
        ({}, 2 + 4 * 0.5, 1 + 2 * 0.5), ({"route": "recompute"}, 2 + 6 * 0.5, 1 + 2 * 0.5),
        ({"statistics": "active"}, 6 * 0.5, 3 * 0.5), ({"frozen_weight": True}, 2 + 2 * 0.5, 1 + 2 * 0.5),
        ({"route": "recompute", "statistics": "active"}, 8 * 0.5, 3 * 0.5),
        ({"objective": lp_reg(), "on_policy": True, "max_chunk_bytes": None}, 4 + 4 * 0.5, 3 + 2 * 0.5),
    ],
)  # fmt: skip
def test_operations_and_passes(changes, factor, passes):
    found = estimate_step(replace(SMALL, active_fraction=0.5, **changes), Machine(flops=1.0, copy=1.0))
    assert found.operations == found.seconds_products == factor * 10 * 50 * 6
    assert found.seconds_kernels == passes * 10 * 50 * 4


def test_an_adapter_costs_its_products():
    plain, adapted = (estimate_step(replace(SMALL, lora_rank=rank)) for rank in (0, 3))
    # hidden @ A.T @ B.T, its gradient back to hidden, and those of A and B: three times 2 N r (H + V/W).
    assert adapted.operations - plain.operations == 3 * 2 * 10 * 3 * (6 + 50)
    assert adapted.memory["lora"] == 4 * 3 * (50 + 6 + 20)


def test_memory_is_of_the_shard():
    step = HeadStep(1000, 32001, 64, tp=8, hidden_layout="sequence_sharded", active_fraction=0.5)
    found = estimate_step(step).memory
    alone = estimate_memory(1000, 64, 4001, active_fraction=0.5, device_memory=step.device_memory)
    assert {name: found[name] for name in alone if name != "total"} == {k: v for k, v in alone.items() if k != "total"}
    # The gathered hidden states, and a rank's share of dHidden.
    assert found["collectives"] == 1000 * 64 * 2 + 1000 * 64 * 4 // 8
    assert found["total"] == alone["total"] + found["collectives"] == sum(found.peak.values())
    assert found.moment == alone.moment


def test_two_chunks_of_a_split_head_live_at_a_time():
    """SMALL's chunks are of 4 rows of 50 numbers of 4 bytes; alone, of 8 rows of 50."""
    assert estimate_step(SMALL).memory["logits_chunk"] == 2 * 4 * 50 * 4
    assert estimate_step(replace(SMALL, vocabulary=50, tp=1)).memory["logits_chunk"] == 5 * 50 * 4  # two even ones
    assert estimate_step(replace(SMALL, max_chunk_bytes=2000)).memory["logits_chunk"] == 10 * 50 * 4  # all in one


def test_memory_of_a_card_that_is_not_here():
    """Its default chunk: 1/32 of it in one pass, 1/128 at most 1 GiB where logits are formed again."""
    sizes = {"rows": 100_000, "width": 64, "vocabulary": 32000}
    for route, memory, budget in (
        ("one-pass", 80 << 30, (80 << 30) // 32), ("recompute", 80 << 30, (80 << 30) // 128),
        ("recompute", 180 << 30, 1 << 30), ("one-pass", 1 << 30, 64 << 20),
    ):  # fmt: skip
        found = estimate_memory(**sizes, route=route, device_memory=memory)
        assert found == estimate_memory(**sizes, route=route, max_chunk_bytes=budget, device="cuda")
        assert found == estimate_memory(**sizes, route=route, device_memory=memory, device="cuda:1")


def test_more_ranks_never_move_fewer_bytes():
    sent = [estimate_step(replace(SMALL, vocabulary=6400, max_chunk_bytes=None, tp=tp)).wire_bytes for tp in
            (1, 2, 4, 8, 16, 64)]  # fmt: skip
    assert sent == sorted(sent) and sent[0] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": 0}, "rows must be positive; got 0"), ({"tp": 0}, "tp must be positive"),
        ({"tp": 101}, "tp = 101 ranks cannot share vocabulary = 100"), ({"cp": 11}, "cp = 11 ranks cannot share rows"),
        ({"route": "statistics"}, "route must be one of"), ({"grad_hidden": "sum"}, "grad_hidden must be one of"),
        ({"hidden_layout": "sharded"}, "hidden_layout must be one of"), ({"statistics": "some"}, "statistics must be"),
        ({"hidden_layout": "sequence_sharded", "grad_hidden": "all_reduce"}, "grad_hidden must be 'reduce_scatter'"),
        ({"active_fraction": 1.5}, "active_fraction must be finite and lie in"),
        ({"lora_rank": -1}, "lora_rank must be 0 or more"),
        ({"max_chunk_bytes": 0}, "max_chunk_bytes must be positive or None"),
        ({"cp": 2, "objective": lp_reg()}, "objective with cp = 2: the rounds of a selection over the batch"),
        ({"route": "one-pass", "objective": lp_reg()}, "needs a chunk that holds a whole batch"),
    ],
)  # fmt: skip
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_errors_of_the_machine():
    for changes, message in (
        ({"flops": 0}, "flops must be positive"), ({"network_latency": -1}, "network_latency must be 0 or more"),
        ({"algorithm": "star"}, "algorithm must be one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Machine(**changes)
    with pytest.raises(ValueError, match="weight_gradient must be"):
        estimate_step(SMALL, weight_gradient="none")
    with pytest.raises(ValueError, match="kind must be one of"):
        wire_bytes("broadcast", 1, 2)
