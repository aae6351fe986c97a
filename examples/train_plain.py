"""RLVR in a plain loop, with no trainer: sample, verify, one loss from the hidden states, step.

    python -m examples.train_plain --objective a3po --task chain_sum --steps 60

Options, and files below build/plain/, are those of examples.demo, without the heat-map.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

from a3po_kernels import Objective, group_advantages, presets
from a3po_kernels.integrations.transformers import (
    min_p_logprobs_from_model,
    policy_loss_from_model,
    token_logprobs_from_model,
)
from examples import arithmetic, cores, options, runs, small_model
from examples.rollouts import DEMO, evaluate, respond, warm_up
from examples.tasks import TASKS

# Those that figures draws, in the names of `train` and of the loss.
NAMES = {
    "reward": "reward", "entropy": "entropy", "length": "length", "beta": "weight", "clipped": "clip_fraction",
    "clipped_low": "clip_fraction_low", "clipped_high": "clip_fraction_high", "active": "active_fraction",
    "no_advantage": "no_advantage",
}  # fmt: skip


def train(
    model,
    tokens,
    objective: Objective,
    *,
    steps: int,
    prompts: int = 16,
    samples: int = 8,
    iterations: int = 1,
    rate: float = 1e-4,
    reward_noise: float = 0.0,
    seed: int = 0,
    task: ModuleType = arithmetic,
) -> Iterator[dict[str, float]]:
    """Trains in place, `prompts` x `samples` rollouts a step and `iterations` updates on them; yields their metrics.

    reward_noise: the probability that a rollout is trained with the wrong reward; the metrics hold the right ones.
    """
    torch.manual_seed(seed)
    noise = torch.Generator(model.device).manual_seed(seed)
    problems = task.problems("train", 4096)
    groups = torch.arange(prompts, device=model.device).repeat_interleave(samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    order = torch.randperm(len(problems))
    for step in range(steps):
        chosen = [problems[int(order[(step * prompts + i) % len(order)])] for i in range(prompts)]
        rollouts = respond(model, tokens, [entry for entry in chosen for _ in range(samples)], task=task)
        batch = rollouts.batch()
        wrong = torch.rand(len(groups), generator=noise, device=model.device) < reward_noise
        batch["advantages"] = group_advantages(torch.where(wrong, 1 - rollouts.rewards, rollouts.rewards), groups)
        if iterations > 1:
            # From the second update on the current policy is no longer the one that sampled.
            with torch.no_grad():
                stats = token_logprobs_from_model(model, batch)
                batch["old_logprobs"], batch["old_entropy"] = stats.logprobs, stats.entropy
                if objective.low_probability is not None:
                    kappa = objective.low_probability.min_p
                    batch["min_p_logprobs"] = min_p_logprobs_from_model(model, batch, kappa)
        for _ in range(iterations):
            out = policy_loss_from_model(model, batch, objective, step=step)
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        yield {
            "step": step + 1,
            "reward": rollouts.rewards.mean().item(),
            "clip_fraction": (out.metrics["clip_fraction_low"] + out.metrics["clip_fraction_high"]).item(),
            "no_advantage": (batch["advantages"] == 0).float().mean().item(),
            "length": rollouts.completion_mask.sum().item() / len(rollouts.rewards),
            "gradient_norm": norm.item(),
            **{name: value.item() for name, value in out.metrics.items()},
        }


def run(args: argparse.Namespace, objective: str, folder: Path) -> runs.Trained:
    task, composed = TASKS[args.task], presets[objective]()
    warmed_up = warm_up(args.warm_up_folder, args.warm_up_steps, task=task, recipe=DEMO)
    tokens = small_model.tokenizer(task.CHARACTERS)
    model = LlamaForCausalLM.from_pretrained(warmed_up)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    before = evaluate(model, tokens, task=task)
    given = {name: getattr(args, name) for name in ("steps", "iterations", "rate", "reward_noise", "seed")}
    rows, history = [], []
    bar = tqdm(train(model, tokens, composed, task=task, **given), desc=f"{objective}, RLVR", total=args.steps)
    for metrics in bar:
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "entropy", "length")}, refresh=False)
        rows.append(metrics)
        history.append(runs.renamed(metrics, NAMES, composed))
    return runs.Trained(rows, history, before, evaluate(model, tokens, task=task), str(model.device))


def main() -> None:
    parser = options.shared_parser(__doc__, "build/plain")
    parser.add_argument("--reward-noise", type=options.share, default=0.0, help="share of rollouts with a wrong reward")
    args = options.read(parser)
    cores.set_threads(args.threads)
    runs.run_all(args, run)


if __name__ == "__main__":
    main()
