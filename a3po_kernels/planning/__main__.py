"""What a step of the linear head takes on tp x cp x dp ranks before it runs: memory, time, route, and others beside it.

    python -m a3po_kernels.planning --model config.json --tokens 65536 --gpu h100 --active 0.3 --dp 8 --tp 2
    python -m a3po_kernels.planning --hidden 4096 --vocab 151936 --layers 36 --tokens 8192 --tp 8 --dp 64

The rates of an H200 were measured, those of the other cards are assumed from their data sheets, links are assumptions:
docs/scaling.md. Every one is an argument.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..losses.linear import ROUTES, STATISTICS
from ..named_objectives import as_objective
from ..parallel.vocabulary import LAYOUTS, REDUCTIONS
from .cards import CARDS, REFERENCE, Card, find_card
from .estimate import ALGORITHMS, WEIGHT_GRADIENTS, Machine
from .model import Model, assumed_model, read_model
from .plan import Plan, make_plan
from .step import HeadStep
from .text import as_text

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
LINKS = Machine()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m a3po_kernels.planning", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = made.add_argument
    add("--model", metavar="PATH", help="a Hugging Face config.json, or the folder that holds it; or else:")
    add("--hidden", "--width", type=int, help="H, of the hidden states")
    add("--vocab", "--vocabulary", type=int, help="V")
    add("--layers", type=int, help="of a dense model, 12 H^2 parameters each, for the share of the training step")
    add("--tokens", "--rows", type=int, required=True, help="of one data-parallel replica, in one forward and backward")
    add("--rollouts", type=int, default=HeadStep.rollouts, help="of a replica, of equal length (%(default)s)")
    add("--active", "--active-fraction", type=float, default=1.0, help="share of the tokens with a gradient (1)")
    add("--objective", default="a3po", help="a preset's name (%(default)s)")
    add("--on-policy", action="store_true", help="no old log-probs: the current policy is the behaviour policy")
    add("--dtype", choices=DTYPES, help="of the head; by default the config's, or bf16")
    for name, text in (("tp", "tensor"), ("cp", "context"), ("dp", "data")):
        add(f"--{name}", type=int, default=1, help=f"{text}-parallel ranks")
    add("--gpu", default=REFERENCE, help=f"{', '.join(CARDS)} (%(default)s)")
    add("--device-memory", type=int, help="bytes, instead of the card's")
    add("--route", choices=ROUTES, default="auto")
    add("--statistics", choices=STATISTICS, default="all")
    add("--max-chunk-bytes", type=int)
    add("--frozen-weight", action="store_true", help="no gradient of the weight")
    add("--lora-rank", type=int, default=0)
    add("--grad-hidden", choices=REDUCTIONS, help="all_reduce; reduce_scatter where the sequence is sharded")
    add("--hidden-layout", choices=LAYOUTS, default="replicated")
    add("--no-reduce-metrics", action="store_true")
    add("--weight-gradient", choices=WEIGHT_GRADIENTS, default=WEIGHT_GRADIENTS[0], help="the trainer's (%(default)s)")
    add("--mfu", type=float, default=0.4, help="of the model below the head, of the data sheet's rate (%(default)s)")
    add("--tflops", type=float, help="sustained by the head's products, instead of the card's")
    add("--copy-gb-per-s", type=float, help="GB/s of memory, read and written, instead of the card's")
    add("--gpus-per-node", type=int, default=LINKS.gpus_per_node)
    add("--node-gb-per-s", type=float, help="GB/s one way within a node, instead of the card's data sheet")
    add("--node-us", type=float, default=1e6 * LINKS.node_latency, help="microseconds of a message there (%(default)s)")
    add("--link-gb-per-s", type=float, default=LINKS.network_bandwidth / 1e9, help="between nodes (%(default)s)")
    add("--link-us", type=float, default=1e6 * LINKS.network_latency, help="microseconds there (%(default)s)")
    add("--algorithm", choices=ALGORITHMS, default=LINKS.algorithm, help="messages of a collective (%(default)s)")
    add("--no-overlap", action="store_true", help="every collective is waited for")
    add("--json", action="store_true", help="everything as one JSON object")
    return made


@dataclass(frozen=True)
class Asked:
    """What the arguments say."""

    args: argparse.Namespace
    step: HeadStep
    machine: Machine
    card: Card
    model: Model

    def plan(self) -> Plan:
        flops = None if self.step.dtype.itemsize == 2 else self.machine.flops
        return make_plan(
            self.step, self.card, self.model, self.machine, mfu=self.args.mfu,
            weight_gradient=self.args.weight_gradient, flops=flops,
        )  # fmt: skip

    def rates(self) -> dict[str, str]:
        """Where each rate comes from."""
        given = {"flops": self.args.tflops, "copy": self.args.copy_gb_per_s}
        found = {name: self.card.rates.origin if value is None else "given" for name, value in given.items()}
        return {**found, "limit": "data sheet" if self.step.dtype.itemsize == 2 else "products as given, data sheet"}


def _model(args: argparse.Namespace) -> Model:
    sizes = {"--hidden": args.hidden, "--vocab": args.vocab, "--layers": args.layers}
    if args.model is not None:
        if beside := [name for name, value in sizes.items() if value is not None]:
            raise ValueError(f"--model says what {', '.join(beside)} would; give one or the other")
        return read_model(args.model)
    if args.hidden is None or args.vocab is None:
        raise ValueError("give --model, or --hidden and --vocab")
    return assumed_model(args.hidden, args.vocab, args.layers)


def read(argv: Sequence[str] | None) -> Asked:
    """Raises ValueError for what argparse cannot see."""
    args = parser().parse_args(argv)
    card, model = find_card(args.gpu, "--gpu"), _model(args)
    dtype = DTYPES[args.dtype] if args.dtype else model.dtype or torch.bfloat16
    if dtype.itemsize != 2 and args.tflops is None:
        raise ValueError(f"the cards' rates are of bf16 and fp16; give --tflops for a head in {dtype}, or --dtype")
    if args.device_memory is not None:
        card = replace(card, memory=args.device_memory)
    step = HeadStep(
        args.tokens, model.vocabulary, model.hidden, dtype, as_objective(args.objective), on_policy=args.on_policy,
        rollouts=args.rollouts, tp=args.tp, cp=args.cp, dp=args.dp, route=args.route, active_fraction=args.active,
        statistics=args.statistics, grad_hidden=args.grad_hidden, hidden_layout=args.hidden_layout,
        lora_rank=args.lora_rank, frozen_weight=args.frozen_weight, reduce_metrics=not args.no_reduce_metrics,
        max_chunk_bytes=args.max_chunk_bytes, device_memory=card.memory,
    )  # fmt: skip
    given = (
        ("flops", args.tflops, 1e12), ("copy", args.copy_gb_per_s, 1e9), ("node_bandwidth", args.node_gb_per_s, 1e9),
    )  # fmt: skip
    machine = Machine.of(
        card, **{name: unit * value for name, value, unit in given if value is not None},
        gpus_per_node=args.gpus_per_node, node_latency=args.node_us / 1e6,
        network_bandwidth=1e9 * args.link_gb_per_s, network_latency=args.link_us / 1e6, algorithm=args.algorithm,
        overlap=not args.no_overlap,
    )  # fmt: skip
    return Asked(args, step, machine, card, model)


def main(argv: Sequence[str] | None = None) -> None:
    try:
        asked = read(argv)
        plan = asked.plan()
    except ValueError as error:
        parser().error(str(error))
    if asked.args.json:
        print(json.dumps({"arguments": vars(asked.args), **plan.as_json(), "rates": asked.rates()}, indent=2))
    else:
        print(as_text(plan, asked.args.objective, asked.rates()))


if __name__ == "__main__":
    main()
