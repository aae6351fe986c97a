"""integrations.transformers on real models: loss and gradients are those of policy_loss on the model's own logits."""

from __future__ import annotations

import pytest
import torch

import a3po_kernels as ak

pytest.importorskip("transformers")
pytest.importorskip("trl")  # marks the environment: make test-trl
import tiny
from torch import nn

from a3po_kernels.integrations.transformers import (
    check_head,
    head_keywords,
    min_p_logprobs_from_model,
    plan_rows_from_batch,
    policy_loss_from_model,
    swap_head,
    token_logprobs_from_model,
)

pytestmark = pytest.mark.trl

# fp32 gradients of a few hundred rounded products each, relative to the largest of a parameter.
ROUNDING = 2e-5


def completion_logits(model, batch):
    length = batch["completion_mask"].shape[1]
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits[:, -length - 1 : -1], batch["input_ids"][:, -length:]


def logits_logprobs(model, batch):
    """Plain log-softmax of the model's own logits."""
    logits, targets = completion_logits(model, batch)
    picked = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(batch["completion_mask"] == 0, 0.0)


def logits_loss(model, batch, objective, **options):
    """policy_loss of the model's own logits."""
    logits, targets = completion_logits(model, batch)
    keywords = {k: v for k, v in batch.items() if k in ("old_logprobs", "ref_logprobs", "min_p_logprobs")}
    return ak.policy_loss(
        logits, targets, batch["advantages"], objective=objective, mask=batch["completion_mask"], **keywords, **options
    )


def assert_same_gradients(ours, theirs, rounding=ROUNDING):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).abs().max()
        assert error <= rounding * gradient.abs().max() + 1e-9, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_loss_and_gradients(name, checkpointing):
    model, batch = tiny.build(name), tiny.batch()
    with torch.no_grad():
        logits, targets = completion_logits(model, batch)
        logp = ak.token_logprobs(logits, targets, temperature=0.8).logprobs
    batch["old_logprobs"] = logp + 0.2 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    batch["ref_logprobs"] = logp - 0.1
    objective = ak.a3po(kl_coef=0.1, entropy_coef=0.05)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.train()
    out = policy_loss_from_model(model, batch, objective, temperature=0.8, step=3)
    out.loss.backward()
    ours = tiny.gradients(model)
    expected = logits_loss(model, batch, objective, temperature=0.8, step=3)
    expected.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.logprobs, expected.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(out.entropy, expected.entropy, atol=2e-5, rtol=0)
    assert torch.equal(out.weights, expected.weights)
    assert_same_gradients(ours, tiny.gradients(model))
    assert any(gradient.any() for gradient in ours.values())


def test_the_head_is_read_as_the_config_says():
    assert head_keywords(tiny.build("softcap"))["softcap"] == 0.5
    assert head_keywords(tiny.build("multiplied"))["logit_scale"] == 0.25
    assert head_keywords(tiny.build("divided"))["logit_scale"] == 0.25
    assert head_keywords(tiny.build("bias"))["bias"] is not None


def test_no_logits_are_formed():
    model, batch = tiny.build(), tiny.batch()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    policy_loss_from_model(model, batch, ak.dapo()).loss.backward()
    token_logprobs_from_model(model, batch)
    assert shapes == [(1, 1, 1), (1, 1, 2 * 4 * 7)]


def test_the_model_is_as_before_afterwards():
    model, batch = tiny.build(), tiny.batch()
    before = model(input_ids=batch["input_ids"]).logits
    policy_loss_from_model(model, batch, ak.dapo())
    with pytest.raises(ValueError, match="max_chunk_bytes"):
        policy_loss_from_model(model, batch, ak.gspo(), route="one-pass", max_chunk_bytes=1)
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)


def test_the_router_loss_is_added():
    model, batch = tiny.build("moe"), tiny.batch()
    out = policy_loss_from_model(model, {**batch, "output_router_logits": True}, ak.dapo(), aux_loss_coef=0.3)
    plain = policy_loss_from_model(model, batch, ak.dapo())
    aux_loss = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
    ).aux_loss
    torch.testing.assert_close(out.loss - plain.loss, 0.3 * aux_loss)
    torch.testing.assert_close(out.metrics["aux_loss"], aux_loss.detach())
    assert "aux_loss" not in plain.metrics
    out.loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.any()


