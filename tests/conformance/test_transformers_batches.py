"""integrations.transformers: a batch's entries are read, or refused by name; packed rollouts through swap_head."""

from __future__ import annotations

import re

import pytest
import torch

import a3po_kernels as ak

pytest.importorskip("transformers")
pytest.importorskip("trl")  # marks the environment: make test-trl
import tiny

from a3po_kernels.integrations.transformers import (
    min_p_logprobs_from_model,
    plan_rows_from_batch,
    policy_loss_from_model,
    swap_head,
    token_logprobs_from_model,
)

pytestmark = pytest.mark.trl

MODEL, BATCH = tiny.build(), tiny.batch()
OLD = torch.full((4, 7), -3.3)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("old_per_token_logps", "read neither by the loss nor by LlamaForCausalLM.forward: here it is 'old_logprobs'"),
        ("old_log_prob", "here it is 'old_logprobs'"),
        ("ref_per_token_logps", "here it is 'ref_logprobs'"),
        ("response_mask", "here it is 'completion_mask'"),
        ("importance_sampling_ratio", "here it is 'importance_weights'"),
        ("old_logprob", r"did you mean 'old_logprobs'\?"),
        ("Polarity", r"did you mean 'polarity'\?"),
        ("position_id", r"did you mean 'position_ids'\?"),
        ("quite_another", "the loss reads input_ids, attention_mask, completion_mask, advantages, old_logprobs"),
        ("labels", "completion_mask says which of them are tokens; leave it out"),
        ("num_items_in_batch", "is the keyword denominator= of the call"),
        ("step", "is a keyword of the call"),
        ("prompt_ids", r"input_ids is torch.cat\("),
        ("sampling_per_token_logps", "rollout_correction makes importance_weights of it"),
        ("cu_seqlens", r"packed rollouts .*swap_head\(model, lambda"),
        ("cu_seq_lens_q", "packed rollouts"),
    ],
)
def test_entries_that_nobody_reads(key, message):
    batch = {**BATCH, key: OLD}
    for call in (
        lambda: policy_loss_from_model(MODEL, batch, "a3po"), lambda: token_logprobs_from_model(MODEL, batch),
        lambda: min_p_logprobs_from_model(MODEL, batch, 0.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"^batch\['{key}'\].*{message}"):
            call()


def test_entries_of_the_model_go_to_it():
    """Named in its forward, or in the typed dictionary of its **kwargs; None is nothing."""
    plain = policy_loss_from_model(MODEL, BATCH, "dapo")
    places = (BATCH["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    more = {"position_ids": places, "output_attentions": False, "labels": None, "old_logprobs": None}
    torch.testing.assert_close(policy_loss_from_model(MODEL, {**BATCH, **more}, "dapo").loss, plain.loss)
    with pytest.raises(ValueError, match="did you mean 'old_logprobs'"):
        policy_loss_from_model(torch.compile(MODEL, backend="eager"), {**BATCH, "old_logprob": OLD}, "dapo")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"advantages": ...}, TypeError, "batch must have 'advantages'; it has input_ids, attention_mask, compl"),
        ({"input_ids": ...}, TypeError, "batch must have 'input_ids'"),
        ({"advantages": [1.0] * 4}, TypeError, r"batch\['advantages'\] must be a tensor; got list"),
        ({"old_logprobs": [-1.0]}, TypeError, r"batch\['old_logprobs'\] must be a tensor; got list"),
        ({"completion_mask": torch.full((4, 7), 0.5)}, ValueError, r"batch\['completion_mask'\] must be bool or .*0.5"),
        (
            {"completion_mask": torch.tensor([[0.0] * 6 + [float("-inf")]] * 4)}, ValueError,
            r"batch\['completion_mask'\] .*; got -inf: an additive mask",
        ),
        ({"completion_mask": torch.tensor([[-100, 5, 3]] * 4)}, ValueError, "these look like labels"),
        ({"position_ids": torch.tensor([[*range(7), *range(5)]] * 4)}, ValueError, "begin anew within a row: packed"),
        ({"old_logprobs": OLD.exp() + 0.5}, ValueError, "old_logprobs must be log-probs in nats"),
    ],
)  # fmt: skip
def test_entries_that_are_wrong(change, error, message):
    batch = {name: value for name, value in {**BATCH, **change}.items() if value is not ...}
    if "position_ids" in change:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    with pytest.raises(error, match=message):
        policy_loss_from_model(MODEL, batch, "a3po")


