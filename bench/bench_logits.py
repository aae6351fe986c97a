"""The logits path beside plain PyTorch, torch.compile and the peers: time forward and backward, and peak memory.

    python -m bench.bench_logits [--quick] [--save]
    python -m bench.bench_logits --rows 8192 --vocab 151936 --dtype bf16 --active 0.5

Writes logits.jsonl (bench/options.py says where), and says who is fastest and how far from the limit.
"""

from __future__ import annotations

import torch

from bench import options
from bench._compare import compare
from bench.harness import Problem


def problems(device: torch.device, quick: bool) -> list[Problem]:
    if device.type == "cuda":
        if quick:
            return [Problem("logits", 8320, 151936, dtype=torch.bfloat16)]
        sparse = [Problem("logits", 8320, 151936, dtype=torch.bfloat16, active_fraction=f) for f in (1.0, 0.2, 0.5)]
        sizes = [(8320, 128256), (33280, 32000), (4160, 262144), (2080, 151936), (8320, 32000)]
        found = [Problem("logits", n, v, dtype=torch.bfloat16) for n, v in sizes]
        return [*sparse, *found, Problem("logits", 4160, 128256, dtype=torch.float32)]
    if quick:
        return [Problem("logits", 120, 32000)]
    sizes = [(1020, 32000, torch.float32), (1020, 32000, torch.bfloat16), (210, 151936, torch.float32)]
    found = [Problem("logits", n, v, dtype=dtype) for n, v, dtype in sizes]
    return [*found, Problem("logits", 1020, 32000, active_fraction=0.2)]


def main() -> None:
    parser = options.arguments(__doc__)
    options.add_shape(parser, hidden=False)
    args = options.parse(parser)
    repeats = args.repeats or (3 if args.quick else 5 if args.device.type == "cpu" else 20)
    listed = options.chosen(parser, args, problems(args.device, args.quick))
    compare(listed, args, repeats, args.folder / "logits.jsonl")


if __name__ == "__main__":
    main()
