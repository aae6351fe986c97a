"""The sweep of bench.on_gpu: constants of the vocabulary kernels, each combination timed, the fastest marked."""

from __future__ import annotations

import importlib
import itertools
import statistics

import torch

import a3po_kernels
from bench import harness

LANES = (128, 512, 1024)
# (the call that is timed, the module of the constants, constant -> values): every combination is tried.
SWEEPS: tuple[tuple[str, str, dict[str, tuple]], ...] = (
    (
        "statistics",
        "a3po_kernels.backends.triton.statistics",
        {"_LANES_PER_THREAD": (1, 2, 4), "_UNROLL": (dict.fromkeys(LANES, 1), dict.fromkeys(LANES, 2))},
    ),
    (
        "gradient",
        "a3po_kernels.backends.triton.gradient",
        {"_BLOCK_BYTES": (4096, 8192, 16384), "_WARPS": (4, 8)},
    ),
    (
        "one launch",
        "a3po_kernels.backends.triton.one_launch",
        {"_UNROLL": (1, 2), "_REGISTERS": (32, 40, 64)},
    ),
)


def tune(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, copy_rate: float, quick: bool
) -> list[dict]:
    """A row for each configuration of the two vocabulary kernels: ms, bytes a second, whether it was the fastest."""
    logits = torch.randn(1, rows, vocabulary, device=device).to(dtype)
    targets = torch.randint(0, vocabulary, (1, rows), device=device)

    def forward() -> None:
        a3po_kernels.token_logprobs(logits, targets)

    leaf = logits.requires_grad_()
    stats = a3po_kernels.token_logprobs(leaf, targets)

    def backward() -> None:
        torch.autograd.grad(stats.logprobs, leaf, torch.ones_like(stats.logprobs), retain_graph=True)

    def one_launch() -> None:
        a3po_kernels.policy_loss(
            leaf, targets, torch.ones(1, device=device), objective=a3po_kernels.dapo(),
            old_logprobs=stats.logprobs.detach(), route="one-launch",
        )  # fmt: skip

    found = []
    calls = {"statistics": (forward, 1), "gradient": (backward, 2), "one launch": (one_launch, 2)}
    for name, module, choices in SWEEPS:
        call, passes = calls[name]
        kernels = importlib.import_module(module)
        before = {key: getattr(kernels, key) for key in choices}
        tried = []
        combinations = list(itertools.product(*choices.values()))
        for values in combinations[:2] if quick else combinations:
            setting = dict(zip(choices, values, strict=True))
            try:
                for key, value in setting.items():
                    setattr(kernels, key, value)
                call()
                times = []
                for _ in range(3 if quick else 15):
                    harness.flush_cache(device)
                    times.append(harness.timed(call, device))
                median = statistics.median(times)
                rate = passes * logits.numel() * logits.element_size() / (median / 1e3)
                row = {"median_ms": median, "gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy_rate}
            except Exception as error:  # a configuration may not compile or fit
                row = {"median_ms": None, "failed": str(error)[:200]}
            finally:
                for key, value in before.items():
                    setattr(kernels, key, value)
            tried.append({"kernel": name, **setting, "default": setting == before, **row})
        fastest = min((row["median_ms"] for row in tried if row["median_ms"] is not None), default=None)
        found += [{**row, "fastest": row["median_ms"] is not None and row["median_ms"] == fastest} for row in tried]
    return found
