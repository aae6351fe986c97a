"""A3POTrainer beside TRL's GRPOTrainer: the same steps on a Qwen2-like model of random weights, and one equal loss.

    python -m bench.bench_trainer [--quick]

Writes bench/results/<device>/trainer.jsonl. A row a trainer: `step_ms` and `loss_ms` of each measured step (forward,
loss and backward; forward and loss alone), `peak_mb` of the step above what is held before it, by allocated memory
(null on a CPU), `tokens`, `losses` as logged. The last row, trainer "difference", holds what the two DAPO losses and
their gradients differ by on one batch with the same weights: `losses` [GRPOTrainer, A3POTrainer], `relative_loss`,
`relative_gradient` (of the norm) and `equal`, whether both are within rounding. Needs trl, datasets, transformers.
On a CPU the model is tiny and the times mean little.
"""

from __future__ import annotations

import copy
import gc
import os
import statistics
import tempfile
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer
from bench import harness, options

PACKAGES = ("trl", "transformers", "accelerate", "datasets")
WARM, STEPS = 1, 3
# vocabulary, hidden, intermediate, layers, heads, rollouts, longest response
FULL = (151936, 1536, 8960, 10, 12, 32, 384)
TINY = (64, 32, 48, 2, 4, 8, 12)
CHARACTERS = "0123456789+-=., abcdefgh"
RUNS = (
    ("GRPOTrainer, dapo", GRPOTrainer, GRPOConfig, {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("A3POTrainer, dapo", A3POTrainer, A3POConfig, {"objective": "dapo"}),
    ("A3POTrainer, a3po", A3POTrainer, A3POConfig, {"objective": "a3po"}),
)
# Mean losses of order .1 from log-probs that two kernels round otherwise, and the norm of a gradient summed in bf16.
BOUNDS = {torch.bfloat16: (2e-2, 2e-2), torch.float32: (1e-4, 1e-4)}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *CHARACTERS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def make_model(sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Qwen2ForCausalLM:
    vocabulary, hidden, intermediate, layers, heads, *_ = sizes
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with device:
        model = Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # predictions that differ from uniform
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    return model


def reward(completion_ids, **unused) -> list[float]:
    return [float(sum(ids) % 7) / 7 for ids in completion_ids]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(kind: type) -> type:
    """The trainer's class with its steps measured, and the last batch kept."""

    class Timed(kind):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.step_ms, self.loss_ms, self.peaks, self.tokens = [], [], [], []

        def training_step(self, *arguments, **options):
            device = self.accelerator.device
            result = super().training_step(*arguments, **options)
            synchronize(device)
            self.step_ms.append(1e3 * (time.perf_counter() - self.begin))
            if device.type == "cuda":
                self.peaks.append((torch.cuda.max_memory_allocated(device) - self.held) / 1e6)
            return result

        def _prepare_inputs(self, batch):
            """The step is measured from here on: sampling, now and then, is not what is compared."""
            device = self.accelerator.device
            found = super()._prepare_inputs(batch)
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                self.held = torch.cuda.memory_allocated(device)
            self.begin = time.perf_counter()
            return found

        def _compute_loss(self, model, inputs):
            begin = time.perf_counter()
            loss = super()._compute_loss(model, inputs)
            synchronize(self.accelerator.device)
            self.loss_ms.append(1e3 * (time.perf_counter() - begin))
            self.tokens.append(int(inputs["completion_mask"].sum()))
            self.last = model, {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
            return loss

    return Timed


def train(kind: type, configuration: type, options: dict, sizes, device, dtype, folder: str):
    *_, rollouts, length = sizes
    args = configuration(
        folder, per_device_train_batch_size=rollouts, num_generations=min(8, rollouts // 2), max_steps=WARM + STEPS,
        num_iterations=WARM + STEPS, max_completion_length=length, learning_rate=1e-4, optim="sgd", beta=0.0, seed=0,
        lr_scheduler_type="constant", report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
        bf16=dtype == torch.bfloat16, use_cpu=device.type == "cpu", gradient_checkpointing=device.type == "cuda",
        **options,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": [f"{i}+{i + 1}=" for i in range(8 * rollouts)]})
    made = timed(kind)(
        model=make_model(sizes, device, dtype), reward_funcs=reward, args=args, train_dataset=data,
        processing_class=tokenizer(),
    )  # fmt: skip
    made.remove_callback(PrinterCallback)
    made.train()
    return made


def loss_and_norm(trainer, weights: dict, inputs: dict) -> tuple[float, float]:
    """The loss of a batch and its gradient's norm, with these weights."""
    model, _ = trainer.last
    trainer.model.load_state_dict(weights)
    trainer.model.zero_grad(set_to_none=True)
    trainer.model.train()
    loss = trainer._compute_loss(model, inputs)
    loss.backward()
    grads = [p.grad.float().norm() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad(set_to_none=True)
    return loss.item(), torch.stack(grads).norm().item()


def difference(theirs, ours, weights: dict, dtype: torch.dtype) -> dict:
    """What GRPOTrainer's and A3POTrainer's DAPO differ by on one batch that is off-policy in part."""
    inputs = dict(theirs.last[1])
    generator = torch.Generator().manual_seed(1)
    noise = 0.2 * torch.randn(inputs["old_per_token_logps"].shape, generator=generator)
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + noise.to(inputs["old_per_token_logps"])
    (a, norm_a), (b, norm_b) = (loss_and_norm(trainer, weights, inputs) for trainer in (theirs, ours))
    loss, gradient = abs(a - b) / abs(a), abs(norm_a - norm_b) / norm_a
    bounds = BOUNDS[dtype]
    return {
        "trainer": "difference", "losses": [a, b], "relative_loss": loss, "relative_gradient": gradient,
        "equal": loss <= bounds[0] and gradient <= bounds[1],
    }  # fmt: skip


def main() -> None:
    args = options.parse(options.arguments(__doc__))
    device = args.device
    sizes, dtype = (TINY, torch.float32) if device.type == "cpu" else (FULL, torch.bfloat16)
    weights = copy.deepcopy(make_model(sizes, device, dtype).state_dict())
    where = {**harness.environment(device, PACKAGES), "sizes": sizes, "dtype": harness.dtype_name(dtype)}
    rows, kept = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, kind, configuration, fields in RUNS:
            made = train(kind, configuration, fields, sizes, device, dtype, folder)
            logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
            rows.append({
                "trainer": name, **where, "step_ms": made.step_ms[WARM:], "loss_ms": made.loss_ms[WARM:],
                "median_ms": statistics.median(made.step_ms[WARM:]), "peak_mb": max(made.peaks[WARM:], default=None),
                "tokens": made.tokens[WARM:], "losses": logged,
            })  # fmt: skip
            print(f"{name:24}{rows[-1]['median_ms']:9.1f} ms a step, of it forward and loss "
                  f"{statistics.median(made.loss_ms[WARM:]):.1f}, peak {rows[-1]['peak_mb'] or 0:.0f} MB")  # fmt: skip
            if name.endswith("dapo"):
                kept.append(made)
            else:
                del made
            gc.collect()
            harness.write(rows, args.folder / "trainer.jsonl", quiet=True)
        rows.append({**where, **difference(*kept, weights, dtype)})
    print("one batch, GRPOTrainer and A3POTrainer: losses {:.6f} and {:.6f}, relative gradient norm {:.1e}".format(
        *rows[-1]["losses"], rows[-1]["relative_gradient"]))  # fmt: skip
    harness.write(rows, args.folder / "trainer.jsonl", quiet=True)
    if not rows[-1]["equal"]:
        raise SystemExit("the trainers' losses differ by more than rounding")


if __name__ == "__main__":
    main()