def test_a_plan_by_name_of_a_batch_without_advantages():
    assert plan_rows_from_batch(BATCH, "dapo").objective == ak.dapo()
    with pytest.raises(TypeError, match=r"batch must have 'advantages'; is it 'advantage'\?"):
        plan_rows_from_batch({"completion_mask": BATCH["completion_mask"], "advantage": BATCH["advantages"]}, "dapo")


@pytest.mark.parametrize("objective", ["a3po", "gspo"])
def test_packed_rollouts(objective):
    """As the docstring of policy_loss_from_model writes it: loss and gradients of the padded batch."""
    batch = {**BATCH, "old_logprobs": OLD}
    padded = policy_loss_from_model(MODEL, batch, objective, step=3)
    padded.loss.backward()
    expected = tiny.gradients(MODEL)

    seen = batch["attention_mask"].bool()
    prompt = seen.shape[1] - OLD.shape[1]
    lengths = seen.sum(-1)
    ids, position_ids = batch["input_ids"][seen][None], (seen.cumsum(-1) - 1)[seen][None]
    mask = torch.cat([torch.zeros(4, prompt, dtype=torch.bool), batch["completion_mask"]], 1)[seen][None]
    old = torch.cat([torch.zeros(4, prompt), OLD], 1)[seen]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ends = cu_seqlens.clone()
    ends[1:] -= 1
    with swap_head(MODEL, lambda hidden, **head: ak.linear_policy_loss(
        hidden[0, :-1], targets=ids[0, 1:], mask=mask[0, 1:], cu_seqlens=ends, advantages=batch["advantages"],
        old_logprobs=old[1:], objective=objective, step=3, **head,
    )) as results:  # fmt: skip
        MODEL(input_ids=ids, position_ids=position_ids, use_cache=False)
    results[0].loss.backward()
    torch.testing.assert_close(results[0].loss, padded.loss, atol=1e-6, rtol=1e-5)
    for name, gradient in tiny.gradients(MODEL).items():
        assert (gradient - expected[name]).abs().max() <= 2e-5 * expected[name].abs().max() + 1e-8, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: policy_loss_from_model(BATCH, MODEL, "a3po"), "got dict: model and batch are the wrong way round"),
        (lambda: policy_loss_from_model("gpt2", BATCH, "a3po"), "model must be a causal LM of transformers; got str"),
        (lambda: policy_loss_from_model(MODEL, ak.a3po(), BATCH), "got Objective: it comes before the objective"),
        (lambda: token_logprobs_from_model(MODEL, [1]), "batch must be a mapping of names to tensors; got list"),
        (lambda: policy_loss_from_model(MODEL, BATCH, "a3po", mask=OLD), "mask is no keyword here: it is batch['compl"),
        (lambda: policy_loss_from_model(MODEL, BATCH, "a3po", old_logprobs=OLD), "it is batch['old_logprobs']"),
        (lambda: token_logprobs_from_model(MODEL, BATCH, softcap=3.0), "softcap is no keyword here: it is read from"),
        (lambda: min_p_logprobs_from_model(MODEL, BATCH, 0.1, targets=OLD), "it is the last columns of batch['input"),
        (
            lambda: policy_loss_from_model(MODEL, {**BATCH, "input_ids": BATCH["input_ids"].float()}, "a3po"),
            "batch['input_ids'] must be int32 or int64; got torch.float32",
        ),
    ],
)
def test_calls_the_wrong_way_round(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_an_attention_mask_of_the_responses_alone():
    batch = {**BATCH, "attention_mask": BATCH["completion_mask"]}
    with pytest.raises(ValueError, match=r"attention_mask'\] must have shape .* of prompts and responses; got"):
        policy_loss_from_model(MODEL, batch, "a3po")
