"""TRL's own scoring of a batch: _generate_and_score_completions of a real trainer, fed what would be generated."""

from __future__ import annotations

import tiny
import torch
from datasets import Dataset


def length(row):
    """Of a rollout: up to the last of its tokens, and one row where it has none."""
    return int(row.nonzero().max()) + 1 if row.any() else 1


def make(kind, configuration, folder, output, rewards=1, **options):
    """A trainer of TRL with a tiny model, saved in `folder` for it."""
    tiny.build("llama").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    args = configuration(
        str(output), per_device_train_batch_size=8, num_generations=4, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, max_completion_length=9, **options,
    )  # fmt: skip
    functions = [lambda completions, **kwargs: [0.0] * len(completions) for _ in range(rewards)]
    for number, function in enumerate(functions):
        function.__name__ = f"reward_{number}"
    data = Dataset.from_dict({"prompt": ["1+2="] * 8})
    made = kind(model=str(folder), reward_funcs=functions, args=args, train_dataset=data)
    made.model.train()
    return made


def score(trainer, rewards, *, mask=None, old=None, sampled=None):
    """(output, metrics): rewards [S, K], and per token [S, T] what the model and the engine are taken to have said.

    mask: which tokens are the model's; the others are a tool's or padding.
    """
    count, width = (len(rewards), 3) if mask is None else mask.shape
    mask = torch.ones(count, width, dtype=torch.bool) if mask is None else mask
    old = torch.zeros(count, width) if old is None else old
    lengths = [length(row) for row in mask]
    width = max(lengths)

    def rows(values):
        return None if values is None else [row[:n].tolist() for row, n in zip(values, lengths, strict=True)]

    ids = rows(torch.full((count, width), 5))
    generated = ([[1, 4]] * count, ids, rows(mask.int()), ["a"] * count, rows(sampled), {}, None, [])
    if not hasattr(trainer, "vllm_importance_sampling_mode"):  # RLOOTrainer has neither tools nor an engine's log-probs
        generated = (generated[0], ids, generated[3])
    trainer._generate = lambda prompts: generated
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (old[:, :width].clone(), None, None)
    trainer._calculate_rewards = lambda *args: rewards.clone()
    trainer.num_generations = trainer.args.num_generations
    trainer._metrics["train"].clear()
    output = trainer._generate_and_score_completions([{"prompt": "1+2="}] * count)
    return output, {name: values[-1] for name, values in trainer._metrics["train"].items()}
