"""What a step of the linear head takes on tp x cp x dp ranks: operations, bytes over the wire, time and memory.

    python -m a3po_kernels.planning --rows 8192 --vocabulary 151936 --width 4096 --tp 8 --dp 64

Rates, bandwidths and latencies are assumptions, each an argument; docs/scaling.md says which were measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

import torch

from ..named_objectives import presets
from ..parallel.vocabulary import LAYOUTS, REDUCTIONS
from .estimate import ALGORITHMS, Machine, StepEstimate, estimate_step
from .step import H200_BYTES, HeadStep

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
RATES = Machine()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m a3po_kernels.planning", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--rows", type=int, required=True, help="tokens of one data-parallel replica")
    add("--vocabulary", type=int, required=True)
    add("--width", type=int, required=True, help="of the hidden states")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--objective", choices=sorted(presets), default="a3po")
    add("--on-policy", action="store_true", help="no old log-probs: the current policy is the behaviour policy")
    add("--rollouts", type=int, default=HeadStep.rollouts, help="of a replica (%(default)s)")
    for name, text in (("tp", "tensor"), ("cp", "context"), ("dp", "data")):
        add(f"--{name}", type=int, default=1, help=f"{text}-parallel ranks")
    add("--route", choices=("auto", "one-pass", "recompute"), default="auto")
    add("--active-fraction", type=float, default=1.0, help="share of the rows with a gradient")
    add("--statistics", choices=("all", "active"), default="all")
    add("--grad-hidden", choices=REDUCTIONS, help="all_reduce; reduce_scatter where the sequence is sharded")
    add("--hidden-layout", choices=LAYOUTS, default="replicated")
    add("--lora-rank", type=int, default=0)
    add("--frozen-weight", action="store_true", help="no gradient of the weight")
    add("--no-reduce-metrics", action="store_true")
    add("--weight-gradient", choices=("reduce_scatter", "all_reduce"), default="reduce_scatter", help="the trainer's")
    add("--max-chunk-bytes", type=int)
    add("--device-memory", type=int, default=H200_BYTES, help="bytes of a card (%(default)s)")
    add("--tflops", type=float, default=RATES.flops / 1e12, help="sustained by the products (%(default)s)")
    add("--copy-gb-per-s", type=float, default=RATES.copy / 1e9, help="GB/s of memory, read and written (%(default)s)")
    add("--gpus-per-node", type=int, default=RATES.gpus_per_node)
    for name, text in (("node", "within a node"), ("link", "between nodes")):
        bandwidth, latency = RATES.link(1 if name == "node" else RATES.gpus_per_node + 1)[::-1]
        add(f"--{name}-gb-per-s", type=float, default=bandwidth / 1e9, help=f"GB/s one way {text} (%(default)s)")
        add(f"--{name}-us", type=float, default=1e6 * latency, help=f"microseconds of a message {text} (%(default)s)")
    add("--algorithm", choices=ALGORITHMS, default=RATES.algorithm, help="messages of a collective (%(default)s)")
    add("--no-overlap", action="store_true", help="every collective is waited for")
    add("--json", action="store_true", help="everything as one JSON object")
    return made


def read(argv: Sequence[str] | None) -> tuple[argparse.Namespace, HeadStep, Machine]:
    args = parser().parse_args(argv)
    step = HeadStep(
        args.rows, args.vocabulary, args.width, DTYPES[args.dtype], presets[args.objective](),
        on_policy=args.on_policy, rollouts=args.rollouts, tp=args.tp, cp=args.cp, dp=args.dp, route=args.route,
        active_fraction=args.active_fraction, statistics=args.statistics, grad_hidden=args.grad_hidden,
        hidden_layout=args.hidden_layout, lora_rank=args.lora_rank, frozen_weight=args.frozen_weight,
        reduce_metrics=not args.no_reduce_metrics, max_chunk_bytes=args.max_chunk_bytes,
        device_memory=args.device_memory,
    )  # fmt: skip
    machine = Machine(
        flops=1e12 * args.tflops, copy=1e9 * args.copy_gb_per_s, gpus_per_node=args.gpus_per_node,
        node_bandwidth=1e9 * args.node_gb_per_s, node_latency=args.node_us / 1e6,
        network_bandwidth=1e9 * args.link_gb_per_s, network_latency=args.link_us / 1e6, algorithm=args.algorithm,
        overlap=not args.no_overlap,
    )  # fmt: skip
    return args, step, machine


def as_text(step: HeadStep, machine: Machine, found: StepEstimate) -> str:
    chunks = f"{found.chunks} chunk" + ("" if found.chunks == 1 else "s")
    lines = [
        f"{step.ranks} GPUs: tp {step.tp}, cp {step.cp}, dp {step.dp}; {found.route}, {step.active} rows in {chunks}",
        "",
        f"{'collective':28}{'kind':16}{'group':>6}{'ranks':>7}{'calls':>7}{'bytes each':>14}{'sent, MB':>10}"
        f"{'ms':>9}{'exposed':>9}",
    ]
    listed = [*found.collectives, *([found.weight_gradient] if found.weight_gradient else [])]
    for line in listed:
        one = line.traffic
        lines.append(
            f"{one.what:28}{one.kind:16}{one.group:>6}{line.ranks:7}{one.count:7}{one.bytes:14}"
            f"{line.wire_bytes / 1e6:10.2f}{1e3 * line.seconds:9.3f}{1e3 * line.exposed:9.3f}"
        )
    lines += [] if listed else ["none"]
    if found.weight_gradient:
        lines.append("(the trainer's is in no sum below: it usually runs beside the model's backward)")
    parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in found.memory.items() if size)
    rows = {
        "operations of a rank": f"{found.operations / 1e12:.3f} T",
        "products": f"{1e3 * found.seconds_products:.3f} ms at {machine.flops / 1e12:g} TFLOP/s",
        "kernels": f"{1e3 * found.seconds_kernels:.3f} ms at {machine.copy / 1e9:g} GB/s",
        "collectives, exposed": f"{1e3 * found.seconds_exposed:.3f} ms, {found.wire_bytes / 1e6:.2f} MB sent by a rank",
        "step": f"{1e3 * found.seconds:.3f} ms, {found.tokens_per_second / 1e6:.3f} million tokens a second",
        "one GPU": f"{1e3 * found.seconds_one_gpu:.3f} ms a replica; efficiency {100 * found.efficiency:.1f} %",
        "memory of a rank": f"{parts} MB above the inputs",
    }
    lines += ["", *(f"{name:22}{value}" for name, value in rows.items())]
    node = f"within a node {machine.node_bandwidth / 1e9:g} GB/s, {1e6 * machine.node_latency:g} us"
    network = f"between nodes {machine.network_bandwidth / 1e9:g} GB/s, {1e6 * machine.network_latency:g} us"
    return "\n".join([*lines, "", f"Assumed, not measured: {node}; {network}; {machine.algorithm}s."])


def main(argv: Sequence[str] | None = None) -> None:
    try:
        args, step, machine = read(argv)
    except ValueError as error:
        parser().error(str(error))
    found = estimate_step(step, machine, args.weight_gradient)
    if args.json:
        print(json.dumps({"arguments": vars(args), "machine": asdict(machine), "estimate": asdict(found)}, indent=2))
    else:
        print(as_text(step, machine, found))


if __name__ == "__main__":
    main()
