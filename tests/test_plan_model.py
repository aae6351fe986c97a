"""What a model multiplies, read from its config.json: by hand, for dense models, experts, towers, windows."""

from __future__ import annotations

import json

import pytest
import torch
from batches import INTERPRETED

from a3po_kernels.planning import CARDS, HeadStep, Model, assumed_model, make_plan, read_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="arithmetic, natively")
# Heads of 16, four of queries and two of keys: q and o 64 x 64, k and v 64 x 32; three matrices 64 x 128.
DENSE = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
ATTENTION, MLP = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 128


@pytest.fixture
def written(tmp_path):
    def write(entries) -> Model:
        (tmp_path / "config.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return read_model(tmp_path)

    return write


def test_a_dense_model(written):
    found = written(DENSE)
    assert (found.hidden, found.vocabulary, found.layers, found.dtype, found.tied) == (64, 1000, 2, None, None)
    assert found.parameters == 2 * (ATTENTION + MLP) and found.attention == 2 * 2 * 64
    # 100 tokens in rollouts of 10, each beside 5 earlier ones on average; forward 2, backward 4 operations a product.
    assert found.operations(100, 10) == 100 * 6 * (found.parameters + found.attention * 5)
    assert written({**DENSE, "head_dim": 32}).parameters == 2 * (2 * ATTENTION + MLP)
    without = {name: value for name, value in DENSE.items() if name != "num_key_value_heads"}
    assert written(without).parameters == 2 * (4 * 64 * 64 + MLP)  # as many of keys as of queries


def test_families(written):
    assert "of model_type None not checked, MLPs taken to have a gate" in written(DENSE).origin
    gated, ungated = (written({**DENSE, "model_type": family}) for family in ("qwen3", "gpt_neox"))
    assert gated.parameters == 2 * (ATTENTION + MLP) and ungated.parameters == 2 * (ATTENTION + 2 * 64 * 128)
    assert gated.origin.endswith("by config.json") and gated.origin == ungated.origin


def test_dtype_and_tied(written):
    assert written({**DENSE, "torch_dtype": "float16"}).dtype == torch.float16
    assert written({**DENSE, "dtype": "torch.bfloat16", "torch_dtype": "float32"}).dtype == torch.bfloat16
    assert written({**DENSE, "torch_dtype": "auto"}).dtype is None
    assert written({**DENSE, "dtype": None, "torch_dtype": "bfloat16"}).dtype == torch.bfloat16
    inner = {**DENSE, "dtype": None}
    assert written({"dtype": "float16", "text_config": inner}).dtype == torch.float16
    assert written({**DENSE, "tie_word_embeddings": True}).tied is True


def test_experts(written):
    """Two of eight experts of width 32 a token, and the router; the first layer dense."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    router = 64 * 8
    mixed = 3 * 64 * 2 * 32 + router
    assert written({**DENSE, **experts}).parameters == 2 * (ATTENTION + mixed)
    for dense in ({"mlp_only_layers": [0]}, {"first_k_dense_replace": 1}, {"decoder_sparse_step": 2}):
        assert written({**DENSE, **experts, **dense}).parameters == 2 * ATTENTION + MLP + mixed, dense
    # Mixtral's experts have the dense width, Qwen2's and DeepSeek's have some that every token meets.
    mixtral = {"num_local_experts": 8, "num_experts_per_tok": 2}
    assert written({**DENSE, **mixtral}).parameters == 2 * (ATTENTION + 2 * MLP + router)
    shared = {**experts, "shared_expert_intermediate_size": 16}
    assert written({**DENSE, **shared}).parameters == 2 * (ATTENTION + mixed + 3 * 64 * 16)
    deepseek = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    assert written({**DENSE, **deepseek}).parameters == 2 * (ATTENTION + mixed + 3 * 64 * 32)


def test_a_vision_language_model(written):
    """The language model's own entries, in text_config or in what holds that, over the file's."""
    plain = written(DENSE)
    outer = {"vision_config": {"hidden_size": 7}, "hidden_size": 9, "torch_dtype": "bfloat16", "text_config": DENSE}
    found = written(outer)
    assert found.dtype == torch.bfloat16 and found.parameters == plain.parameters and found.hidden == 64
    deeper = written({"thinker_config": {"text_config": DENSE}})
    assert (deeper.parameters, deeper.vocabulary) == (plain.parameters, 1000)


def test_latent_attention(written):
    latent = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
    found = written({**DENSE, **latent})
    queries = 12 * (64 + 4 * 10)
    rest = 64 * (8 + 4) + 8 * 4 * (6 + 5) + 4 * 5 * 64
    assert found.parameters == 2 * (queries + rest + MLP) and found.attention == 2 * 4 * (10 + 5)
    assert written({**DENSE, **latent, "q_lora_rank": None}).parameters == 2 * (64 * 40 + rest + MLP)


def test_windows(written):
    kinds = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
    found = written({**DENSE, **kinds})
    assert (found.attention, found.windowed, found.window) == (128, 128, 4)
    # Of 8 tokens the first 4 see 2 on average, the others 4: 3 in all.
    assert found.operations(80, 8) == 80 * 6 * (found.parameters + 128 * 4 + 128 * 3)
    assert found.operations(80, 2) == 80 * 6 * (found.parameters + 256 * 1)  # shorter than the window
    said = "every layer taken to see all tokens"
    assert said in written({**DENSE, "sliding_window": 4}).origin and said not in found.origin
    assert said not in written({**DENSE, "sliding_window": 4, "use_sliding_window": False}).origin


def test_layers_that_are_not_modelled(written):
    for other in ({"layer_types": ["linear_attention", "full_attention"]}, {"attn_layer_period": 8}):
        found = written({**DENSE, **other})
        assert found.parameters is None and "not modelled" in found.unknown and found.vocabulary == 1000
        with pytest.raises(ValueError, match="not modelled"):
            found.operations(10, 5)


def test_sizes_alone():
    assert assumed_model(64, 1000).parameters is None
    found = assumed_model(64, 1000, 3)
    assert (found.parameters, found.attention) == (3 * 12 * 64 * 64, 3 * 2 * 64)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({**DENSE, "vocab_size": None}, "config.json: vocab_size must be a whole number of 1 or more; got None"),
        ({**DENSE, "hidden_size": "64"}, "config.json: hidden_size must be a whole number .*; got '64'"),
        ({**DENSE, "num_hidden_layers": 0}, "num_hidden_layers must be a whole number of 1 or more; got 0"),
        ({**DENSE, "num_attention_heads": True}, "num_attention_heads must be a whole number"),
        ({**DENSE, "intermediate_size": None}, "intermediate_size must be a whole number"),
        ({**DENSE, "num_experts": 8}, "num_experts_per_tok must be a whole number"),
        ({**DENSE, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 3.5}, "moe_intermediate_size"),
        ({**DENSE, "layer_types": ["full_attention"]}, "layer_types must have num_hidden_layers = 2 entries; got 1"),
        ({**DENSE, "layer_types": ["sliding_attention"] * 2}, "sliding_window must be a whole number"),
        ({**DENSE, "layer_types": 3}, "layer_types must be a list; got 3"),
        ({**DENSE, "torch_dtype": "float8"}, "dtype must be one of bfloat16, .*; got 'float8'"),
        ({**DENSE, "tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false; got 'no'"),
        ([1], "model must be a config.json, an object; .* holds list"), ("{", "is no JSON"),
    ],
)  # fmt: skip
def test_what_is_refused(written, entries, message):
    with pytest.raises(ValueError, match=message):
        written(entries)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"model must be a config.json or a folder with one; got .*: No such file"):
        read_model(tmp_path)


def test_a_plan_of_another_card_or_head():
    step = HeadStep(64, 1000, 64)
    with pytest.raises(ValueError, match=r"^step must have device_memory = \d+, its card's; got 150000000000"):
        make_plan(step, CARDS["h100"], assumed_model(64, 1000))
    with pytest.raises(ValueError, match=r"^model must have a head of 1000 x 64, as step has; got 1000 x 32"):
        make_plan(step, CARDS["h200"], assumed_model(32, 1000))
    assert make_plan(step, CARDS["h200"], assumed_model(64, 1000)).share is None
