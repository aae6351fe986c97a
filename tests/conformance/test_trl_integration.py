"""integrations.trl: A3POTrainer beside GRPOTrainer on the same data, and what it adds."""

from __future__ import annotations

import math

import pytest
import torch

import a3po_kernels as ak

pytest.importorskip("trl")
import tiny
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from a3po_kernels import presets
from a3po_kernels.integrations.trl import A3POConfig, A3POTrainer

pytestmark = [pytest.mark.trl, pytest.mark.filterwarnings("ignore::FutureWarning")]

# Two trainers take the same few fp32 steps: losses below 1, gradient norms below 10, a hundred roundings each.
LOSS, GRADIENT = 3e-6, 3e-5
DATA = Dataset.from_dict({"prompt": [f"{i}+{i + 1}=" for i in range(32)]})


def reward(completions, **kwargs):
    return [float(sum(c in "0123456789" for c in completion)) for completion in completions]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny models as a user has them: saved with a tokenizer, which reference models are loaded from."""
    return tiny.save(tmp_path_factory.mktemp("models"), "llama", "softcap", "moe")


def trainer(kind, configuration, folder, output, **options):
    options = {
        "per_device_train_batch_size": 8, "num_generations": 4, "gradient_accumulation_steps": 2, "max_steps": 3,
        "max_completion_length": 9, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "report_to": [],
        "logging_steps": 1, "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False, "optim": "sgd", **options,
    }  # fmt: skip
    args = configuration(str(output), **options)
    return kind(model=str(folder), reward_funcs=reward, args=args, train_dataset=DATA)


def trained(*arguments, **options):
    made = trainer(*arguments, **options)
    made.train()
    return made


def parameters(made):
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


SAME = {
    "grpo": ({"loss_type": "grpo", "epsilon_high": 0.2}, {"objective": "grpo"}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"objective": "dapo"}),
    "dr_grpo": ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {"objective": "dr_grpo", "scale_rewards": "none"}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "use_bias_correction_kl": False},
        {"objective": "gspo", "use_bias_correction_kl": False},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.05}, {"objective": "cispo", "epsilon_high": 1.05}),
    "sapo": ({"loss_type": "sapo"}, {"objective": "sapo"}),
    "clip": (
        {"loss_type": "grpo", "epsilon": 0.01, "delta": 1.5}, {"objective": "grpo", "epsilon": 0.01, "delta": 1.5},
    ),
}  # fmt: skip
MODES = {
    "on-policy": {},
    # The second pass over the rollouts is off-policy; a reference model; truncated responses are masked as a whole.
    "off-policy": {"num_iterations": 2, "beta": 0.1, "mask_truncated_completions": True, "max_steps": 4},
    # Generations serve two optimizer steps: the token normaliser spans more than one of them.
    "generations": {"steps_per_generation": 4, "temperature": 0.7},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SAME)
def test_training_is_trls(name, mode, folders, tmp_path):
    theirs = trained(GRPOTrainer, GRPOConfig, folders / "llama", tmp_path, **SAME[name][0], **MODES[mode])
    ours = trained(A3POTrainer, A3POConfig, folders / "llama", tmp_path, **SAME[name][1], **MODES[mode])
    before = parameters(trainer(GRPOTrainer, GRPOConfig, folders / "llama", tmp_path))
    moved = (parameters(theirs) - before).abs().max()
    assert moved > 1e-4
    assert (parameters(ours) - parameters(theirs)).abs().max() <= GRADIENT * max(1.0, moved)
    assert len(ours.state.log_history) == len(theirs.state.log_history)
    for mine, reference in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert reference.keys() <= mine.keys()
        for key in reference.keys() - {"step_time"}:
            if reference[key] is None:
                assert mine[key] is None, key
            else:
                tolerance = {"loss": LOSS, "grad_norm": GRADIENT * (1 + reference["grad_norm"])}.get(key, 1e-5)
                assert mine[key] == pytest.approx(reference[key], abs=tolerance), key


# -- one batch, put together by hand -----------------------------------------------------------------------------------


def inputs(seed=0):
    batch = tiny.batch(seed=seed)
    prompt = batch["input_ids"].shape[1] - batch["completion_mask"].shape[1]
    generator = torch.Generator().manual_seed(seed + 10)
    shape = batch["completion_mask"].shape
    return {
        "prompt_ids": batch["input_ids"][:, :prompt], "prompt_mask": batch["attention_mask"][:, :prompt],
        "completion_ids": batch["input_ids"][:, prompt:], "completion_mask": batch["attention_mask"][:, prompt:],
        "advantages": batch["advantages"], "num_items_in_batch": torch.tensor(40),
        "old_per_token_logps": -3.3 + 0.2 * torch.randn(shape, generator=generator),
        "ref_per_token_logps": -3.3 + 0.2 * torch.randn(shape, generator=generator),
    }  # fmt: skip


def step_loss(made, data, training=True):
    """Loss and gradients of the trainer's own _compute_loss."""
    made.model.train(training)
    made.current_gradient_accumulation_steps = 2
    with torch.set_grad_enabled(training):
        loss = made._compute_loss(made.model, data)
    if training:
        loss.backward()
    return loss.detach(), tiny.gradients(made.model)


