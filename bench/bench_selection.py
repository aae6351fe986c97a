"""Selecting the 20 % least values of each rollout: select_tokens beside sort, topk and quantile.

    python -m bench.bench_selection [--quick]

Writes bench/results/<device>/selection.jsonl. All but quantile give the same tokens, which is checked: it takes
all that tie with its threshold, as TRL's top_entropy_quantile does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

import a3po_kernels
from bench import harness, options
from bench.harness import Problem, Provider

RATIO = 0.2


def ours(batch: dict) -> Tensor:
    return a3po_kernels.select_tokens(batch["values"], batch["mask"], ratio=RATIO, side="low")


def _counts(mask: Tensor) -> Tensor:
    """k = max(1, floor(n / 5)) of each rollout, from integers."""
    return torch.clamp(mask.sum(1) // 5, min=1)


def sort(batch: dict) -> Tensor:
    values, mask = batch["values"], batch["mask"]
    order = torch.sort(values.masked_fill(~mask, torch.inf), dim=1, stable=True).indices
    chosen = torch.arange(values.shape[1], device=values.device) < _counts(mask).unsqueeze(1)
    return torch.zeros_like(mask).scatter_(1, order, chosen) & mask


def topk(batch: dict) -> Tensor:
    """The greatest k of the batch is read on the host; ties go to whichever topk takes."""
    values, mask = batch["values"], batch["mask"]
    counts = _counts(mask)
    most = int(counts.max())
    order = torch.topk(values.masked_fill(~mask, torch.inf), most, dim=1, largest=False, sorted=True).indices
    chosen = torch.arange(most, device=values.device) < counts.unsqueeze(1)
    return torch.zeros_like(mask).scatter_(1, order, chosen) & mask


def quantile(batch: dict) -> Tensor:
    values, mask = batch["values"], batch["mask"]
    threshold = torch.nanquantile(values.masked_fill(~mask, torch.nan), RATIO, dim=1, keepdim=True)
    return (values <= threshold) & mask


PROVIDERS = (
    Provider("sort", sort),
    Provider("ours", ours),
    Provider("topk", topk, note="reads the greatest k on the host; ties in any order"),
    Provider("quantile", quantile, note="takes all that tie; another rounding of k"),
)


def inputs(rollouts: int, length: int, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(rollouts, length, generator=generator, device=device)
    lengths = torch.randint(length // 2, length + 1, (rollouts, 1), generator=generator, device=device)
    return {"values": values, "mask": torch.arange(length, device=device) < lengths}


def main() -> None:
    args = options.parse(options.arguments(__doc__))
    repeats = args.repeats or (5 if args.quick else 30)
    sizes = [(16, 512)] if args.quick else [(64, 1024), (64, 8192), (512, 1024), (8, 32768)]
    known = harness.ceilings(args.device, (), args.quick)
    rows = []
    for rollouts, length in tqdm(sizes, desc="selection"):
        batch = inputs(rollouts, length, args.device)
        expected = sort(batch)
        assert torch.equal(ours(batch), expected) and torch.equal(topk(batch), expected)
        quantile(batch)
        problem = Problem(
            "selection", rollouts * length, objective=f"least 20 % of {rollouts} rollouts of up to {length}"
        )

        def go(select, batch=batch) -> None:  # nothing to go backward through
            select(batch)

        timed = [Provider(p.name, lambda batch, p=p: go(p.forward), note=p.note) for p in PROVIDERS]
        made = {p.name: lambda: {} for p in timed}
        times = harness.measure(timed, made, args.device, repeats)
        found = harness.make_rows(problem, timed, times, "sort", known, args.device, {}, modes=("forward",))
        print(f"\n{problem.objective}")
        harness.print_rows(found, ("forward",))
        rows += found
    harness.write(rows, args.folder / "selection.jsonl")


if __name__ == "__main__":
    main()
