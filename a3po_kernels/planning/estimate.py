"""Time of a step over many ranks: products at a sustained rate, collectives by latency and bandwidth of their links.

Rates and bandwidths are arguments, or a card's of cards.py. The defaults of the products and of memory were measured on
one H200; those of the links are assumptions, as is that what may overlap does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.checks import check_word
from .cards import CARDS, REFERENCE, Card, Rates
from .memory import MemoryEstimate, memory_of_step
from .step import HeadStep, Traffic, traffic_of_step, weight_gradient_traffic

ALGORITHMS = ("tree", "ring")
WEIGHT_GRADIENTS = ("reduce_scatter", "all_reduce")
_RATES: Rates = CARDS[REFERENCE].rates


@dataclass(frozen=True)
class Machine:
    """What a node is and how fast: seconds, bytes a second of one direction, operations a second.

    flops: of the head's products; copy: of memory, read and written. A group of ranks that lies within a node of
    gpus_per_node uses the node's link, any other the network. algorithm: "tree" takes log2 W steps, "ring" W - 1, twice
    as many for an all_reduce; both move the same bytes. overlap: whether a collective runs beside the product that it
    may run beside.
    """

    flops: float = _RATES.flops
    copy: float = _RATES.copy
    gpus_per_node: int = 8
    node_bandwidth: float = CARDS[REFERENCE].link
    node_latency: float = 10e-6
    network_bandwidth: float = 50e9
    network_latency: float = 25e-6
    algorithm: str = "tree"
    overlap: bool = True

    def __post_init__(self) -> None:
        for name in ("flops", "copy", "gpus_per_node", "node_bandwidth", "network_bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        for name in ("node_latency", "network_latency"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more; got {getattr(self, name)}")
        check_word("algorithm", self.algorithm, ALGORITHMS)

    @classmethod
    def of(cls, card: Card, **changes) -> Machine:
        """A node of eight such cards, at its rates and its data sheet's link; the network as ever is assumed."""
        rates = card.rates
        return cls(**{"flops": rates.flops, "copy": rates.copy, "node_bandwidth": card.link, **changes})

    def link(self, span: int) -> tuple[float, float]:
        """(latency, bandwidth) between ranks that lie in `span` neighbouring GPUs."""
        if span <= self.gpus_per_node:
            return self.node_latency, self.node_bandwidth
        return self.network_latency, self.network_bandwidth


@dataclass(frozen=True)
class Timed:
    """One line of traffic with its cost: wire bytes that a rank sends, seconds of all its calls, and those exposed."""

    traffic: Traffic
    ranks: int
    wire_bytes: int
    seconds: float
    exposed: float


@dataclass(frozen=True)
class StepEstimate:
    """What one rank does in a step. Seconds; `seconds` is products + kernels + exposed.

    operations, seconds_products: of the matrix products; seconds_kernels: of the passes over the logits.
    seconds_one_gpu: the replica's whole step on one GPU. efficiency: seconds_one_gpu / (tp cp seconds), which is also
    the step's tokens a second over ranks times those of one GPU. memory: bytes by part, as estimate_memory's, of a
    rank's rows and V / tp, with an adapter and the collectives' buffers. weight_gradient: the trainer's own reduction,
    in no sum of these.
    """

    route: str
    chunks: int
    operations: int
    seconds_products: float
    seconds_kernels: float
    seconds_exposed: float
    seconds: float
    seconds_one_gpu: float
    efficiency: float
    tokens_per_second: float
    wire_bytes: int
    collectives: tuple[Timed, ...]
    weight_gradient: Timed | None
    memory: MemoryEstimate


