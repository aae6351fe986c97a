"""integrations.verl inside the real package: its hook, its policy losses on the same tensors, its head's signature."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("verl")
from test_verl import GRADIENT, LOSS, MODES, batch, config, log_prob, verl_loss
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.utils.kernel import linear_cross_entropy as head_module
from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

import a3po_kernels
from a3po_kernels.integrations import verl as integration

pytestmark = pytest.mark.verl

GLOBAL = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 7, "loss_scale_factor": 12}
COINCIDING = {"dapo": "vanilla", "grpo": "vanilla", "a3po_gspo": "gspo", "a3po_cispo": "cispo", "a3po_sapo": "sapo"}


def loss_scale(mode, data, info):
    """How many times the mean over tokens the loss is, for the tolerances."""
    return data.mask.sum().item() * (info or {}).get("dp_size", 1) if mode.endswith("sum") else 1.0


@pytest.mark.parametrize("info", [None, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", [*MODES, "token-sum"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("ours", COINCIDING)
def test_values_and_gradients_are_verls(ours, corrected, mode, info):
    if corrected and ours == "a3po_gspo":
        pytest.skip("verl's GSPO weighs a token's gradient by the token's own correction: test_verl states it")
    data = batch(3)
    actor = config(info, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1.5)
    weights = data.weights if corrected else None
    theirs = verl_loss(data, COINCIDING[ours], mode, actor, weights)
    mine = verl_loss(data, ours, mode, actor, weights)
    scale = loss_scale(mode, data, info)
    torch.testing.assert_close(mine[0], theirs[0], atol=LOSS * scale, rtol=0)
    torch.testing.assert_close(mine[1], theirs[1], atol=GRADIENT * scale, rtol=0)
    assert theirs[1].any()
    assert mine[2]["actor/ppo_kl"] == pytest.approx(theirs[2]["actor/ppo_kl"], abs=1e-6)
    if COINCIDING[ours] == "vanilla":
        for name in ("actor/pg_clipfrac", "actor/pg_clipfrac_lower"):
            assert mine[2][name] == pytest.approx(theirs[2][name], abs=1e-6)
            assert theirs[2][name] > 0


def test_gspo_has_no_dual_clip():
    """Rollouts of negative advantage whose ratio is beyond clip_ratio_c: verl's GSPO leaves them to the plain clip."""
    data, actor = batch(3), config(clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=1.5)
    data.old = data.old - 1.0
    data.advantages = -data.advantages.abs()
    mine, theirs = (verl_loss(data, name, "seq-mean-token-mean", actor) for name in ("a3po_gspo", "gspo"))
    # The ratios are about e: so many times the tolerance.
    torch.testing.assert_close(mine[0], theirs[0], atol=3 * LOSS, rtol=0)
    torch.testing.assert_close(mine[1], theirs[1], atol=3 * GRADIENT, rtol=0)
    assert theirs[1].any()