def both(folders, tmp_path, name="llama", **options):
    """(GRPOTrainer, A3POTrainer) of DAPO's loss."""
    theirs = trainer(GRPOTrainer, GRPOConfig, folders / name, tmp_path, loss_type="dapo", epsilon_high=0.28, **options)
    return theirs, trainer(A3POTrainer, A3POConfig, folders / name, tmp_path, objective="dapo", **options)


def assert_same_step(theirs, ours, data, training=True):
    (loss, gradients), (mine, my_gradients) = step_loss(theirs, data, training), step_loss(ours, data, training)
    torch.testing.assert_close(mine, loss, atol=LOSS, rtol=1e-5)
    assert gradients.keys() == my_gradients.keys()
    for key, gradient in gradients.items():
        assert (my_gradients[key] - gradient).abs().max() <= GRADIENT * max(1.0, gradient.abs().max()), key
    for key, values in theirs._metrics["train" if training else "eval"].items():
        for mine, value in zip(ours._metrics["train" if training else "eval"][key], values, strict=True):
            assert mine == pytest.approx(value, abs=2e-5, nan_ok=True), key


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_with_a_tool_mask(training, folders, tmp_path):
    data = inputs()
    data["tool_mask"] = torch.ones_like(data["completion_mask"])
    data["tool_mask"][0, 2:4] = 0
    assert_same_step(*both(folders, tmp_path, beta=0.05), data, training)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_importance_sampling_ratio(per, folders, tmp_path):
    """vLLM's correction, [B, T] or [B, 1]; the trainers are told that vLLM generated."""
    data = inputs()
    ratio = torch.linspace(0.5, 1.5, data["completion_mask"].numel()).view(data["completion_mask"].shape)
    data["importance_sampling_ratio"] = ratio if per == "token" else ratio[:, :1]
    made = both(folders, tmp_path)
    for one in made:
        one.use_vllm = True
    assert_same_step(*made, data)


