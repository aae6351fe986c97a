"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Iterator

from .cards import CARDS, REFERENCE
from .plan import Plan


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"


def _mb(size: float) -> str:
    return f"{size / 1e6:.1f}"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def _head(plan: Plan, objective: str) -> Iterator[str]:
    step, chunk = plan.step, plan.chunk
    dtype = str(step.dtype).removeprefix("torch.")
    chunks = _plural(plan.estimate.chunks, "chunk")
    ranks = f"tp {step.tp}, cp {step.cp}, dp {step.dp}"
    yield f"{_plural(step.ranks, 'GPU')}: {ranks}; {plan.estimate.route}, {step.active} rows in {chunks}"
    yield f"card: {plan.card.name}, {step.device_memory / 1e9:g} GB"
    active = f"{100 * step.active_fraction:g} % with a gradient"
    yield (
        f"head: {objective}, {step.vocabulary} x {step.width}, {dtype}; {step.rows} tokens a replica, "
        f"{step.dp * step.rows} in all, {active}"
    )
    if chunk.count:
        logits = f"{chunk.rows} rows x {chunk.columns} columns of logits at a time, {_plural(chunk.count, 'time')}"
        yield f"chunk: {logits}; max_chunk_bytes = {chunk.max_chunk_bytes}"
    else:
        yield "chunk: no row has a gradient"


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.estimate.memory
    yield f"{'memory of a rank, MB':28}{'at most':>12}   at the peak ({memory.moment})"
    for name, size in memory.items():
        if name != "total":
            yield f"{name:28}{_mb(size):>12}{_mb(memory.peak[name]):>12}"
    share = 100 * memory["total"] / plan.step.device_memory
    yield f"{'total above the inputs':28}{'':12}{_mb(memory['total']):>12}, {share:.1f} % of the card"
    if plan.model.tied and not plan.step.frozen_weight:
        whole = plan.step.shard * plan.step.width * plan.step.dtype.itemsize
        yield f"(tied: the embedding's own gradient, {_mb(whole)} MB, joins it when the model's backward ends)"


def _times(plan: Plan, rates: dict[str, str]) -> Iterator[str]:
    found, limit, machine = plan.estimate, plan.limit, plan.machine
    sheet = f"{limit.flops / 1e12:g} TFLOP/s, {limit.bandwidth / 1e12:g} TB/s"
    rows = {
        "operations of a rank": f"{found.operations / 1e12:.3f} T",
        "limit": f"{_ms(limit.seconds)}: {limit.operations / 1e12:.3f} T, {limit.moved / 1e9:.3f} GB at {sheet} "
        f"({rates['limit']})",
        "products": f"{_ms(found.seconds_products)} at {machine.flops / 1e12:g} TFLOP/s ({rates['flops']})",
        "kernels": f"{_ms(found.seconds_kernels)} at {machine.copy / 1e9:g} GB/s ({rates['copy']})",
        "collectives, exposed": f"{_ms(found.seconds_exposed)}, {found.wire_bytes / 1e6:.2f} MB sent by a rank",
        "step": f"{_ms(found.seconds)}, {found.tokens_per_second / 1e6:.3f} million tokens a second; "
        f"{100 * limit.seconds / found.seconds:.0f} % of the limit",
        "one GPU": f"{_ms(found.seconds_one_gpu)} a replica; efficiency {100 * found.efficiency:.1f} %",
    }
    if plan.share is None:
        rows["share of the training step"] = f"left out: {plan.model.unknown}"
    else:
        share = plan.share
        rows["share of the training step"] = (
            f"{100 * share.share:.1f} %: the model's forward and backward {_ms(share.model_seconds)} at "
            f"{100 * share.mfu:g} % of the data sheet's rate (assumed); {plan.model.origin}"
        )
    yield from (f"{name:28}{value}" for name, value in rows.items())


def _collectives(plan: Plan) -> Iterator[str]:
    found = plan.estimate
    listed = [*found.collectives, *([found.weight_gradient] if found.weight_gradient else [])]
    if not listed:
        yield "collectives: none"
        return
    yield (
        f"{'collective':28}{'kind':16}{'group':>6}{'ranks':>7}{'calls':>7}{'bytes each':>14}{'sent, MB':>10}{'ms':>9}"
        f"{'exposed':>9}"
    )
    for line in listed:
        one = line.traffic
        yield (
            f"{one.what:28}{one.kind:16}{one.group:>6}{line.ranks:7}{one.count:7}{one.bytes:14}"
            f"{line.wire_bytes / 1e6:10.2f}{1e3 * line.seconds:9.3f}{1e3 * line.exposed:9.3f}"
        )
    if found.weight_gradient:
        yield "(the trainer's is in no sum above: it usually runs beside the model's backward)"


def _beside(plan: Plan) -> Iterator[str]:
    if plan.why_not_beside:
        yield f"beside it: left out, {plan.why_not_beside}"
        return
    split = f", ours over tp {plan.step.tp}, the others not split" if plan.step.tp > 1 else ""
    yield f"{'by formula, a rank' + split:60}{'ms':>12}{'peak, MB':>12}"
    ours = plan.estimate
    yield f"{'ours, ' + ours.route:60}{1e3 * ours.seconds:12.3f}{_mb(ours.memory['total']):>12}"
    for one in plan.beside:
        over = "  more than the card has" if one.memory > plan.step.device_memory else ""
        yield f"{one.name:60}{1e3 * one.seconds:12.3f}{_mb(one.memory):>12}{over}"
    yield from (f"  {one.name}: {one.text}" for one in plan.beside)


def _assumed(plan: Plan, rates: dict[str, str]) -> Iterator[str]:
    machine = plan.machine
    node = f"within a node {machine.node_bandwidth / 1e9:g} GB/s, {1e6 * machine.node_latency:g} us"
    network = f"between nodes {machine.network_bandwidth / 1e9:g} GB/s, {1e6 * machine.network_latency:g} us"
    yield f"Assumed, not measured: {node}; {network}; {machine.algorithm}s."
    if "assumed" in rates.values():
        yield f"Assumed rates: as far below the data sheet as was measured on an {CARDS[REFERENCE].name}."


def as_text(plan: Plan, objective: str, rates: dict[str, str]) -> str:
    """objective: its name; rates: where the rates of the "limit", "flops" and "copy" come from, in words."""
    parts = (
        _head(plan, objective), _memory(plan), _times(plan, rates), _collectives(plan), _beside(plan),
        _assumed(plan, rates),
    )  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts)
