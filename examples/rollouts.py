"""Responses of a model to a task's problems, scored, and what is measured on them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from tqdm.auto import tqdm

from a3po_kernels.integrations.transformers import token_logprobs_from_model
from examples import arithmetic, small_model


@dataclass(frozen=True)
class Recipe:
    """A model's size and warm-up: problems a step, learning rate, steps (None: the task's own)."""

    name: str
    size: small_model.Size
    batch: int
    rate: float
    steps: int | None = None


STUDY = Recipe("", small_model.LARGE, 64, 2e-3)  # of bench.dynamics: its results rest on it
DEMO = Recipe("small-", small_model.SMALL, 32, 5e-3, 1000)  # nearly as able, in a seventh of the CPU time


@dataclass
class Rollouts:
    """input_ids, attention_mask [S, L]; completion_mask [S, T]: the last T columns; responses and rewards [S]."""

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    responses: list[str]
    rewards: Tensor

    def batch(self) -> dict[str, Tensor]:
        """As policy_loss_from_model takes it, but for the advantages."""
        return {name: getattr(self, name) for name in ("input_ids", "attention_mask", "completion_mask")}


@torch.no_grad()
def respond(model, tokens, entries: list[dict], *, task: ModuleType = arithmetic, greedy: bool = False) -> Rollouts:
    """One response an entry, sampled at temperature 1 or greedy."""
    prompts = tokens([task.prompt(entry) for entry in entries], return_tensors="pt", padding=True,
                     add_special_tokens=False).to(model.device)  # fmt: skip
    training = model.training
    ids = model.eval().generate(
        input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], do_sample=not greedy,
        max_new_tokens=task.MAX_RESPONSE,
    )  # fmt: skip
    model.train(training)
    completion = ids[:, prompts["input_ids"].shape[1] :]
    ended = (completion == tokens.eos_token_id).int()
    mask = (ended.cumsum(1) - ended) == 0  # the end of the response belongs to it
    responses = [tokens.decode(row[kept], skip_special_tokens=True).replace(" ", "")
                 for row, kept in zip(completion, mask, strict=True)]  # fmt: skip
    rewards = torch.tensor([task.score(r, e) for r, e in zip(responses, entries, strict=True)])
    attention = torch.cat([prompts["attention_mask"], mask.to(prompts["attention_mask"].dtype)], dim=1)
    return Rollouts(ids, attention, mask, responses, rewards.to(model.device))


def pass_at(k: int, right: Tensor, samples: int) -> float:
    """The share of problems that one of k responses solves: the unbiased estimator of Chen et al. (arXiv 2107.03374).

    right: [P], of `samples` responses the number of right ones.
    """
    misses = torch.tensor([math.comb(samples - int(count), k) for count in right], dtype=torch.float64)
    return 1.0 - misses.mean().item() / math.comb(samples, k)


def evaluate(
    model, tokens, *, task: ModuleType = arithmetic, problems: int = 256, samples: int = 4, seed: int = 0
) -> dict[str, float]:
    """On held-out problems, the same noise for the same seed.

    accuracy of sampled responses, with its standard_error over problems, and greedy_accuracy; solved_once, the share of
    problems that one of the `samples` responses solves, and pass_at_4 where there are more than four; ways, the mean
    number of different right responses to a problem; mean entropy (nats) and number of all tokens of the responses.
    """
    entries = task.problems("held-out", problems)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = [respond(model, tokens, entries, task=task) for _ in range(samples)]
    entropy, count = 0.0, 0.0
    right: list[set[str]] = [set() for _ in entries]
    with torch.no_grad():
        for rollouts in drawn:
            entropy += token_logprobs_from_model(model, rollouts.batch()).entropy.double().sum().item()
            count += rollouts.completion_mask.sum().item()
            for found, response, reward in zip(right, rollouts.responses, rollouts.rewards.tolist(), strict=True):
                found.update([response] if reward else [])
    rewards = torch.stack([rollouts.rewards for rollouts in drawn])
    rates = rewards.mean(0)
    return {
        "accuracy": rates.mean().item(),
        "standard_error": rates.std().item() / math.sqrt(problems),
        "solved_once": (rates > 0).float().mean().item(),
        **({"pass_at_4": pass_at(4, rewards.sum(0), samples)} if samples > 4 else {}),
        "ways": sum(map(len, right)) / problems,
        "greedy_accuracy": respond(model, tokens, entries, task=task, greedy=True).rewards.mean().item(),
        "entropy": entropy / count,
        "length": count / (problems * samples),
    }


def worked_batches(tokens, task: ModuleType, steps: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Padded batches of prompts with their worked responses; labels are -100 at the prompt."""
    data = task.problems("warm-up", steps * size)
    rng = random.Random(0)
    for step in range(steps):
        rows = []
        for entry in data[step * size : (step + 1) * size]:
            prompt = tokens(task.prompt(entry), add_special_tokens=False)["input_ids"]
            response = tokens(task.demonstration(entry, rng), add_special_tokens=False)["input_ids"]
            response.append(tokens.eos_token_id)
            rows.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
        labels = [row.pop("labels") for row in rows]
        batch = tokens.pad(rows, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([[-100] * (width - len(label)) + label for label in labels])
        yield batch


def warm_up(
    folder: Path, steps: int | None = None, seed: int = 0, task: ModuleType = arithmetic, recipe: Recipe = STUDY
) -> Path:
    """Trains a new model on worked responses and saves it, unless it is there: in which folder, with its tokenizer.

    steps: of the warm-up, in place of the recipe's.
    """
    steps = steps or recipe.steps or task.WARM_UP_STEPS
    folder = folder / f"{task.__name__.rpartition('.')[2]}-{recipe.name}{steps}"
    if (folder / "tokenizer_config.json").exists():
        return folder
    torch.manual_seed(seed)
    tokens = small_model.tokenizer(task.CHARACTERS)
    model = small_model.model(tokens, recipe.size)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        # Up in 30 steps, then half a cosine down to a tenth.
        optimizer, lambda step: min(1.0, (step + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )  # fmt: skip
    bar = tqdm(worked_batches(tokens, task, steps, recipe.batch), desc="supervised warm-up", total=steps)
    for batch in bar:
        loss = model(**batch.to(model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder
