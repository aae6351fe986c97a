"""read_model of transformers' own configs: as many parameters as the models that transformers builds from them."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL  # noqa: E402

from a3po_kernels.planning import read_model  # noqa: E402
from a3po_kernels.planning.__main__ import main  # noqa: E402
from a3po_kernels.planning.model import GATED, UNGATED  # noqa: E402

pytestmark = pytest.mark.trl
SIZES = {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
MET, ALL = 2, 8  # experts
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
EXPERTS = {"num_experts_per_tok": MET, "moe_intermediate_size": 32}
CONFIGS = {
    "Llama": {}, "Mistral": {"sliding_window": None}, "Qwen2": {"tie_word_embeddings": True}, "Qwen3": {"head_dim": 32},
    "Gemma2": {"head_dim": 16}, "Gemma3Text": {"head_dim": 16},
    "Mixtral": {"num_local_experts": ALL, "num_experts_per_tok": MET},
    "Qwen3Moe": {"num_experts": ALL, **EXPERTS, "head_dim": 16, "mlp_only_layers": [1]},
    "Qwen2Moe": {"num_experts": ALL, **EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 2},
    "DeepseekV3": {"n_routed_experts": ALL, **EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, **LATENT},
    "GptOss": {"num_local_experts": ALL, "num_experts_per_tok": MET, "head_dim": 16},
}  # fmt: skip


EVERY = {"num_experts": ALL, "num_local_experts": ALL, "n_routed_experts": ALL, "num_experts_per_tok": MET}
TOWERS = {"qwen2_vl": {}, "qwen2_5_vl": {}, "gemma3": {"head_dim": 16}, "llava": {}, "mistral3": {},
          "qwen3_vl": {"head_dim": 16}, "qwen3_vl_moe": {"num_experts": ALL, **EXPERTS, "head_dim": 16}}  # fmt: skip


def met_by_a_token(model: torch.nn.Module, within: str = "") -> int:
    """Numbers of the layers' matrices, those of an expert by the share of experts that a token meets."""
    count = 0
    for name, parameter in model.named_parameters():
        if within not in name or ".layers." not in name or parameter.ndim < 2 or "bias" in name:
            continue
        if "shared_expert_gate" in name:
            continue  # one row
        count += parameter.numel() * MET // ALL if ".experts." in name else parameter.numel()
    return count


def built(config, kind=transformers.AutoModelForCausalLM) -> torch.nn.Module:
    with torch.device("meta"):
        return kind.from_config(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_entries_of_a_family(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(**SIZES, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    found, model = read_model(tmp_path), built(config)
    assert found.parameters == met_by_a_token(model) and "not checked" not in found.origin
    head = model.get_output_embeddings().weight
    assert tuple(head.shape) == (found.vocabulary, found.hidden)
    assert found.tied in (None, config.tie_word_embeddings)


@pytest.mark.parametrize("family", sorted((GATED | UNGATED) & set(CAUSAL)))
def test_every_family_that_is_said_to_be_checked(family, tmp_path):
    make = CONFIG_MAPPING[family]
    known = make().to_dict()  # its own entries: any other keyword would be kept as well
    sizes = {name: value for name, value in {**SIZES, **EVERY}.items() if name in known}
    config = make(**sizes)
    config.save_pretrained(tmp_path)
    found = read_model(tmp_path)
    assert found.parameters == met_by_a_token(built(config)) and "not checked" not in found.origin


@pytest.mark.parametrize("family", TOWERS)
def test_a_vision_language_model(family, tmp_path, capsys):
    text = {**SIZES, **TOWERS[family]}
    if family in ("llava", "mistral3"):
        text["model_type"] = {"llava": "llama", "mistral3": "mistral"}[family]
    config = CONFIG_MAPPING[family](text_config=text)
    config.save_pretrained(tmp_path)
    found = read_model(tmp_path)
    model = built(config, transformers.AutoModelForImageTextToText)
    assert found.parameters == met_by_a_token(model, "language_model") > 0 and "not checked" not in found.origin
    main(["--model", str(tmp_path), "--tokens", "100", "--dtype", "bf16"])
    assert "head: a3po, 1000 x 64, bfloat16" in capsys.readouterr().out


def test_no_family_is_said_to_be_checked_that_is_not():
    texts = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}  # of TOWERS
    assert (GATED | UNGATED) - set(CAUSAL) == texts and not GATED & UNGATED
