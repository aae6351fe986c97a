"""Time and peak memory of the logits path on the CPU beside the plain eager formula, in one run.

    python bench/cpu_logits.py [--rows 1024] [--vocabulary 32000] [--threads 2] [--repeats 7] [--output FILE]

Providers run in turn in one process for the times (quote the median of paired ratios: the machine may be noisy), then
each alone in a process of its own for the peak of resident memory above the inputs.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import a3po_kernels


class Model(torch.autograd.Function):
    """Stands for the model below the head: gives the logits, and takes their gradient without keeping it."""

    @staticmethod
    def forward(ctx, parameter, logits):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(()), None


def head_input(logits: torch.Tensor) -> torch.Tensor:
    return Model.apply(torch.zeros((), requires_grad=True), logits)


def eager(logits, targets, advantages, old):
    """DAPO as one would write it: log-softmax, entropy as a metric, clipped ratio, mean over tokens."""
    log_p = torch.log_softmax(logits.float(), -1)
    logp = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    ratio = (logp - old).exp()
    advantages = advantages.unsqueeze(-1)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28)).mean()
    loss.backward()
    return loss.detach(), entropy


def ours(objective, **options):
    def go(logits, targets, advantages, old):
        output = a3po_kernels.policy_loss(
            logits, targets, advantages, objective=objective, old_logprobs=old, backend="torch", **options
        )
        output.loss.backward()
        return output.loss.detach(), output.metrics["entropy"]

    return go


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure_peak(name: str, arguments: argparse.Namespace) -> int:
    """Peak resident bytes above the inputs of one provider; call it in a process of its own."""
    provider, (logits, *rest) = providers(arguments)[name]
    small = (logits[:2, :4, :64].clone(), rest[0][:2, :4] % 64, rest[1][:2], rest[2][:2, :4])
    provider(head_input(small[0]), *small[1:])  # loads the libraries
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    provider(head_input(logits), *rest)
    return resident("VmHWM") - before


def providers(arguments: argparse.Namespace) -> dict:
    """name -> (function, batch); the same random logits for all."""
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    rollouts, length = 8, arguments.rows // 8
    logits = torch.randn(rollouts, length, arguments.vocabulary, generator=generator).mul_(2)
    targets = torch.randint(0, arguments.vocabulary, (rollouts, length), generator=generator)
    current = a3po_kernels.token_logprobs(logits, targets).logprobs
    old = current + 0.1 * torch.randn(rollouts, length, generator=generator)
    advantages = torch.tensor([1.0, -1.0]).repeat(rollouts // 2)
    sparse = advantages * (torch.arange(rollouts) < 2)  # three rollouts in four without a gradient
    batch = (logits, targets, advantages, old)
    return {
        "eager dapo": (eager, batch),
        "dapo": (ours(a3po_kernels.dapo()), batch),
        "a3po": (ours(a3po_kernels.a3po()), batch),
        "a3po in place": (ours(a3po_kernels.a3po(), inplace_backward=True), batch),
        "dapo + entropy bonus": (ours(a3po_kernels.dapo(entropy_coef=0.01)), batch),
        "dapo 25 % active": (ours(a3po_kernels.dapo()), (logits, targets, sparse, old)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(measure_peak(arguments.peak_of, arguments))
        return
    cases = providers(arguments)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.repeats + 1):
        for name, (provider, (logits, *rest)) in cases.items():
            own = head_input(logits.clone())  # in place the logits are spoilt, so each run gets its own
            start = time.perf_counter()
            provider(own, *rest)
            times[name].append(time.perf_counter() - start)
    del cases
    rows = []
    for name in times:
        measured = times[name][1:]
        ratios = [a / b for a, b in zip(measured, times["eager dapo"][1:], strict=True)]
        command = [sys.executable, *sys.argv, "--peak-of", name]
        peak = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({
            "provider": name, "mode": "forward + backward", "rows": arguments.rows, "vocabulary": arguments.vocabulary,
            "dtype": "fp32", "threads": arguments.threads, "median_ms": 1e3 * statistics.median(measured),
            "ratio_to_eager": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "peak_mb_above_inputs": int(peak.stdout) / 1e6,
            "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
        })  # fmt: skip
    print(f"{'provider':24}{'median ms':>12}{'x eager (min..max)':>24}{'peak MB above inputs':>24}")
    for row in rows:
        ratio = f"{row['ratio_to_eager']:.2f} ({row['ratio_min']:.2f}..{row['ratio_max']:.2f})"
        print(f"{row['provider']:24}{row['median_ms']:12.1f}{ratio:>24}{row['peak_mb_above_inputs']:24.1f}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