@pytest.mark.parametrize("name", ["softcap", "moe"])
def test_heads_and_router_losses(name, folders, tmp_path):
    options = {"router_aux_loss_coef": 0.2} if name == "moe" else {}
    theirs, ours = both(folders, tmp_path, name, **options)
    data = inputs()
    # The behaviour policy must be near for the ratio to be within fp32's reach.
    ids = torch.cat([data["prompt_ids"], data["completion_ids"]], dim=1)
    mask = torch.cat([data["prompt_mask"], data["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, _, _ = theirs._get_per_token_logps_and_entropies(theirs.model, ids, mask, 7)
        mine, entropies, _ = ours._get_per_token_logps_and_entropies(ours.model, ids, mask, 7, 2, compute_entropy=True)
    torch.testing.assert_close(mine, logps, atol=2e-5, rtol=0)
    assert entropies.shape == logps.shape and (entropies[data["completion_mask"] == 1] > 0).all()
    data["old_per_token_logps"] = logps + 0.1 * torch.randn(logps.shape, generator=torch.Generator().manual_seed(3))
    assert_same_step(theirs, ours, data)
    assert ("aux_loss" in ours._metrics["train"]) == (name == "moe")


@pytest.mark.parametrize(
    "options", [{"model_init_kwargs": {"dtype": torch.bfloat16}}, {"bf16": True}], ids=["model", "autocast"]
)
def test_a_head_in_fp32_over_a_bf16_model(options, folders, tmp_path):
    theirs, ours = both(folders, tmp_path, cast_lm_head_to_fp32=True, **options)
    data = inputs()
    (loss, gradients), (mine, my_gradients) = step_loss(theirs, data), step_loss(ours, data)
    torch.testing.assert_close(mine, loss, atol=LOSS, rtol=1e-5)  # a bf16 head is 1e-3 off
    torch.testing.assert_close(my_gradients["lm_head.weight"], gradients["lm_head.weight"], atol=GRADIENT, rtol=0)
    for key, gradient in gradients.items():
        # Below the head they were rounded to bf16, after sums in other orders.
        assert (my_gradients[key] - gradient).float().norm() <= 2**-7 * gradient.float().norm(), key


def test_per_token_advantages(folders, tmp_path):
    data = inputs()
    data["advantages"] = torch.randn(4, 7, generator=torch.Generator().manual_seed(5))
    assert_same_step(*both(folders, tmp_path), data)


def test_no_logits_are_formed(folders, tmp_path):
    made = trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path)
    shapes = []
    made.model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    step_loss(made, inputs())
    assert shapes == [(1, 1, 1)]


# -- rows planned where TRL cuts the slices ---------------------------------------------------------------------------


@pytest.fixture
def losses(monkeypatch):
    """Notes (plan, mask, advantages) of each loss call; looking for rows in it, which waits on a GPU, is an error."""
    calls = []

    def noted(*arguments, plan, mask, advantages, **options):
        calls.append((plan, mask, advantages))
        return ak.linear_policy_loss(*arguments, plan=plan, mask=mask, advantages=advantages, **options)

    monkeypatch.setattr("a3po_kernels.losses.linear.find_rows", None)
    monkeypatch.setattr("a3po_kernels.integrations.transformers.linear_policy_loss", noted)
    return calls


@pytest.mark.parametrize("name", ["dapo", "a3po"])
def test_every_loss_has_the_plan_of_its_slice(name, losses, folders, tmp_path):
    """Shuffled, cut into two slices, both used twice; and in evaluation."""
    made = trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path, objective=name, num_iterations=2, max_steps=4)
    # Half of the groups have equal rewards, and so no gradient.
    made.reward_funcs = [lambda completions, **kwargs: [r * (i % 8 < 4) for i, r in enumerate(reward(completions))]]
    made.train()
    assert len(losses) == 8 and len({id(plan.planned) for plan, _, _ in losses}) == 4
    made.eval_dataset = DATA.select(range(2))
    made.evaluate()
    for plan, mask, advantages in losses:
        assert torch.equal(plan.planned, (mask & (advantages != 0)[:, None]).flatten())
        assert torch.equal(plan.read, mask.flatten())
    assert any(0 < plan.row_count < mask.sum() for plan, mask, _ in losses[:8]) and len(losses) > 8


def test_a_plan_and_a_tool_mask(losses, folders, tmp_path):
    data = inputs()
    data["tool_mask"] = torch.ones_like(data["completion_mask"])
    data["tool_mask"][0, 2:4] = 0
    data["advantages"][3] = 0.0
    theirs, ours = both(folders, tmp_path)
    data["row_plan"] = ours._row_plan(data)
    assert data["row_plan"].rows.tolist() == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    assert_same_step(theirs, ours, data)
    data["tool_mask"][0, 2:4] = 1
    with pytest.raises(ValueError, match="made of another batch"):
        step_loss(ours, data)
    # An objective that is replaced gets plans of its own; where every row is computed there is none.
    ours._prepare_inputs([DATA[i // 4] for i in range(16)])
    ours._step, ours.policy_objective = 1, ak.psr()
    assert ours._prepare_inputs([])["row_plan"].objective == ak.psr()
    ours.args.head_compaction = "none"
    assert ours._row_plan(data) is None


# -- what it adds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets)
def test_every_preset_trains_off_policy(name, folders, tmp_path):
    """The swap of the quick start: another trainer, another config. Lp-Reg needs statistics of the old policy here."""
    made = trained(A3POTrainer, A3POConfig, folders / "llama", tmp_path, objective=name, num_iterations=2, max_steps=4)
    row = made.state.log_history[-2]
    assert all(math.isfinite(row[key]) for key in ("loss", "grad_norm", "entropy", "active_fraction"))
    assert row["grad_norm"] > 0 and 0 < row["active_fraction"] <= 1
    start = parameters(trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path))
    assert not torch.equal(parameters(made), start)


def test_metrics(folders, tmp_path):
    made = trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path, token_ratio=0.3)
    data = inputs()
    step_loss(made, data)
    metrics = {name: values[-1] for name, values in made._metrics["train"].items()}
    stats = made._get_per_token_logps_and_entropies(
        made.model, torch.cat([data["prompt_ids"], data["completion_ids"]], 1),
        torch.cat([data["prompt_mask"], data["completion_mask"]], 1), 7, compute_entropy=True,
    )  # fmt: skip
    entropy, mask = stats[1].detach(), data["completion_mask"].bool()
    sign = data["advantages"].sign()[:, None].expand_as(mask)
    assert metrics["entropy"] == pytest.approx(entropy[mask].mean().item(), abs=1e-5)
    assert metrics["entropy/positive"] == pytest.approx(entropy[mask & (sign > 0)].mean().item(), abs=1e-5)
    assert metrics["entropy/negative"] == pytest.approx(entropy[mask & (sign < 0)].mean().item(), abs=1e-5)
    # Rollouts of 7, 4, 0 and 7 tokens: floor(.3 n) of each, and at least one.
    assert metrics["selected_fraction/negative"] == pytest.approx((2 + 1) / 11)
    assert metrics["selected_fraction/positive"] == pytest.approx(2 / 7)
    assert metrics["weight_beta"] == 2.0


def test_beta_goes_on_from_a_checkpoint(folders, tmp_path):
    options = {"rho": 2.0, "alpha": 0.25, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(A3POTrainer, A3POConfig, folders / "llama", tmp_path, **options)
    betas = [row["weight_beta"] for row in whole.state.log_history if "weight_beta" in row]
    assert betas == [2.0, 1.75, 1.5, 1.25]
    resumed = trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    betas = [row["weight_beta"] for row in resumed.state.log_history if "weight_beta" in row]
    assert betas == [2.0, 1.75, 1.5, 1.25]


def test_kept_tokens_are_the_divisor(folders, tmp_path):
    """psr: the tokens of positive rollouts over the generation batch; the others do not dilute it."""
    made = trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path, objective="psr")
    data = inputs()
    data["num_kept_in_batch"] = torch.tensor(14.0)
    loss = step_loss(made, data)[0]
    made.policy_objective = ak.psr()
    data["num_kept_in_batch"] = torch.tensor(28.0)
    torch.testing.assert_close(step_loss(made, data)[0], loss / 2)
    generated = made._prepare_inputs([DATA[i // 4] for i in range(16)])
    full = made._buffered_inputs
    positive = sum((b["completion_mask"] * (b["advantages"] > 0)[:, None]).sum() for b in full)
    assert generated["num_kept_in_batch"] == positive > 0


def test_fork_tokens_keep_their_share(folders, tmp_path):
    made = trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path, objective="fork_tokens", token_ratio=0.5)
    batch = made._prepare_inputs([DATA[i // 4] for i in range(16)])
    assert batch["num_kept_in_batch"].item() == pytest.approx(0.5 * batch["num_items_in_batch"].item())


def test_evaluation(folders, tmp_path):
    made = trainer(
        A3POTrainer, A3POConfig, folders / "llama", tmp_path, eval_strategy="no", per_device_eval_batch_size=8
    )
    made.eval_dataset = DATA.select(range(4))
    metrics = made.evaluate()
    for name in ("eval_loss", "eval_reward", "eval_entropy", "eval_active_fraction"):
        assert math.isfinite({**made.state.log_history[-1], **metrics}[name])


def test_a_lora_adapter(folders, tmp_path):
    peft = pytest.importorskip("peft")
    args = A3POConfig(
        str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_steps=2, max_completion_length=6,
        learning_rate=0.1, report_to=[], logging_steps=1, use_cpu=True, bf16=True, disable_tqdm=True, beta=0.1,
        save_strategy="no",
    )  # fmt: skip
    made = A3POTrainer(
        str(folders / "llama"), reward, args, DATA,
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    )  # fmt: skip
    made.train()
    moved = {n: p for n, p in made.model.named_parameters() if "lora_B" in n and p.any()}
    assert any("down_proj" in name for name in moved) and any("q_proj" in name for name in moved)
    assert made.state.log_history[-2]["kl"] > 0


def test_an_objective_with_a_kl_term_loads_the_reference(folders, tmp_path):
    options = {"objective": ak.dapo(kl_coef=0.1)}
    made = trainer(A3POTrainer, A3POConfig, folders / "llama", tmp_path, **options)
    assert made.beta == 0.1 and made.ref_model is not None


def test_the_arguments_must_be_ours(folders, tmp_path):
    with pytest.raises(TypeError, match="A3POConfig; got GRPOConfig"):
        trainer(A3POTrainer, GRPOConfig, folders / "llama", tmp_path)


def test_a_head_that_is_transformed_is_refused(folders, tmp_path):
    model = tiny.build()
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.5 * own(hidden)
    args = A3POConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="transforms its logits"):
        A3POTrainer(model, reward, args, DATA, processing_class=tiny.tokenizer())