def wire_bytes(kind: str, size: int, ranks: int) -> int:
    """Bytes that a rank sends, and receives, in a bandwidth-optimal collective over an input of `size` bytes a rank."""
    shares = {"all_gather": ranks * (ranks - 1), "all_reduce": 2 * (ranks - 1), "reduce_scatter": ranks - 1}
    check_word("kind", kind, tuple(shares))
    return -(-size * shares[kind] // ranks)


def seconds_of_collective(kind: str, size: int, ranks: int, span: int, machine: Machine) -> float:
    """steps * latency + wire bytes / bandwidth, of `ranks` ranks within `span` neighbouring GPUs; 0 of one rank."""
    if ranks <= 1:
        return 0.0
    latency, bandwidth = machine.link(span)
    steps = (ranks - 1).bit_length() if machine.algorithm == "tree" else ranks - 1
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * steps * latency + wire_bytes(kind, size, ranks) / bandwidth


def _group(step: HeadStep, name: str) -> tuple[int, int]:
    """(ranks, GPUs that they span): tensor-parallel ranks are neighbours, then context-, then data-parallel ones."""
    within, all_of_it = step.tp * step.cp, step.ranks
    groups = {"tp": (step.tp, step.tp), "cp": (step.cp, within), "dp": (step.dp, all_of_it)}
    return {**groups, "data": (step.dp * step.cp, all_of_it)}[name]


def _products(step: HeadStep) -> dict[str, int]:
    """Operations of one rank by product; an adapter's are of rank r beside the weight's."""
    h, v, r = step.width, step.shard, step.lora_rank
    one_pass, f = step.taken_route == "one-pass", step.active
    # One pass takes the other rows' statistics apart; recomputation forms the active rows' logits twice.
    formed = max(step.computed, f) if one_pass else step.computed + f
    if step.objective.low_probability is not None and step.on_policy:
        formed += step.tokens
    forward, back = 2 * h * v + 2 * r * (h + v), 2 * h * v + 2 * r * (h + v)
    found = {"logits": formed * forward, "dHidden": f * back, "dWeight": 0 if step.frozen_weight else f * 2 * h * v}
    return {**found, "LoRA": f * 2 * r * (h + v)} if r else found


def _passes(step: HeadStep) -> int:
    """Rows that the vocabulary kernels read or write: a read for statistics, a read and a write for a gradient."""
    min_p = 2 * step.tokens if step.objective.low_probability is not None and step.on_policy else 0
    return step.computed + 2 * step.active + min_p


def _timed(step: HeadStep, machine: Machine, traffic: Traffic) -> Timed:
    ranks, span = _group(step, traffic.group)
    each = seconds_of_collective(traffic.kind, traffic.bytes, ranks, span, machine)
    hidden = 2 * traffic.rows * step.shard * step.width / machine.flops if traffic.behind and machine.overlap else 0.0
    wire = traffic.count * wire_bytes(traffic.kind, traffic.bytes, ranks)
    return Timed(traffic, ranks, wire, traffic.count * each, traffic.count * max(0.0, each - hidden))


def _memory(step: HeadStep) -> MemoryEstimate:
    lora = step.wide * step.lora_rank * (step.shard + step.width + 2 * step.tokens)
    results = {
        "all_gather": step.tp * max((t.bytes for t in traffic_of_step(step) if t.kind == "all_gather"), default=0),
        "reduce_scatter": sum(t.bytes // step.tp for t in traffic_of_step(step) if t.kind == "reduce_scatter"),
    }
    buffers = sum(results.values()) if step.tp > 1 else 0
    return memory_of_step(step).beside(lora=lora, collectives=buffers)


def least_bytes(step: HeadStep) -> int:
    """What the products of a rank move at least: computed rows and the weight read once, the gradients written once."""
    weight = step.shard * step.width
    read = step.computed * step.width + (weight if max(step.computed, step.active) else 0)
    written = step.tokens * step.width + (0 if step.frozen_weight else weight)
    return (read + written) * step.dtype.itemsize


def _compute_seconds(step: HeadStep, machine: Machine) -> tuple[int, float, float]:
    operations = sum(_products(step).values())
    kernels = _passes(step) * step.shard * step.dtype.itemsize / machine.copy
    # Few rows are bound by the weight's bytes.
    return operations, max(operations / machine.flops, least_bytes(step) / machine.copy), kernels


def estimate_step(
    step: HeadStep, machine: Machine | None = None, weight_gradient: str = "reduce_scatter"
) -> StepEstimate:
    """Operations, bytes, seconds and memory of one rank in one step of the head.

    step: what is computed and over which ranks. machine: rates and links; None: Machine(), one H200's rates and assumed
    links. weight_gradient: how the trainer reduces dWeight, "reduce_scatter" or "all_reduce".

    Not in it: launches and waits of the host, the model below the head, stragglers, a network that others use, and that
    narrow shards of the vocabulary keep a GEMM less busy than wide ones.
    """
    machine = Machine() if machine is None else machine
    check_word("weight_gradient", weight_gradient, WEIGHT_GRADIENTS)
    operations, products, kernels = _compute_seconds(step, machine)
    timed = tuple(_timed(step, machine, traffic) for traffic in traffic_of_step(step))
    exposed = sum(line.exposed for line in timed)
    seconds = products + kernels + exposed
    route = "auto" if step.route == "one-pass" else step.route  # a whole vocabulary may not fit a chunk
    alone = replace(step, tp=1, cp=1, dp=1, hidden_layout="replicated", grad_hidden=None, route=route)
    one_gpu = sum(_compute_seconds(alone, machine)[1:])
    trainers = weight_gradient_traffic(step, weight_gradient)
    return StepEstimate(
        route=step.taken_route, chunks=len(step.chunks()), operations=operations, seconds_products=products,
        seconds_kernels=kernels, seconds_exposed=exposed, seconds=seconds, seconds_one_gpu=one_gpu,
        efficiency=one_gpu / (step.tp * step.cp * seconds), tokens_per_second=step.dp * step.rows / seconds,
        wire_bytes=sum(line.wire_bytes for line in timed), collectives=timed,
        weight_gradient=None if trainers is None else _timed(step, machine, trainers), memory=_memory(step),
    )  # fmt: skip
