"""integrations.trl_kernels below TRL's own trainers: they train as they did, by ours, as a counter says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
import tiny
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from a3po_kernels.integrations import trl_kernels

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]

SUMS = [f"{i}+{i + 1}=" for i in range(16)]
DATA = {
    "prompts": Dataset.from_dict({"prompt": SUMS}),
    "pairs": Dataset.from_dict({"prompt": SUMS, "chosen": ["12"] * 16, "rejected": ["ab c", "-"] * 8}),
    "labels": Dataset.from_dict({"prompt": SUMS, "completion": ["12", "abc"] * 8, "label": [True, False] * 8}),
    "text": Dataset.from_dict({"prompt": SUMS, "completion": ["12", "abcd"] * 8}),
}


def reward(completions, **kwargs):
    return [float(sum(c in "0123456789" for c in completion)) for completion in completions]


ONLINE = {"num_generations": 4, "max_completion_length": 7}
TRAINERS = {
    "rloo": (RLOOTrainer, RLOOConfig, "prompts", {**ONLINE, "num_iterations": 2}),
    "grpo": (GRPOTrainer, GRPOConfig, "prompts", {**ONLINE, "num_iterations": 2, "temperature": 0.7, "beta": 0.1}),
    "dpo": (DPOTrainer, DPOConfig, "pairs", {"use_weighting": True}),
    "kto": (KTOTrainer, KTOConfig, "labels", {}),
    "sft": (SFTTrainer, SFTConfig, "text", {"loss_type": "chunked_nll"}),
    "orpo": (ORPOTrainer, ORPOConfig, "pairs", {"remove_unused_columns": False}),
}
# ORPOTrainer forms logits; it has imported TRL's function of them by its name.
CALLED = {"orpo": "selective_log_softmax_and_entropy"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models"), "llama", "softcap", "bias")


def trained(name, folder, output):
    kind, configuration, data, options = TRAINERS[name]
    args = configuration(
        str(output), per_device_train_batch_size=8, max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant",
        report_to=[], logging_steps=1, use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, optim="sgd",
        gradient_checkpointing=False, max_grad_norm=1e9, **options,
    )  # fmt: skip
    more = {"reward_funcs": reward} if data == "prompts" else {"processing_class": tiny.tokenizer()}
    made = kind(model=str(folder), args=args, train_dataset=DATA[data], **more)
    start = torch.cat([p.detach().flatten().clone() for p in made.model.parameters()])
    made.train()
    return torch.cat([p.detach().flatten() for p in made.model.parameters()]) - start, made.state.log_history[:-1]


@pytest.mark.parametrize("model", ["llama", "softcap"])
@pytest.mark.parametrize("name", TRAINERS)
def test_trainers_train_as_they_did(name, model, folders, tmp_path):
    theirs, logs = trained(name, folders / model, tmp_path)
    with trl_kernels.install() as installed:
        ours, my_logs = trained(name, folders / model, tmp_path)
    assert set(installed.calls) == {CALLED.get(name, "ChunkedLogProbFunction")}
    assert sum(installed.calls.values()) >= 3
    moved = theirs.abs().max()
    assert moved > 1e-4
    assert (ours - theirs).abs().max() <= 1e-4 * max(moved, 1e-2)
    for mine, reference in zip(my_logs, logs, strict=True):
        assert mine.keys() == reference.keys()
        for key in {k for k in reference if "time" not in k and "per_second" not in k}:
            if reference[key] is not None:
                assert mine[key] == pytest.approx(reference[key], rel=3e-5, abs=1e-5), key