@pytest.mark.parametrize("step", [0, 100])
def test_a3po_weighs_the_selected_tokens(step, monkeypatch):
    """verl's own vanilla loss on advantages that were weighed by hand."""
    monkeypatch.setattr(integration._steps, "step", step)
    data = batch(4)
    actor = config(clip_ratio_low=0.2, clip_ratio_high=0.28)
    weighed = data.advantages.unsqueeze(-1).expand_as(data.mask).clone()
    beta = max(1.0, 2.0 - 0.005 * step)
    for rollout in range(len(data.mask)):
        length = int(data.mask[rollout].sum())
        order = data.old[rollout, :length].argsort(descending=bool(data.advantages[rollout] < 0))
        weighed[rollout, order[: max(1, length // 5) if length else 0]] *= beta
    mine = verl_loss(data, "a3po", "token-mean", actor)
    data.advantages = weighed
    theirs = verl_loss(data, "vanilla", "token-mean", actor)
    torch.testing.assert_close(mine[0], theirs[0], atol=LOSS, rtol=0)
    torch.testing.assert_close(mine[1], theirs[1], atol=2 * GRADIENT, rtol=0)  # the weight is up to 2
    assert mine[2]["actor/weight_beta"] == pytest.approx(beta)


def test_psr_and_nsr_add_up_to_all_rollouts():
    """With a global token count as divisor, and none of the advantages zero."""
    data, actor = batch(5), config({"batch_num_tokens": 20}, clip_ratio_c=1e6)
    parts = [verl_loss(data, name, "token-mean", actor) for name in ("psr", "nsr")]
    whole = verl_loss(data, "vanilla", "token-mean", actor)
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0], atol=LOSS, rtol=0)
    assert parts[0][1].any() and parts[1][1].any()


def test_a_micro_batch_without_a_token_is_zero():
    data = batch(6)
    data.mask = torch.zeros_like(data.mask)
    loss, gradient, _ = verl_loss(data, "a3po", "token-mean", config())
    assert loss == 0 and not gradient.any()


def test_dp_size_needs_the_global_counts():
    for mode in ("token-mean", "seq-mean-token-mean"):
        with pytest.raises(ValueError, match=r"required when dp_size > 1"):
            verl_loss(batch(), "a3po", mode, config({"dp_size": 2}))


def test_an_unknown_aggregation_is_named():
    with pytest.raises(ValueError, match=r"loss_agg_mode must be one of .*; got 'mean'"):
        verl_loss(batch(), "a3po", "mean", config())


def test_the_step_counts_optimizer_steps_after_a_policy_loss(monkeypatch):
    monkeypatch.setattr(integration._steps, "step", 0)
    integration._steps.pending = False
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer, other = torch.optim.SGD([parameter], 0.1), torch.optim.AdamW([parameter], 0.1)
    parameter.grad = torch.ones(2)
    other.step()  # the critic's, say
    assert integration.training_step() == 0
    for _ in range(2):  # two micro-batches
        verl_loss(batch(), "a3po", "token-mean", config())
    assert integration.training_step() == 0
    optimizer.step()
    other.step()
    assert integration.training_step() == 1
    data = batch()
    with torch.no_grad():  # an evaluation of the loss, which no optimizer step will follow
        integration.POLICY_LOSS_REGISTRY["a3po"](
            data.old, data.old, data.advantages.unsqueeze(-1), data.mask, config=config()
        )
    other.step()
    assert integration.training_step() == 1
    integration.set_step(7)
    assert integration.training_step() == 7
    with pytest.raises(ValueError, match="step"):
        integration.set_step(-1)


@pytest.mark.parametrize(
    ("objective", "missing"),
    [
        (a3po_kernels.fork_tokens(), "entropy"), (a3po_kernels.lp_reg(), "min-p proxy"),
        (a3po_kernels.dapo(kl_coef=0.1), "reference"), (a3po_kernels.dapo(entropy_coef=0.1), "entropy"),
    ],
)  # fmt: skip
def test_what_verl_does_not_pass_is_refused(objective, missing):
    before = dict(POLICY_LOSS_REGISTRY)
    with pytest.raises(ValueError, match=missing):
        integration.register_objective("mine", objective)
    assert before == POLICY_LOSS_REGISTRY


def test_a_schedule_beside_rho_is_refused_on_the_way_to_verl():
    before = dict(POLICY_LOSS_REGISTRY)
    with pytest.raises(ValueError, match=r"^rho must be left out where schedule is given"):
        integration.register_objective("mine", a3po_kernels.a3po(rho=3.0, schedule=a3po_kernels.CosineDecay()))
    assert before == POLICY_LOSS_REGISTRY


def test_an_objective_of_ones_own(monkeypatch):
    monkeypatch.delitem(POLICY_LOSS_REGISTRY, "mine", raising=False)
    function = integration.register_objective("mine", a3po_kernels.a3po(rho=3.0), bounds_from_config=False)
    assert get_policy_loss_fn("mine") is function
    assert verl_loss(batch(), "mine", "token-mean", config())[2]["actor/weight_beta"] == pytest.approx(3.0)
    del POLICY_LOSS_REGISTRY["mine"]
    integration.register_objective("mine", "a3po", bounds_from_config=False)
    assert verl_loss(batch(), "mine", "token-mean", config())[2]["actor/weight_beta"] == pytest.approx(2.0)
    del POLICY_LOSS_REGISTRY["mine"]
    with pytest.raises(ValueError, match=r"got 'a3p'; did you mean 'a3po'\?"):
        integration.register_objective("mine", "a3p")


def test_verls_own_losses_stay():
    for name in ("vanilla", "gspo", "cispo", "sapo"):
        assert POLICY_LOSS_REGISTRY[name].__module__ == "verl.trainer.ppo.core_algos"
    assert {"fork_tokens", "lp_reg"}.isdisjoint(POLICY_LOSS_REGISTRY)


def test_verl_loads_it_by_its_external_module_hook():
    """A process of its own, in which nothing else imports the integration."""
    program = (
        "import verl, verl.models.transformers.dense_common\n"
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn\n"
        "from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as head\n"
        "from verl.utils.experimental.torch_functional import FusedLinearForPPO as default\n"
        "print(get_policy_loss_fn('a3po').__module__, head.__module__, default.forward.__module__)\n"
    )
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "a3po_kernels.integrations.verl"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-3:] == ["a3po_kernels.integrations.verl"] * 3


