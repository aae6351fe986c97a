"""Every name that docs/names.md gives for Liger, TRL and verl is one of the installed package; Liger's by the table."""

from __future__ import annotations

import dataclasses
import inspect
from importlib.util import find_spec

import names_page
import pytest
import torch

import a3po_kernels as ak

HAS_TRL, HAS_VERL = find_spec("trl") is not None, find_spec("verl") is not None
trl = pytest.mark.skipif(not HAS_TRL, reason="needs TRL and Liger-Kernel")
verl = pytest.mark.skipif(not HAS_VERL, reason="needs verl")

# Liger's loss type -> our preset and keywords; the types that Liger is known to have wrong are left out (test_liger).
TYPES = {
    "grpo": ("grpo", {}), "bnpo": ("grpo", {"aggregation": "token-mean"}), "dapo": ("dapo", {}),
    "dr_grpo": ("dr_grpo", {}), "cispo": ("cispo", {}), "sapo": ("sapo", {}), "vespo": ("vespo", {}),
}  # fmt: skip
PLAIN = {"loss_type": "bnpo", "epsilon_low": 0.1, "epsilon_high": 0.15, "temperature": 0.9, "beta": 0.0}
# Keywords of Liger's constructor beside PLAIN's, and of its call.
CASES = {
    **{name: ({"loss_type": name, "epsilon_high": 1.1 if name == "cispo" else 0.15}, {}) for name in TYPES
       if name not in ("sapo", "vespo", "dr_grpo")},
    "kl": ({"beta": 0.3}, {}),
    "kl, bias-corrected": ({"beta": 0.3, "use_bias_correction_kl": True}, {}),
    "delta": ({"delta": 1.1}, {}),
    "sequence": ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.01}, {}),
    "sapo": ({"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0}, {}),
    "vespo": ({"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 1.5, "vespo_k_neg": 0.5,
               "vespo_lambda_neg": 0.7}, {}),
    "importance weights": ({}, {"vllm_is_ratio": "weights"}),
    "items": ({"loss_type": "dapo"}, {"num_items_in_batch": 31.0}),
    "bias": ({}, {"bias": "bias"}),
    "length": ({"loss_type": "dr_grpo", "max_completion_length": 17}, {}),
}  # fmt: skip
# Of the objective where the preset takes them; bounds are none of SAPO's and VESPO's, which Liger then does not read.
UNREAD = {"sapo": {"epsilon_low", "epsilon_high"}, "vespo": {"epsilon_low", "epsilon_high"}, "cispo": {"epsilon_low"}}


def data() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden, weight = normal(3, 7, 16), normal(40, 16) / 2
    targets = torch.randint(0, 40, (3, 7), generator=generator)
    logprobs = (hidden @ weight.T / 0.9).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    mask = torch.ones(3, 7)
    mask[1, 4:], mask[2, 6:] = 0, 0
    return {
        "_input": hidden, "lin_weight": weight, "selected_token_ids": targets, "attention_mask": mask,
        "advantages": torch.tensor([1.3, -0.8, 0.4]), "old_per_token_logps": logprobs + 0.2 * normal(3, 7),
        "ref_per_token_logps": logprobs + 0.3 * normal(3, 7), "weights": (0.3 * normal(3, 7)).exp(),
        "bias": 0.3 * normal(40),
    }  # fmt: skip


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


def by_liger(made: dict, given: dict) -> list[torch.Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    hidden, weight = given["_input"].requires_grad_(), given["lin_weight"].requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss(compiled=False, **made)(**given)
    return gradients(loss, hidden, weight)


def by_the_table(made: dict, given: dict, table: dict[str, str]) -> list[torch.Tensor]:
    """Ours, each of Liger's names put through the table."""
    loss_type = made["loss_type"]
    preset, options = TYPES[loss_type]
    options, call = dict(options), {}
    for name, value in {**made, **given}.items():
        ours, _, word = table[name].partition("=")
        value = word.strip('"') if word else value
        if name == "loss_type" or name in UNREAD.get(loss_type, ()):
            continue
        (call if ours in inspect.signature(ak.linear_policy_loss).parameters else options)[ours] = value
    hidden, weight = call["hidden"].requires_grad_(), call["weight"].requires_grad_()
    loss = ak.linear_policy_loss(objective=ak.presets[preset](**options), **call).loss
    return gradients(loss, hidden, weight)


def both(case: str, table: dict[str, str]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    more, called = CASES[case]

    def call() -> tuple[dict, dict]:
        tensors = data()
        extra = {key: tensors[value] if isinstance(value, str) else value for key, value in called.items()}
        leave = {"weights", "bias"}
        return {**PLAIN, **more}, {**{key: x for key, x in tensors.items() if key not in leave}, **extra}

    return by_liger(*call()), by_the_table(*call(), table)


@pytest.mark.trl
@trl
@pytest.mark.parametrize("case", CASES)
def test_liger_by_the_table(case):
    theirs, ours = both(case, names_page.renamed("liger", 0, 2))
    assert all(x.abs().max() > 1e-4 for x in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=3e-6)


@pytest.mark.trl
@trl
@pytest.mark.parametrize(
    "one, other",
    [("old_per_token_logps", "ref_per_token_logps"), ("vespo_k_pos", "vespo_k_neg"), ("epsilon_low", "epsilon_high")],
)
def test_a_wrong_table_is_noticed(one, other):
    table = names_page.renamed("liger", 0, 2)
    table[one], table[other] = table[other], table[one]
    case = {"old_per_token_logps": "kl", "vespo_k_pos": "vespo", "epsilon_low": "bnpo"}[one]
    theirs, ours = both(case, table)
    assert (ours[1] - theirs[1]).abs().max() > 1e-4


@pytest.mark.trl
@trl
def test_ligers_arguments_are_all_there():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Liger
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    calls = (Liger.__init__, Liger.forward)
    parameters = {key for call in calls for key in inspect.signature(call).parameters if key != "self"}
    assert sorted(names_page.column("liger", 0)) == sorted(parameters)
    assert sorted(names_page.column("liger", 1)) == sorted(inspect.signature(triton_grpo_loss).parameters)


@pytest.mark.trl
@trl
def test_trls_names_are_trls():
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer

    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert set(names_page.column("trl config", 0)) <= fields
    loss = inspect.getsource(GRPOTrainer._compute_loss)
    for name in names_page.column("trl inputs", 0):
        assert f'inputs["{name}"]' in loss or f'inputs.get("{name}"' in loss or f'"{name}" in inputs' in loss, name
    module = inspect.getsource(grpo_trainer)
    for name in names_page.column("trl metrics", 0):
        assert f'["{name}"]' in module, name


@pytest.mark.verl
@verl
def test_verls_names_are_verls():
    from verl.trainer.config.algorithm import RolloutCorrectionConfig
    from verl.trainer.ppo import core_algos
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig

    kinds = (ActorConfig, PolicyLossConfig, RolloutCorrectionConfig)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert set(names_page.column("verl config", 0)) <= fields
    calls = (core_algos.compute_policy_loss_vanilla, core_algos.agg_loss)
    parameters = {key for call in calls for key in inspect.signature(call).parameters}
    assert set(names_page.column("verl arguments", 0)) <= parameters
    source = inspect.getsource(core_algos.compute_policy_loss_vanilla)
    assert all(f'"{name}"' in source for name in names_page.column("verl metrics", 0))


@pytest.mark.verl
@verl
def test_verls_vanilla_by_the_table():
    """The same loss, gradient and metrics, of the arguments and metrics that the tables pair."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config.actor import ActorConfig, PolicyLossConfig

    arguments = names_page.renamed("verl arguments", 0, 1)
    options = names_page.renamed("verl config", 0, 1)
    values = data()
    given = {
        "old_log_prob": values["old_per_token_logps"], "log_prob": values["ref_per_token_logps"].requires_grad_(),
        "advantages": values["advantages"][:, None].expand(3, 7), "response_mask": values["attention_mask"],
        "rollout_is_weights": values["weights"],
    }  # fmt: skip
    bounds = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15, "clip_ratio_c": 1.2}
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=PolicyLossConfig(),
                         **bounds)  # fmt: skip
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        loss, metrics = compute_policy_loss_vanilla(**given, loss_agg_mode=mode, config=config)
        (want,) = torch.autograd.grad(loss, given["log_prob"])
        objective = ak.dapo(**{options[key]: value for key, value in {**bounds, "loss_agg_mode": mode}.items()})
        out = ak.logprob_policy_loss(objective=objective, **{arguments[key]: value for key, value in given.items()})
        (gradient,) = torch.autograd.grad(out.loss, given["log_prob"])
        torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-7)
        for theirs, ours in [(row[0][0], row[1]) for row in names_page.rows("verl metrics")]:
            assert sum(out.metrics[name].item() for name in ours) == pytest.approx(metrics[theirs], abs=1e-6), theirs
    assert metrics["actor/pg_clipfrac"] > 0 and metrics["actor/pg_clipfrac_lower"] > 0
