"""The main job: RLVR on reasoning-gym problems through A3POTrainer, with figures. `make demo` runs it.

    python -m examples.demo --objective a3po
    python -m examples.demo --compare dapo a3po

Writes to build/demo/<objective>-seed<seed>/: summary.json, metrics.jsonl (TRL's), curves.png with its curves.jsonl, and
tokens.png (probability, entropy and selected tokens of a few rollouts). With --compare one figure of all of them, too.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from types import ModuleType

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from a3po_kernels import Objective, group_advantages
from a3po_kernels.integrations.transformers import policy_loss_from_model
from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer
from examples import cores, figures, options, runs, small_model
from examples.rollouts import DEMO, evaluate, respond, warm_up
from examples.tasks import TASKS

# Those that figures draws, in TRL's names.
NAMES = {
    "reward": "reward", "entropy": "entropy", "entropy_positive": "entropy/positive",
    "entropy_negative": "entropy/negative", "length": "completions/mean_length", "beta": "weight_beta",
    "clipped": "clip_ratio/region_mean", "clipped_low": "clip_ratio/low_mean", "clipped_high": "clip_ratio/high_mean",
    "active": "active_fraction", "no_advantage": "frac_reward_zero_std",
}  # fmt: skip
LINE = ("reward", "entropy", "entropy_positive", "entropy_negative", "length", "beta", "clipped")
PROBLEMS = 4096
PROMPTS, SAMPLES = 16, 8  # of a batch of rollouts


class MetricsLine(TrainerCallback):
    """A progress bar, and a line of metrics now and then."""

    def __init__(self, objective: Objective, every: int):
        self.objective, self.every = objective, every

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=f"{args.objective}, RLVR")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and state.global_step % self.every == 0:
            known = runs.renamed({"step": state.global_step, **logs}, NAMES, self.objective)
            numbers = "  ".join(f"{name} {float(known[name]):.3f}" for name in LINE if name in known)
            self.bar.write(f"step {state.global_step:4d}  {numbers}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def training_data(task: ModuleType) -> Dataset:
    problems = task.problems("train", PROBLEMS)
    return Dataset.from_list([{"prompt": task.prompt(entry), "problem": i} for i, entry in enumerate(problems)])


def verifier(task: ModuleType):
    """The reward: reasoning-gym's verifier."""
    problems = task.problems("train", PROBLEMS)

    def verified(completions: list[str], problem: list[int], **kwargs) -> list[float]:
        return [task.score(c.replace(" ", ""), problems[i]) for c, i in zip(completions, problem, strict=True)]

    return verified


def config(args: argparse.Namespace, objective: str, folder: Path) -> A3POConfig:
    return A3POConfig(
        output_dir=str(folder / "trainer"), objective=objective, max_steps=args.steps * args.iterations,
        learning_rate=args.rate, per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES,
        gradient_accumulation_steps=1, num_iterations=args.iterations,
        max_completion_length=TASKS[args.task].MAX_RESPONSE, lr_scheduler_type="constant", logging_steps=1,
        seed=args.seed, report_to=[], save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, bf16=False,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def chosen(rewards: list[float], advantages: list[float], entries: list[str], responses: list[str], each: int = 3):
    """Rows of `each` right and as many wrong rollouts, no problem and no response twice, none of advantage 0."""
    rows: list[int] = []
    for reward in (1.0, 0.0):
        wanted = len(rows) + each
        for row, is_there in enumerate(rewards):
            seen = {entries[r] for r in rows} | {responses[r] for r in rows}
            fresh = entries[row] not in seen and responses[row] not in seen
            if len(rows) < wanted and is_there == reward and advantages[row] != 0 and fresh:
                rows.append(row)
    return rows


def heat_map_rollouts(model, tokens, objective, task: ModuleType) -> list[figures.Rollout]:
    """A few rollouts of the model before training, with what the objective makes of their tokens."""
    torch.manual_seed(0)
    entries = [entry for entry in task.problems("held-out", 16) for _ in range(8)]
    rollouts = respond(model, tokens, entries, task=task)
    batch = rollouts.batch()
    groups = torch.arange(16, device=rollouts.rewards.device).repeat_interleave(8)
    advantages = batch["advantages"] = group_advantages(rollouts.rewards, groups)
    with torch.no_grad():
        out = policy_loss_from_model(model, batch, objective)
    shown = []
    prompts = [task.prompt(entry) for entry in entries]
    for row in chosen(rollouts.rewards.tolist(), advantages.tolist(), prompts, rollouts.responses):
        kept = batch["completion_mask"][row]
        width = kept.shape[0]
        shown.append(
            figures.Rollout(
                prompt=prompts[row],
                tokens=tokens.convert_ids_to_tokens(batch["input_ids"][row, -width:][kept].tolist()),
                probability=out.logprobs[row][kept].exp().tolist(),
                entropy=out.entropy[row][kept].tolist(),
                weight=out.weights[row][kept].tolist(),
                reward=rollouts.rewards[row].item(),
            )
        )
    return shown


def train(args: argparse.Namespace, objective: str, folder: Path) -> runs.Trained:
    task = TASKS[args.task]
    warmed_up = warm_up(args.warm_up_folder, args.warm_up_steps, task=task, recipe=DEMO)
    tokens = small_model.tokenizer(task.CHARACTERS)
    model = LlamaForCausalLM.from_pretrained(warmed_up)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    before = evaluate(model, tokens, task=task)
    settings = config(args, objective, folder)
    composed = settings.build_objective()
    shown = heat_map_rollouts(model, tokens, composed, task)
    if shown:  # a model that is always right, or never, has none with an advantage
        figures.draw_tokens(shown, f"{objective}: tokens before training", folder / "tokens.png")

    set_seed(args.seed)
    data = training_data(task)
    trainer = A3POTrainer(model, verifier(task), settings, train_dataset=data, processing_class=tokens)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(MetricsLine(composed, every=10))
    trainer.train()

    after = evaluate(trainer.model, tokens, task=task)
    # A step on rollouts of the step before has a loss and no reward.
    rows = [row for row in trainer.state.log_history if "loss" in row]
    history = [runs.renamed(row, NAMES, composed) for row in rows]
    return runs.Trained(rows, history, before, after, str(trainer.model.device))


def main() -> None:
    args = options.read(options.shared_parser(__doc__, "build/demo"))
    warnings.filterwarnings("ignore", category=FutureWarning)
    cores.set_threads(args.threads)
    runs.run_all(args, train)


if __name__ == "__main__":
    main()