def test_statistics_and_the_min_p_proxy():
    model, batch = tiny.build("softcap"), tiny.batch()
    logits, targets = completion_logits(model, batch)
    targets = targets.masked_fill(~batch["completion_mask"], -100)
    stats = token_logprobs_from_model(model, batch, temperature=0.7)
    expected = ak.token_logprobs(logits, targets, temperature=0.7)
    torch.testing.assert_close(stats.logprobs, expected.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(stats.entropy, expected.entropy, atol=2e-5, rtol=0)
    proxy = min_p_logprobs_from_model(model, batch, 0.8)
    torch.testing.assert_close(proxy, ak.min_p_token_logprobs(logits, targets, 0.8), atol=2e-5, rtol=0)
    assert proxy.isinf().any() and (proxy < 0).any()


@pytest.mark.parametrize("target", ["head", "elsewhere", "saved"])
def test_peft_adapters(target):
    peft = pytest.importorskip("peft")
    options = {
        "head": {"target_modules": ["lm_head", "q_proj"]}, "elsewhere": {"target_modules": ["q_proj", "v_proj"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[target]  # fmt: skip
    model = peft.get_peft_model(tiny.build(), peft.LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **options))
    batch = tiny.batch()
    check_head(model)
    policy_loss_from_model(model, batch, ak.dapo()).loss.backward()
    ours = tiny.gradients(model)
    logits_loss(model, batch, ak.dapo()).loss.backward()
    assert_same_gradients(ours, tiny.gradients(model))
    assert any("lm_head" in name for name in ours) == (target != "elsewhere")
    with model.disable_adapter():
        base = token_logprobs_from_model(model, batch).logprobs
    with torch.no_grad():
        adapted = token_logprobs_from_model(model, batch).logprobs
        # The adapter's own forward is the other side, as PEFT merges and switches it.
        torch.testing.assert_close(adapted, logits_logprobs(model, batch), atol=2e-5, rtol=0)
        with model.disable_adapter():
            torch.testing.assert_close(base, logits_logprobs(model, batch), atol=2e-5, rtol=0)
        assert not torch.equal(base, adapted)
        if target != "saved":
            model.merge_adapter()
            torch.testing.assert_close(token_logprobs_from_model(model, batch).logprobs, adapted, atol=2e-5, rtol=0)


def test_adapters_that_are_not_supported():
    peft = pytest.importorskip("peft")

    def wrapped(**options):
        options = {"r": 4, "target_modules": ["lm_head"], **options}
        return peft.get_peft_model(tiny.build(), peft.LoraConfig(**options))

    with pytest.raises(ValueError, match="DoRA"):
        head_keywords(wrapped(use_dora=True))
    model = wrapped(lora_dropout=0.1)
    head_keywords(model.eval())
    with pytest.raises(ValueError, match="lora_dropout"):
        head_keywords(model.train())
    prompts = peft.get_peft_model(tiny.build(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="prompt-learning"):
        policy_loss_from_model(prompts, {**tiny.batch(), "logits_to_keep": 0}, ak.dapo())


def test_a_compiled_model_compiles_once():
    """The backbone is compiled, the head runs outside the graph; further batches of that shape reuse it."""
    model, batch = tiny.build(), tiny.batch()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    out = policy_loss_from_model(compiled, batch, ak.dapo())
    out.loss.backward()
    ours = tiny.gradients(model)
    logits_loss(model, batch, ak.dapo()).loss.backward()
    assert_same_gradients(ours, tiny.gradients(model))
    count = len(graphs)
    for seed in (1, 2):
        policy_loss_from_model(compiled, tiny.batch(seed=seed), ak.dapo()).loss.backward()
    assert count >= 1 and len(graphs) == count
    torch._dynamo.reset()


def test_autocast():
    """Under bf16 autocast the head's products are bf16, as the model's own would be."""
    model, batch = tiny.build(), tiny.batch()
    exact = policy_loss_from_model(model, batch, ak.dapo()).logprobs
    with torch.autocast("cpu", torch.bfloat16):
        ours = policy_loss_from_model(model, batch, ak.dapo()).logprobs
        theirs = logits_loss(model, batch, ak.dapo()).logprobs
        wide = policy_loss_from_model(model, batch, ak.dapo(), head_dtype=torch.float32).logprobs
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()
    assert not torch.equal(wide, ours)


# -- rows planned ahead -----------------------------------------------------------------------------------------------


def scored_batch():
    """The third of four rollouts is empty, the fourth's advantage is 0; of the others 7 and 4 tokens are left."""
    batch = tiny.batch()
    batch["advantages"] = torch.tensor([-1.0, 1.5, 1.0, 0.0])
    batch["old_logprobs"] = torch.full((4, 7), -3.3)
    return batch


PLANNED = {
    "dapo": ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    "a3po": ({}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    "psr": ({}, [7, 8, 9, 10]),
    "nsr": ({"polarity": torch.tensor([1, -1, -1, 1])}, [7, 8, 9, 10]),
    "sapo": ({"advantages": torch.eye(4, 7)}, [0, 8, 24]),
}


@pytest.mark.parametrize("name", PLANNED)
def test_a_plan_made_ahead(name, monkeypatch):
    """It holds the rows that may have a gradient; with it the loss is the same and never asks for their number."""
    change, rows = PLANNED[name]
    model, batch, objective = tiny.build(), {**scored_batch(), **change}, getattr(ak, name)()
    expected = policy_loss_from_model(model, batch, objective)
    expected.loss.backward()
    gradients = tiny.gradients(model)
    scored = {key: values for key, values in batch.items() if key in ("completion_mask", "advantages", "polarity")}
    plan = plan_rows_from_batch(scored, objective, device="cpu")
    assert plan.rows.tolist() == rows and plan.count == 28

    def wait(*arguments):
        raise AssertionError("the loss made a plan of its own")

    monkeypatch.setattr("a3po_kernels.losses.linear.find_rows", wait)
    out = policy_loss_from_model(model, batch, objective, plan=plan)
    out.loss.backward()
    assert out.route == expected.route == "one-pass"
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(out.logprobs, expected.logprobs, atol=2e-6, rtol=0)
    assert_same_gradients(tiny.gradients(model), gradients)
    with pytest.raises(AssertionError, match="a plan of its own"):
        policy_loss_from_model(model, batch, objective)


def test_plans_of_something_else():
    model, batch = tiny.build(), scored_batch()
    other = {**batch, "advantages": batch["advantages"] * torch.tensor([1.0, 0.0, 1.0, 1.0])}
    with pytest.raises(ValueError, match="made of another batch"):
        policy_loss_from_model(model, batch, ak.dapo(), plan=plan_rows_from_batch(other, ak.dapo()))
    with pytest.raises(ValueError, match="another objective"):
        policy_loss_from_model(model, batch, ak.dapo(), plan=plan_rows_from_batch(batch, ak.a3po()))
    with pytest.raises(TypeError, match="must be a RowPlan"):
        policy_loss_from_model(model, batch, ak.dapo(), plan=batch["completion_mask"])
    with pytest.raises(TypeError, match="batch must have 'advantages'; it has completion_mask"):
        plan_rows_from_batch({"completion_mask": batch["completion_mask"]}, ak.dapo())
    with pytest.raises(ValueError, match=r"must have shape \[B, T\]; got \[28\]"):
        plan_rows_from_batch({**batch, "completion_mask": torch.ones(28)}, ak.dapo())


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_head_that_the_config_does_not_describe():
    model = tiny.build("softcap")
    check_head(model)
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.5 * own(hidden)
    with pytest.raises(ValueError, match="transforms its logits in a way that is not supported"):
        check_head(model)


def test_models_without_such_a_head():
    with pytest.raises(TypeError, match="causal LM"):
        head_keywords(nn.Linear(2, 2))
    model = tiny.build()
    model.lm_head = nn.Sequential(nn.Linear(32, tiny.VOCABULARY))
    with pytest.raises(TypeError, match="linear layer; got Sequential"):
        head_keywords(model)
    model = tiny.build()
    model.lm_head.weight = nn.Parameter(torch.zeros(tiny.VOCABULARY, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        head_keywords(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_mask": torch.ones(4, 12)}, r"1 <= T < 12"),
        ({"completion_mask": torch.ones(3, 5)}, r"must have shape \[4, T\]"),
        ({"completion_mask": torch.ones(4)}, r"got \[4\]"),
        ({"input_ids": torch.ones(12, dtype=torch.long)}, r"\[B, L\]"),
        ({"advantages": torch.ones(3)}, r"advantages must have shape \[4\]"),
    ],
)
def test_mistakes_in_the_batch_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        policy_loss_from_model(tiny.build(), {**tiny.batch(), **change}, ak.dapo())


def test_missing_entries_are_named():
    batch = tiny.batch()
    del batch["completion_mask"]
    with pytest.raises(TypeError, match="batch must have 'completion_mask'; it has input_ids, attention_mask, adv"):
        policy_loss_from_model(tiny.build(), batch, ak.dapo())


def test_swap_head_does_not_nest():
    model = tiny.build()
    with (
        swap_head(model, lambda hidden, **head: hidden.sum()) as results,
        pytest.raises(RuntimeError, match="already active"),
        swap_head(model, lambda hidden, **head: hidden.sum()),
    ):
        pass
    assert results == []
