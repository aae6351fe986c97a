"""Tables of the estimates, in Markdown: from one node to 1024 GPUs, and by link and number of tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .estimate import Machine, StepEstimate, estimate_step
from .step import HeadStep

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
REPLICA = HeadStep(rows=8192, vocabulary=151936, width=4096)
BATCH = 524288  # tokens of a whole batch, shared by all replicas


def _markdown(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    header = tuple(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *body))


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f}"


def _costs(estimate: StepEstimate) -> tuple[str, ...]:
    trainers = estimate.weight_gradient
    return (
        _ms(estimate.seconds_products), _ms(estimate.seconds_exposed), _ms(estimate.seconds),
        f"{100 * estimate.efficiency:.0f} %", _mb(estimate.wire_bytes), _mb(estimate.memory["total"]),
        "–" if trainers is None else _ms(trainers.seconds),
    )  # fmt: skip


COSTS = (
    "products, ms", "exposed, ms", "head's step, ms", "efficiency", "sent by a rank, MB", "memory of a rank, MB",
    "the trainer's dWeight, ms",
)  # fmt: skip


def growing_batch(machine: Machine | None = None) -> str:
    """8 to 1024 GPUs, each replica with its own REPLICA: by tp = 1, a node and two nodes."""
    body = []
    for gpus in GPUS:
        for tp in (1, 8, 16):
            if tp <= gpus:
                estimate = estimate_step(replace(REPLICA, tp=tp, dp=gpus // tp), machine)
                rate = f"{estimate.tokens_per_second / 1e6:.2f}"
                body.append((str(gpus), f"{tp} × {gpus // tp}", rate, *_costs(estimate)))
    return _markdown(("GPUs", "tp × dp", "million tokens a second", *COSTS), body)


def fixed_batch(machine: Machine | None = None) -> str:
    """The same BATCH shared by 8 to 1024 GPUs, with sequence-sharded hidden states in a node of tp = 8."""
    body = []
    for gpus in GPUS:
        dp = gpus // 8
        step = replace(REPLICA, rows=BATCH // dp, tp=8, dp=dp)
        for layout in ("replicated", "sequence_sharded"):
            estimate = estimate_step(replace(step, hidden_layout=layout), machine)
            kind = f"{layout.replace('_', '-')}, {estimate.chunks} chunk{'s' if estimate.chunks > 1 else ''}"
            body.append((str(gpus), str(step.rows), kind, *_costs(estimate)))
    return _markdown(("GPUs", "rows of a replica", "hidden states", *COSTS), body)


def by_link() -> str:
    """Efficiency of one replica over tp ranks that one link joins, for several speeds of it."""
    ranks, body = (2, 4, 8, 16, 32, 64), []
    for bandwidth, latency in ((900e9, 10e-6), (450e9, 10e-6), (200e9, 10e-6), (50e9, 25e-6), (12.5e9, 25e-6)):
        machine = Machine(gpus_per_node=max(ranks), node_bandwidth=bandwidth, node_latency=latency)
        found = [estimate_step(replace(REPLICA, tp=tp), machine) for tp in ranks]
        cells = (f"{_ms(e.seconds)} ms, {100 * e.efficiency:.0f} %" for e in found)
        body.append((f"{bandwidth / 1e9:g} GB/s, {1e6 * latency:g} us", *cells))
    return _markdown(("link", *(f"tp = {tp}" for tp in ranks)), body)
