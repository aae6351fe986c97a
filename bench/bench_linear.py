"""The linear head by each of its routes beside plain PyTorch, torch.compile and the peers: time and peak memory.

    python -m bench.bench_linear [--quick] [--save]
    python -m bench.bench_linear --rows 8192 --vocab 151936 --hidden 2048 --dtype bf16 --active 0.5

Writes linear.jsonl (bench/options.py says where), and says who is fastest and how far from the limit.
"""

from __future__ import annotations

import torch

from bench import options
from bench._compare import compare
from bench.harness import Problem


def problems(device: torch.device, quick: bool) -> list[Problem]:
    if device.type == "cuda":
        half = torch.bfloat16
        first = [Problem("linear", 8320, 151936, 4096, half, active_fraction=f) for f in (1.0, 0.2)]
        if quick:
            return first
        sizes = [(8320, 128256, 4096), (8320, 32000, 4096), (8320, 151936, 1536), (4160, 262144, 2048)]
        half_active = Problem("linear", 8320, 151936, 4096, half, active_fraction=0.5)
        return [*first, half_active, *(Problem("linear", n, v, h, half) for n, v, h in sizes)]
    if quick:
        return [Problem("linear", 120, 32000, 128)]
    dense = [Problem("linear", 600, 32000, 512), Problem("linear", 300, 32000, 512, torch.bfloat16)]
    return [*dense, Problem("linear", 600, 32000, 512, active_fraction=0.2)]


def main() -> None:
    parser = options.arguments(__doc__)
    options.add_shape(parser, hidden=True)
    args = options.parse(parser)
    repeats = args.repeats or (3 if args.quick else 5 if args.device.type == "cpu" else 10)
    listed = options.chosen(parser, args, problems(args.device, args.quick))
    compare(listed, args, repeats, args.folder / "linear.jsonl")


if __name__ == "__main__":
    main()
