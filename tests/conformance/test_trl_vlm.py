"""integrations.trl with vision-language models: A3POTrainer beside GRPOTrainer on images, several a row or none."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl")
import tiny
import tiny_vlm
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from a3po_kernels.integrations._trl_images import COUNTS, some_rollouts
from a3po_kernels.integrations.transformers import check_head, policy_loss_from_model, token_logprobs_from_model
from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]


def question(number):
    return [{"role": "user", "content": f"{number}+{number + 1}="}]


def data(counts):
    """Prompts with so many images each."""
    return Dataset.from_list([
        {"prompt": question(i), "images": [tiny_vlm.picture(i + 10 * j) for j in range(count)]}
        for i, count in enumerate(counts)
    ])  # fmt: skip


def reward(completions, **kwargs):
    return [float(sum(c in "0123456789" for c in completion[0]["content"])) for completion in completions]


def trainer(kind, configuration, name, output, counts=(1,) * 8, **options):
    options = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 2, "max_completion_length": 7,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": [], "logging_steps": 1, "use_cpu": True,
        "bf16": False, "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False, "optim": "sgd",
        "max_grad_norm": 1e9, **options,
    }  # fmt: skip
    args = configuration(str(output), **options)
    return kind(
        model=tiny_vlm.build(name), reward_funcs=reward, args=args, train_dataset=data(counts),
        processing_class=tiny_vlm.processor(),
    )  # fmt: skip


def pair(name, output, **options):
    """(GRPOTrainer, A3POTrainer) of DAPO's loss."""
    theirs = trainer(GRPOTrainer, GRPOConfig, name, output, loss_type="dapo", epsilon_high=0.28, **options)
    return theirs, trainer(A3POTrainer, A3POConfig, name, output, objective="dapo", **options)


def step(made, batch):
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    loss = made._compute_loss(made.model, batch)
    loss.backward()
    return loss.detach(), tiny.gradients(made.model)


@pytest.mark.parametrize("name", tiny_vlm.MODELS)
def test_the_loss_is_trls(name, tmp_path):
    theirs, ours = pair(name, tmp_path)
    batch = tiny_vlm.inputs(name)
    for made in (theirs, ours):
        made.beta = 0.0
    (loss, gradients), (mine, my_gradients) = step(theirs, batch), step(ours, batch)
    assert mine.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert my_gradients.keys() == gradients.keys()
    towers = [key for key in gradients if "vision" in key or "visual" in key]
    assert any(gradients[key].norm() > 1e-6 for key in towers), "the images have a gradient"
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for key, gradient in gradients.items():
        assert (my_gradients[key] - gradient).abs().max() <= 2e-5 * max(largest, 1.0), key
    other = dict(batch, pixel_values=batch["pixel_values"].flip(0))
    assert step(ours, other)[0] != mine


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", tiny_vlm.MODELS)
def test_old_logprobs_are_trls(name, size, tmp_path):
    """Cut into micro-batches, whose images are others'; one of them has none, which TRL's own path cannot take."""
    theirs, ours = pair(name, tmp_path)
    batch = tiny_vlm.inputs(name)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    images = {key: batch[key] for key in ("pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids",
                                         "num_images") if key in batch}  # fmt: skip
    with torch.no_grad():
        logps, _, _ = theirs._get_per_token_logps_and_entropies(theirs.model, ids, mask, 5, **images)
        mine, entropy, _ = ours._get_per_token_logps_and_entropies(
            ours.model, ids, mask, 5, size, compute_entropy=True, **images
        )
    kept = batch["completion_mask"].bool()
    torch.testing.assert_close(mine[kept], logps[kept], rtol=1e-5, atol=1e-5)
    assert (entropy[kept] > 0).all()


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2, "steps_per_generation": 2}], ids=["on", "off-policy"])
# Between scoring and training TRL 1.16 gives transformers' processors None for a row without an image among others.
@pytest.mark.parametrize("counts", [(1, 3, 2, 1, 1, 2, 3, 1), (0,) * 8], ids=["images", "text"])
def test_training_is_trls(counts, options, tmp_path):
    """From the processor on: generation, scoring, shuffling and cutting of the generation batch are TRL's."""
    results = []
    for at in (0, 1):  # the second is made after the first has trained: making it sets the seed
        made = pair("llava", tmp_path, counts=counts, max_steps=4, **options)[at]
        start = torch.cat([p.detach().flatten().clone() for p in made.model.parameters()])
        made.train()
        moved = torch.cat([p.detach().flatten() for p in made.model.parameters()]) - start
        results.append((moved, made.state.log_history[:-1]))
    (theirs, logs), (ours, my_logs) = results
    assert theirs.abs().max() > 1e-4
    assert (ours - theirs).abs().max() <= 1e-4 * max(theirs.abs().max(), 1e-2)
    for mine, reference in zip(my_logs, logs, strict=True):
        assert reference.keys() <= mine.keys()
        for key in reference.keys() & {"loss", "grad_norm", "entropy", "reward", "completions/mean_length"}:
            assert mine[key] == pytest.approx(reference[key], rel=1e-4, abs=1e-5), key


# -- which images are whose --------------------------------------------------------------------------------------------

