"""Tiny random models of the causal LM families of transformers, from each family's own config class."""

from __future__ import annotations

import inspect

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 60
# What families call their sizes, and what those are here.
SIZES = {
    VOCABULARY: "vocab_size n_tokens vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd embedding_size emb_dim embedding_dim backbone_hidden_size lru_width dim",
    48: "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim n_inner dff d_ff d_inner dim_ff "
        "shared_intermediate_size shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "
       "num_decoder_layers depth num_key_value_heads num_kv_heads num_experts_per_tok moe_topk top_k top_k_experts "
       "moe_k n_shared_experts num_blocks",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
       "num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim linear_num_heads",
    8: "head_dim attention_head_dim v_head_dim kv_lora_rank q_lora_rank qk_nope_head_dim linear_key_head_dim "
       "linear_value_head_dim dim_head index_head_dim rotary_dim hidden_size_per_layer_input global_head_dim "
       "linear_head_dim",
    16: "moe_intermediate_size expert_ffn_hidden_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len",
    1: "n_group topk_group bos_token_id",
    0: "pad_token_id",
}  # fmt: skip
# What is done to logits, or looks like it; none has the value that leaves them as they are.
TRANSFORMS = {
    "logit_scale": 0.4, "output_multiplier": 0.4, "lm_head_multiplier": 0.4, "logits_scaling": 2.5,
    "logits_mup_width_multiplier": 2.5, "final_logit_softcapping": 1.5, "logits_soft_cap": 1.5,
    "output_logit_soft_cap": 1.5, "unpadded_vocab_size": VOCABULARY - 4,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "num_hidden_layers": 4}
# Where sizes depend on one another.
OWN = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bailing_hybrid": {"num_hidden_layers": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_chunk_size": 16, "num_hidden_layers": 2},
    "gemma4_unified_vision": {"mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "jamba": {"num_hidden_layers": 8},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 4},
    "longcat_flash": {"qk_rope_head_dim": 8},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 2},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen4_exp_text": {"num_hidden_layers": 4, "indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_n_heads": 4,
                       "indexer_kv_heads": 1, "indexer_head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 40, "shape_vocab_size": 40},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(name: str, **own):
    kind = CONFIG_MAPPING[name]
    fields = inspect.signature(kind.__init__).parameters
    given = {field: size for size, spelled in SIZES.items() for field in spelled.split() if field in fields}
    given |= {field: value for field, value in TRANSFORMS.items() if field in fields}
    if "eos_token_id" in fields:
        given["eos_token_id"] = 2
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        given["num_key_value_heads"] = 4
    for field, part in getattr(kind, "sub_configs_defaults", {}).items():
        if part.model_type in CONFIG_MAPPING:
            given[field] = tiny_config(part.model_type)
    return kind(**{**given, **OWN.get(name, {}), **own})


def build(name: str, **own):
    """A model in fp32 whose head gives values of a size that every transform changes."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **own), dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    sizes = []
    handle = head.register_forward_hook(lambda module, args, output: sizes.append(output.std()))
    with torch.no_grad():
        for _ in range(2):  # again, since a tied head's weight is the embedding too
            model(input_ids=token_ids())
            head.weight.mul_(2.0 / sizes[-1])
    handle.remove()
    return model


def token_ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY - 5, (2, 12), generator=torch.Generator().manual_seed(0))
