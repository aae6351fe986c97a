"""The linear head on the CPU: time of forward + backward and peak memory, beside the plain formula and TRL's head.

python bench/cpu_linear.py [--rows 1024] [--vocabulary 32000] [--width 512] [--threads 2] [--output FILE]

All providers take turns within one run, and the ratio is the median of the paired ratios. "20 % active": a fifth of the
rollouts have an advantage, the others 0. Peaks are of a process each, above its inputs. TRL's head runs where trl is
installed, and takes the log-probs from the hidden states alone: the loss after it is the plain formula's. "TRL / it" is
against its faster tile.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
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
from bench.cpu_logits import resident


def dapo_loss(logp, advantages, old):
    ratio = (logp - old).exp()
    advantages = advantages.unsqueeze(-1)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28)).mean()


def eager(hidden, weight, targets, advantages, old):
    """DAPO as one would write it, with the entropy as a metric."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    logp = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    loss = dapo_loss(logp, advantages, old)
    loss.backward()
    return loss.detach(), entropy


def trl_head(columns: int):
    """TRL's head with tiles of so many columns; its trainer takes 32768, and on this CPU 8192 are faster."""

    def go(hidden, weight, targets, advantages, old):
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        flat = hidden.flatten(0, 1)
        logp, entropy, *_ = ChunkedLogProbFunction.apply(
            flat, weight, None, targets.flatten(), 1.0, columns, None, 1.0, ("entropy",)
        )
        loss = dapo_loss(logp.view(targets.shape), advantages, old)
        loss.backward()
        return loss.detach(), entropy.detach().mean()

    return go


def ours(**options):
    def go(hidden, weight, targets, advantages, old):
        output = a3po_kernels.linear_policy_loss(
            hidden, weight, targets, advantages, objective=a3po_kernels.dapo(), old_logprobs=old, backend="torch",
            **options,
        )  # fmt: skip
        output.loss.backward()
        return output.loss.detach(), output.metrics["entropy"]

    return go


def providers(arguments: argparse.Namespace) -> dict:
    """name -> (function, whether a fifth of the rollouts is active)."""
    found = {
        "eager": (eager, False),
        "ours": (ours(), False),
        "ours recompute": (ours(route="recompute"), False),
        "ours 20 % active": (ours(), True),
        "ours recompute 20 % active": (ours(route="recompute"), True),
        "ours 20 % active, active statistics": (ours(statistics="active"), True),
    }
    try:
        importlib.metadata.version("trl")
        found["TRL, its trainer's tile"] = (trl_head(32768), False)
        found["TRL, its trainer's tile, 20 % active"] = (trl_head(32768), True)
        found["TRL"] = (trl_head(8192), False)
        found["TRL 20 % active"] = (trl_head(8192), True)
    except importlib.metadata.PackageNotFoundError:
        print("TRL: skipped, trl is not installed here", file=sys.stderr)
    return found


def inputs(arguments: argparse.Namespace, sparse: bool):
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    rollouts = 10
    length = arguments.rows // rollouts
    hidden = torch.randn(rollouts, length, arguments.width, generator=generator)
    weight = torch.randn(arguments.vocabulary, arguments.width, generator=generator) * (2 / arguments.width**0.5)
    targets = torch.randint(0, arguments.vocabulary, (rollouts, length), generator=generator)
    current = a3po_kernels.linear_token_logprobs(hidden, weight, targets).logprobs
    old = current + 0.1 * torch.randn(rollouts, length, generator=generator)
    advantages = torch.tensor([1.0, -1.0]).repeat(rollouts // 2)
    if sparse:
        advantages = advantages * (torch.arange(rollouts) < rollouts // 5)
    return hidden, weight, targets, advantages, old


def once(provider, batch):
    hidden, weight, *rest = batch
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    result = provider(hidden, weight, *rest)
    return result, hidden.grad, weight.grad


def measure_peak(name: str, arguments: argparse.Namespace) -> int:
    provider, sparse = providers(arguments)[name]
    batch = inputs(arguments, sparse)
    hidden, weight, targets, advantages, old = batch
    small = (hidden[:, :2, :16].clone(), weight[:64, :16].clone(), targets[:, :2] % 64, advantages, old[:, :2])
    once(provider, small)  # loads the libraries
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    once(provider, batch)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1020)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak_of:
        print(measure_peak(arguments.peak_of, arguments))
        return
    cases = providers(arguments)
    batches = {sparse: inputs(arguments, sparse) for sparse in (False, True)}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.repeats + 1):
        for name, (provider, sparse) in cases.items():
            start = time.perf_counter()
            once(provider, batches[sparse])
            times[name].append(time.perf_counter() - start)
    del batches
    rows = []
    for name, (_, sparse) in cases.items():
        measured = times[name][1:]
        trl = times.get("TRL 20 % active" if sparse else "TRL")
        peak = subprocess.run(
            [sys.executable, *sys.argv, "--peak-of", name], capture_output=True, text=True, check=True
        )  # fmt: skip
        rows.append({
            "provider": name, "mode": "forward + backward", "rows": arguments.rows, "vocabulary": arguments.vocabulary,
            "width": arguments.width, "dtype": "fp32", "threads": arguments.threads,
            "active_fraction": 0.2 if sparse else 1.0, "median_ms": 1e3 * statistics.median(measured),
            "ratio_to_eager": statistics.median(a / b for a, b in zip(measured, times["eager"][1:], strict=True)),
            "trl_ratio": trl and statistics.median(b / a for a, b in zip(measured, trl[1:], strict=True)),
            "peak_mb_above_inputs": int(peak.stdout.split()[-1]) / 1e6,
            "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
        })  # fmt: skip
    print(f"{'provider':38}{'median ms':>11}{'x eager':>10}{'TRL / it':>10}{'peak MB':>10}")
    for row in rows:
        trl = f"{row['trl_ratio']:.2f}" if row["trl_ratio"] else "-"
        print(
            f"{row['provider']:38}{row['median_ms']:11.0f}{row['ratio_to_eager']:10.2f}{trl:>10}"
            f"{row['peak_mb_above_inputs']:10.0f}"
        )  # fmt: skip
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
