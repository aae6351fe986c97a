"""RLVR in a plain loop, with no trainer: sample, verify, one loss from the hidden states, step.

    python -m examples.train_plain --objective a3po --task chain_sum --steps 60
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM

import a3po_kernels
from a3po_kernels import Objective, group_advantages
from a3po_kernels.integrations.transformers import (
    min_p_logprobs_from_model,
    policy_loss_from_model,
    token_logprobs_from_model,
)
from examples import arithmetic, small_model
from examples.rollouts import evaluate, respond, warm_up
from examples.tasks import TASKS


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
            "length": rollouts.completion_mask.sum().item() / len(rollouts.rewards),
            "gradient_norm": norm.item(),
            **{name: value.item() for name, value in out.metrics.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="a3po", help="name of a preset of a3po_kernels")
    parser.add_argument("--task", default="chain_sum", choices=TASKS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--reward-noise", type=float, default=0.0, help="share of rollouts with the wrong reward")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up-steps", type=int, help="of the model, if it is not there yet")
    parser.add_argument("--folder", type=Path, default=Path("build/warm-up"), help="where the warmed-up model is kept")
    args = parser.parse_args()

    task = TASKS[args.task]
    folder = warm_up(args.folder, args.warm_up_steps, task=task)
    tokens = small_model.tokenizer(task.CHARACTERS)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    before = evaluate(model, tokens, task=task)
    objective = getattr(a3po_kernels, args.objective)()
    options = {"steps": args.steps, "rate": args.rate, "reward_noise": args.reward_noise, "seed": args.seed}
    bar = tqdm(train(model, tokens, objective, task=task, **options), total=args.steps)
    for metrics in bar:
        bar.set_postfix({name: f"{metrics[name]:.3f}" for name in ("reward", "entropy", "length")}, refresh=False)
    after = evaluate(model, tokens, task=task)
    print(f"held-out accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f} (+- {after['standard_error']:.3f})")


if __name__ == "__main__":
    main()
