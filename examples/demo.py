"""The main job: RLVR on reasoning-gym problems through A3POTrainer, with figures. `make demo` runs it.

    python -m examples.demo --objective a3po

Writes to build/demo/<objective>/: summary.json, metrics.jsonl, curves.png (reward, entropy, length, weight, clipping)
and tokens.png (probability, entropy and selected tokens of a few rollouts).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback

from a3po_kernels import group_advantages, presets
from a3po_kernels.integrations.transformers import policy_loss_from_model
from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer
from examples import arithmetic, figures, small_model
from examples.rollouts import evaluate, respond, warm_up

LINE = {
    "reward": "reward", "entropy": "entropy", "positive": "entropy/positive", "negative": "entropy/negative",
    "length": "completions/mean_length", "beta": "weight_beta", "clipped": "clip_ratio/region_mean",
}  # fmt: skip
PROBLEMS = 4096


class MetricsLine(TrainerCallback):
    """A progress bar, and a line of metrics now and then."""

    def __init__(self, every: int):
        self.every = every

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=f"{args.objective}, RLVR")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and state.global_step % self.every == 0:
            known = {name: float(logs[key]) for name, key in LINE.items() if logs.get(key) is not None}
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in known.items())
            self.bar.write(f"step {state.global_step:4d}  {numbers}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def training_data(size: int) -> Dataset:
    problems = arithmetic.problems("train", size)
    return Dataset.from_list([{"prompt": arithmetic.prompt(entry), "problem": i} for i, entry in enumerate(problems)])


def verified(completions: list[str], problem: list[int], **kwargs) -> list[float]:
    """The reward: reasoning-gym's verifier."""
    problems = arithmetic.problems("train", PROBLEMS)
    return [arithmetic.score(c.replace(" ", ""), problems[i]) for c, i in zip(completions, problem, strict=True)]


def config(args: argparse.Namespace, folder: Path) -> A3POConfig:
    return A3POConfig(
        output_dir=str(folder / "trainer"), objective=args.objective, max_steps=args.steps, learning_rate=args.rate,
        per_device_train_batch_size=64, gradient_accumulation_steps=2, num_generations=8,
        num_iterations=args.iterations, max_completion_length=arithmetic.MAX_RESPONSE, lr_scheduler_type="constant",
        logging_steps=1, seed=args.seed, report_to=[], save_strategy="no", gradient_checkpointing=False,
        disable_tqdm=True, bf16=False, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip


def heat_map_rollouts(model, tokens, objective) -> list[figures.Rollout]:
    """A few rollouts of the model before training, with what the objective makes of their tokens."""
    torch.manual_seed(0)
    entries = [entry for entry in arithmetic.problems("held-out", 16) for _ in range(8)]
    rollouts = respond(model, tokens, entries)
    batch = rollouts.batch()
    groups = torch.arange(16, device=rollouts.rewards.device).repeat_interleave(8)
    batch["advantages"] = group_advantages(rollouts.rewards, groups)
    with torch.no_grad():
        out = policy_loss_from_model(model, batch, objective)
    shown = []
    for reward in (1.0, 0.0):
        rows = (rollouts.rewards == reward).nonzero().flatten().tolist()
        for row in rows[:12:4]:
            kept = batch["completion_mask"][row]
            width = kept.shape[0]
            shown.append(
                figures.Rollout(
                    prompt=arithmetic.prompt(entries[row]),
                    tokens=tokens.convert_ids_to_tokens(batch["input_ids"][row, -width:][kept].tolist()),
                    probability=out.logprobs[row][kept].exp().tolist(),
                    entropy=out.entropy[row][kept].tolist(),
                    weight=out.weights[row][kept].tolist(),
                    reward=reward,
                )
            )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", default="a3po", choices=presets)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--iterations", type=int, default=1, help="updates on each batch of rollouts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up-steps", type=int, help="of the model, if it is not there yet")
    parser.add_argument("--folder", type=Path, default=Path("build/demo"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    start = time.perf_counter()
    folder = args.folder / args.objective
    folder.mkdir(parents=True, exist_ok=True)

    warmed_up = warm_up(args.folder / "warm-up", args.warm_up_steps)
    tokens = small_model.tokenizer(arithmetic.CHARACTERS)
    model = LlamaForCausalLM.from_pretrained(warmed_up)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    before = evaluate(model, tokens)
    settings = config(args, folder)
    objective = settings.build_objective()
    figures.draw_tokens(heat_map_rollouts(model, tokens, objective), args.objective, folder / "tokens.png")

    set_seed(args.seed)
    trainer = A3POTrainer(model, verified, settings, train_dataset=training_data(PROBLEMS), processing_class=tokens)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(MetricsLine(every=10))
    trainer.train()

    after = evaluate(trainer.model, tokens)
    # A step on rollouts of the step before has a loss and no reward.
    history = [row for row in trainer.state.log_history if "loss" in row]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    figures.draw_curves(history, before, after, args.objective, folder / "curves.png")
    seconds = round(time.perf_counter() - start, 1)
    summary = {"before": before, "after": after, "seconds": seconds, "device": str(trainer.model.device), **vars(args)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2, default=str) + "\n")
    print(f"held-out accuracy, sampled: {before['accuracy']:.3f} -> {after['accuracy']:.3f} "
          f"(standard error {after['standard_error']:.3f}); greedy: {before['greedy_accuracy']:.3f} -> "
          f"{after['greedy_accuracy']:.3f}; {seconds} s")  # fmt: skip
    print(f"see {folder}/curves.png and {folder}/tokens.png")


if __name__ == "__main__":
    main()