# -- the head ---------------------------------------------------------------------------------------------------------


def test_the_head_takes_verls_place_and_signature():
    assert head_module.linear_cross_entropy is integration.linear_cross_entropy
    theirs = list(inspect.signature(LinearCrossEntropy.forward).parameters.values())[1:]
    ours = list(inspect.signature(integration.linear_cross_entropy).parameters.values())
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_head_computes_the_formula(reduction, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 40, (2, 5), generator=generator)
    logprobs, entropy = integration.linear_cross_entropy(hidden, weight, labels, 0.7, reduction, None)
    (logprobs.sum() - 0.1 * entropy.sum()).backward()

    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    distribution = torch.log_softmax(exact_hidden.reshape(-1, 16) @ exact_weight.t() / 0.7, -1)
    exact = distribution.gather(-1, labels.reshape(-1, 1)).squeeze(-1)
    exact_entropy = -(distribution.exp() * distribution).sum(-1)
    exact = {"none": exact, "sum": exact.sum(), "mean": exact.mean()}[reduction]
    (exact.sum() - 0.1 * exact_entropy.sum()).backward()

    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.shape == exact.shape and entropy.shape == (10,)
    assert hidden.grad.dtype == dtype and hidden.grad.shape == hidden.shape
    # A logit below 20 is rounded to the dtype once, and a gradient of either once more.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(logprobs.double(), exact.detach(), atol=40 * eps, rtol=4 * eps)
    for mine, theirs in ((hidden.grad, exact_hidden.grad), (weight.grad, exact_weight.grad)):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < 8 * eps


def test_the_fused_forward_of_verls_actor_uses_it():
    """verl's own forward of a dense model, whose log-probs must be those of the model's logits."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from verl.models.transformers.dense_common import forward_with_triton_backend

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )
    ids = torch.randint(0, 40, (2, 6))
    result = forward_with_triton_backend(model, input_ids=ids, temperature=0.8, return_dict=True)
    logits = model(input_ids=ids).logits / 0.8
    expected = log_prob(logits, ids.roll(-1, dims=-1)).reshape(-1)
    torch.testing.assert_close(result.log_probs.reshape(-1), expected, atol=1e-5, rtol=0)
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(result.entropy.reshape(-1), distribution.entropy().reshape(-1), atol=1e-5, rtol=0)


def test_an_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="reduction"):
        integration.linear_cross_entropy(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2).long(), 1.0, "max")
