"""Responses of a model to arithmetic problems, scored, and what is measured on them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from a3po_kernels.integrations.transformers import token_logprobs_from_model
from examples import arithmetic

WARM_UP_STEPS, WARM_UP_BATCH, WARM_UP_RATE = 700, 64, 2e-3
CARELESS = 0.5  # share of the demonstrations


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
def respond(model, tokens, entries: list[dict], *, greedy: bool = False) -> Rollouts:
    """One response an entry, sampled at temperature 1 or greedy."""
    prompts = tokens([arithmetic.prompt(entry) for entry in entries], return_tensors="pt", padding=True,
                     add_special_tokens=False).to(model.device)  # fmt: skip
    training = model.training
    ids = model.eval().generate(
        input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], do_sample=not greedy,
        max_new_tokens=arithmetic.MAX_RESPONSE,
    )  # fmt: skip
    model.train(training)
    completion = ids[:, prompts["input_ids"].shape[1] :]
    ended = (completion == tokens.eos_token_id).int()
    mask = (ended.cumsum(1) - ended) == 0  # the end of the response belongs to it
    responses = [tokens.decode(row[kept], skip_special_tokens=True).replace(" ", "")
                 for row, kept in zip(completion, mask, strict=True)]  # fmt: skip
    rewards = torch.tensor([arithmetic.score(r, e) for r, e in zip(responses, entries, strict=True)])
    attention = torch.cat([prompts["attention_mask"], mask.to(prompts["attention_mask"].dtype)], dim=1)
    return Rollouts(ids, attention, mask, responses, rewards.to(model.device))


def evaluate(model, tokens, *, problems: int = 256, samples: int = 4, seed: int = 0) -> dict[str, float]:
    """On held-out problems: accuracy of sampled responses with its standard error over problems, and of greedy ones;
    mean entropy (nats) and number of all tokens of the sampled responses. The same seed draws the same noise."""
    entries = arithmetic.problems("held-out", problems)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = [respond(model, tokens, entries) for _ in range(samples)]
    entropy, count = 0.0, 0.0
    with torch.no_grad():
        for rollouts in drawn:
            entropy += token_logprobs_from_model(model, rollouts.batch()).entropy.double().sum().item()
            count += rollouts.completion_mask.sum().item()
    rates = torch.stack([rollouts.rewards for rollouts in drawn]).mean(0)
    return {
        "accuracy": rates.mean().item(),
        "standard_error": rates.std().item() / math.sqrt(problems),
        "solved_once": (rates > 0).float().mean().item(),
        "greedy_accuracy": respond(model, tokens, entries, greedy=True).rewards.mean().item(),
        "entropy": entropy / count,
        "length": count / (problems * samples),
    }


def worked_batches(tokens, steps: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Padded batches of prompts with their worked responses; labels are -100 at the prompt."""
    data = arithmetic.problems("warm-up", steps * size)
    careless = random.Random(0)
    for step in range(steps):
        rows = []
        for entry in data[step * size : (step + 1) * size]:
            prompt = tokens(arithmetic.prompt(entry), add_special_tokens=False)["input_ids"]
            text = arithmetic.worked_response(entry, careless if careless.random() < CARELESS else None)
            response = tokens(text, add_special_tokens=False)["input_ids"]
            response.append(tokens.eos_token_id)
            rows.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
        labels = [row.pop("labels") for row in rows]
        batch = tokens.pad(rows, return_tensors="pt")
        width = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([[-100] * (width - len(label)) + label for label in labels])
        yield batch


def warm_up(folder: Path, steps: int = WARM_UP_STEPS, seed: int = 0) -> None:
    """Trains a new model on worked responses for a minute and saves it in `folder`, unless it is there."""
    if (folder / "tokenizer_config.json").exists():
        return
    torch.manual_seed(seed)
    tokens, model = arithmetic.tokenizer(), arithmetic.model()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_UP_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        # Up in 30 steps, then half a cosine down to a tenth.
        optimizer, lambda step: min(1.0, (step + 1) / 30) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
    )  # fmt: skip
    bar = tqdm(worked_batches(tokens, steps, WARM_UP_BATCH), desc="supervised warm-up", total=steps)
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
