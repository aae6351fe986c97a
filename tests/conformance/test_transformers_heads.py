"""The heads of transformers' causal LMs: log-probs are those of the model's own logits, or an error says why not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import a3po_kernels as ak

pytest.importorskip("trl")
import families
import tiny
from test_transformers_integration import logits_logprobs, logits_loss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from a3po_kernels.integrations.transformers import (
    check_head,
    head_keywords,
    min_p_logprobs_from_model,
    policy_loss_from_model,
    swap_head,
    token_logprobs_from_model,
)

pytestmark = pytest.mark.trl

NOT_BUILT = {
    "blt": "its entropy patcher wants sizes of its own",
    "dots3_note": "its towers have layers by number",
    "gemma3n": "needs timm",
    "gemma4_assistant": "reads another model's states, no tokens",
    "gemma4_unified_assistant": "reads another model's states, no tokens",
    "musicgen": "no text",
    "musicgen_melody": "no text",
}
# ProphetNet predicts several tokens at each place; Gemma 3 with images has its text's softcap in the config, unread.
REFUSED = {"prophetnet": "hidden states of shape", "gemma3": "makes other logits of its head's than softcap = 1.5"}
# Reformer has a backward in training mode alone, where it draws hashes; RWKV's eager one fails.
NO_BACKWARD = ("reformer", "rwkv")


@pytest.mark.parametrize("name", [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_BUILT])
def test_every_family(name):
    model, ids = families.build(name), families.token_ids()
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones(2, 7, dtype=torch.bool),
        "advantages": torch.tensor([1.0, -0.5]),
    }  # fmt: skip
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            token_logprobs_from_model(model, batch)
        return
    with torch.no_grad():
        torch.testing.assert_close(
            token_logprobs_from_model(model, batch).logprobs, logits_logprobs(model, batch), atol=5e-5, rtol=0
        )
    if name in NO_BACKWARD:
        return
    out = policy_loss_from_model(model, batch, ak.dapo(), aux_loss_coef=0.0)
    out.loss.backward()
    ours = tiny.gradients(model)
    expected = logits_loss(model, batch, ak.dapo())
    expected.loss.backward()
    theirs = tiny.gradients(model)
    torch.testing.assert_close(out.loss, expected.loss, atol=1e-5, rtol=1e-5)
    head = next(key for key, p in model.named_parameters() if p is model.get_output_embeddings().weight)
    assert (ours[head] - theirs[head]).abs().max() <= 1e-4 * theirs[head].abs().max()
    total, reference = (sum(g.norm() for g in gradients.values()) for gradients in (ours, theirs))
    assert abs(total - reference) <= 1e-3 * reference


# -- heads that no config describes -----------------------------------------------------------------------------------


class Normalised(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden / hidden.norm(dim=-1, keepdim=True))


def with_head(kind):
    model = tiny.build()
    head = kind(32, tiny.VOCABULARY, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def with_logits(change, **options):
    """A model whose own forward does something to the logits."""
    model = tiny.build(**options)

    class Changed(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    model.__class__ = Changed
    return model


def with_hook():
    model = tiny.build()
    model.lm_head.register_forward_hook(lambda module, args, output: 1.5 * output)
    return model


def masked(logits):
    logits[..., 4:6] = torch.finfo(logits.dtype).min
    return logits


UNREAD = {
    "head": (lambda: with_head(Normalised), "of their size from the product"),
    "hook": (with_hook, "hook of the head changes its output"),
    "scale": (lambda: with_logits(lambda logits: 1.01 * logits), "makes other logits"),
    "softcap": (lambda: with_logits(lambda logits: 100 * torch.tanh(logits / 100)), "makes other logits"),
    "mask": (lambda: with_logits(masked), "makes other logits"),
    "bias": (lambda: with_logits(lambda logits: logits + 0.01 * (torch.arange(28) == 7)), "makes other logits"),
    "cut": (lambda: with_logits(lambda logits: logits[..., :-3]), r"makes \[1, 2, 25\] of logits \[1, 2, 28\]"),
    "no logits": (lambda: with_logits(lambda logits: None), "makes NoneType of logits"),
    "detached": (lambda: with_logits(lambda logits: logits.detach()), "carry no gradient"),
}
ENTRIES = {
    "loss": lambda model, batch: policy_loss_from_model(model, batch, ak.dapo()),
    "logprobs": token_logprobs_from_model,
    "min_p": lambda model, batch: min_p_logprobs_from_model(model, batch, 0.1),
}


# Min-p log-probs have no gradient that a model could lose.
CASES = [(name, entry) for name in UNREAD for entry in ENTRIES if (name, entry) != ("detached", "min_p")]


@pytest.mark.parametrize(("name", "entry"), CASES)
def test_what_is_not_read_is_refused(name, entry):
    """In a plain loop too, and each time."""
    build, message = UNREAD[name]
    model = build()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            ENTRIES[entry](model, tiny.batch())
    if name != "detached":
        with pytest.raises(ValueError, match=message):
            check_head(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_low_precision(name, dtype):
    """Rounding is not refused; a softcap far above the logits is found all the same."""
    model, batch = tiny.build(name).to(dtype), tiny.batch()
    check_head(model)
    policy_loss_from_model(model, batch, ak.dapo(), head_dtype=torch.float32).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        token_logprobs_from_model(tiny.build(name), batch)
    capped = with_logits(lambda logits: 40 * torch.tanh(logits / 40), name="llama").to(dtype)
    with pytest.raises(ValueError, match="makes other logits"):
        token_logprobs_from_model(capped, batch)


def test_a_cast_of_the_heads_output_is_refused():
    model = tiny.build()
    model.lm_head.register_forward_hook(lambda module, args, output: output.bfloat16())
    with pytest.raises(ValueError, match=r"casts its output to torch.bfloat16"):
        token_logprobs_from_model(model, tiny.batch())


def test_a_special_head_by_swap_head():
    """Who knows better gives other keywords."""
    model, batch = with_head(lambda *sizes, **options: Doubled(*sizes, **options)), tiny.batch()
    targets = batch["input_ids"].roll(-1, 1)
    with torch.no_grad():
        expected = torch.log_softmax(model(batch["input_ids"]).logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)

        def compute(hidden, **head):
            return ak.linear_token_logprobs(hidden, targets=targets, **{**head, "logit_scale": 2.0})

        with swap_head(model, compute) as results:
            model(batch["input_ids"])
    torch.testing.assert_close(results[0].logprobs, expected, atol=2e-5, rtol=0)


class Doubled(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_number_that_is_none():
    model = tiny.build("multiplied")
    model.config.__dict__["logit_scale"] = "inv_sqrt_d_model"  # past the config's own check
    with pytest.raises(ValueError, match="logit_scale must be a number; got 'inv_sqrt_d_model'"):
        head_keywords(model)
    assert head_keywords(families.build("mpt", logit_scale="inv_sqrt_d_model"))["logit_scale"] == 1.0  # not read there


def test_a_head_is_checked_once(monkeypatch):
    """Once for what its config says and whether an adapter is on it; later uses wait for nothing."""
    from a3po_kernels.integrations import _lm_head

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model, batch = peft.get_peft_model(tiny.build("softcap"), config), tiny.batch()
    seen = []
    for name in ("check_product", "check_transform"):
        own = getattr(_lm_head, name)
        monkeypatch.setattr(_lm_head, name, lambda *args, name=name, own=own: (seen.append(name), own(*args)))
    both = ["check_product", "check_transform"]
    token_logprobs_from_model(model, batch)
    assert seen == both
    policy_loss_from_model(model, batch, ak.dapo())
    min_p_logprobs_from_model(model, batch, 0.1)
    assert seen == both
    with model.disable_adapter():
        token_logprobs_from_model(model, batch)
    assert seen == 2 * both
    model.config.final_logit_softcapping = 0.7
    token_logprobs_from_model(model, batch)
    assert seen == 3 * both
    check_head(model)
    assert seen == 4 * both


def test_check_head_leaves_every_mode():
    model = tiny.build().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    check_head(model)
    assert [module.training for module in model.modules()] == modes


def test_a_mixed_batch_of_adapters_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model, batch = peft.get_peft_model(tiny.build(), config).eval(), tiny.batch()
    with pytest.raises(ValueError, match="also gave adapter_names"):
        token_logprobs_from_model(model, {**batch, "adapter_names": ["default", "__base__"] * 2})


def test_a_model_that_gives_tuples():
    model, batch = tiny.build("softcap"), tiny.batch()
    expected = policy_loss_from_model(model, batch, ak.dapo())
    out = policy_loss_from_model(model, {**batch, "return_dict": False}, ak.dapo())
    assert torch.equal(out.loss, expected.loss)
    out.loss.backward()


def test_a_head_of_zeros():
    model = tiny.build()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert policy_loss_from_model(model, tiny.batch(), ak.dapo()).entropy.max() > 3.3


def test_results_may_be_changed_in_place():
    out = policy_loss_from_model(tiny.build(), tiny.batch(), ak.dapo())
    out.loss.mul_(2).backward()


def test_nothing_holds_the_model():
    model = tiny.build()
    policy_loss_from_model(model, tiny.batch(), ak.dapo()).loss.backward()
    gone = weakref.ref(model.lm_head)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("first", ["loss", "logits"])
def test_a_compiled_model_gives_logits_again(first):
    model, batch = tiny.build("softcap"), tiny.batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    if first == "logits":
        compiled(batch["input_ids"])
    for _ in range(2):
        policy_loss_from_model(compiled, batch, ak.dapo()).loss.backward()
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch["input_ids"]).logits, model(batch["input_ids"]).logits)
    changed = torch.compile(with_logits(lambda logits: 1.5 * logits), backend="eager")
    with pytest.raises(ValueError, match="makes other logits"):
        token_logprobs_from_model(changed, batch)
    torch._dynamo.reset()