LAYOUTS = {
    "patches": lambda n, tiles: {"pixel_values": 3 * sum(n), "image_grid_thw": torch.tensor([[1, 1, 3]] * sum(n))},
    "uneven patches": lambda n, tiles: {
        "pixel_values": sum(range(1, sum(n) + 1)),
        "image_grid_thw": torch.tensor([[1, 1, i + 1] for i in range(sum(n))]),
    },
    "positions": lambda n, tiles: {"pixel_values": sum(n), "image_position_ids": sum(n)},
    "tiles with a mask": lambda n, tiles: {
        "pixel_values": sum(tiles), "pixel_attention_mask": sum(tiles), "spatial_shapes": sum(tiles),
        "num_tiles": tiles,
    },
    "tiles": lambda n, tiles: {"pixel_values": sum(tiles), "num_tiles": tiles},
    "images": lambda n, tiles: {"pixel_values": sum(n), "image_sizes": sum(n)},
    "rollouts": lambda n, tiles: {"pixel_values": len(n), "pixel_attention_mask": len(n)},
}  # fmt: skip


@pytest.mark.parametrize("counts", [[1, 1, 2, 1, 2], [2, 0, 1, 3, 1]])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_cut_as_trl_cuts_them(layout, size, counts):
    tiles = [2 * count for count in counts]
    fields = LAYOUTS[layout](counts, tiles)
    images = {
        key: torch.arange(value) + 100 * place if isinstance(value, int) else value
        for place, (key, value) in enumerate(fields.items())
    } | {"num_images": counts, "token_type_ids": torch.arange(5), "mm_token_type_ids": torch.arange(5) + 5}
    ids, mask = torch.arange(10).view(5, 2), torch.ones(5, 2, dtype=torch.long)
    seen = []

    def model(labels, fused_lm_head, **inputs):
        seen.append(inputs)
        return SimpleNamespace(log_probs=torch.zeros(len(labels), 1))

    stub = SimpleNamespace(accelerator=SimpleNamespace(autocast=nullcontext, is_main_process=True))
    GRPOTrainer._get_per_token_logps_and_entropies(stub, model, ids, mask, 1, batch_size=size, **images)
    batch = {"input_ids": ids, "attention_mask": mask, **images}
    for at, theirs in enumerate(seen):
        ours = some_rollouts(batch, size * at, min(size * (at + 1), 5))
        if not len(theirs["pixel_values"]):  # TRL gives its model an empty tensor
            theirs = {key: value for key, value in theirs.items() if "ids" in key or key == "attention_mask"}
            theirs.pop("image_position_ids", None)
        assert not ours.keys() & set(COUNTS)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_whole_batch_waits_for_nothing():
    """How many patches an image has is on the device: the whole batch, which every loss is of, does not ask."""
    batch = {
        "input_ids": torch.zeros(2, 3), "pixel_values": torch.zeros(7, 5), "num_images": [1, 1],
        "image_grid_thw": torch.ones(2, 3, dtype=torch.long, device="meta"),
    }  # fmt: skip
    assert some_rollouts(batch, 0, 2)["pixel_values"] is batch["pixel_values"]
    with pytest.raises(NotImplementedError, match="meta"):
        some_rollouts(batch, 0, 1)


def test_what_trl_would_not_know_is_refused(tmp_path):
    made = trainer(A3POTrainer, A3POConfig, "llava", tmp_path)
    ids = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(TypeError, match="cross_attention_mask"):
        made._get_per_token_logps_and_entropies(made.model, ids, ids, 2, cross_attention_mask=ids)


# -- integrations.transformers -----------------------------------------------------------------------------------------


def model_batch(name, seed=0):
    found = tiny_vlm.inputs(name, seed=seed)
    return {
        "input_ids": torch.cat([found["prompt_ids"], found["completion_ids"]], 1),
        "attention_mask": torch.cat([found["prompt_mask"], found["completion_mask"]], 1),
        "completion_mask": found["completion_mask"], "advantages": found["advantages"],
        **{key: found[key] for key in ("pixel_values", "image_grid_thw", "token_type_ids", "mm_token_type_ids")
           if key in found},
    }  # fmt: skip


@pytest.mark.parametrize("name", tiny_vlm.MODELS)
def test_the_model_without_a_trainer(name):
    model, batch = tiny_vlm.build(name), model_batch(name)
    check_head(model)
    inputs = {key: value for key, value in batch.items() if key not in ("completion_mask", "advantages")}
    length = batch["completion_mask"].shape[1]
    logits = model(**inputs, use_cache=False).logits[:, -length - 1 : -1].float()
    targets = batch["input_ids"][:, -length:]
    mask = batch["completion_mask"].bool()
    expected = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1))[..., 0]
    stats = token_logprobs_from_model(model, batch)
    torch.testing.assert_close(stats.logprobs[mask], expected[mask], rtol=1e-5, atol=1e-5)
    out = policy_loss_from_model(model, batch, "grpo")
    out.loss.backward()
    gradients = tiny.gradients(model)
    ratio = (expected - expected.detach()).exp()
    per_row = (ratio * batch["advantages"].unsqueeze(1) * mask).sum(-1) / mask.sum(-1)
    (-per_row.mean()).backward()
    for key, gradient in tiny.gradients(model).items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-3, atol=2e-5)


def test_counts_are_no_entry_of_a_model():
    with pytest.raises(ValueError, match="num_images"):
        token_logprobs_from_model(tiny_vlm.build("llava"), {**model_batch("llava"), "num_images": [1, 0, 2, 1]})
