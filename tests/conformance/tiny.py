"""Tiny random models, a character tokenizer and a prompt dataset, for the tests of the integrations."""

from __future__ import annotations

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CHARACTERS = "0123456789+-=., abcdefgh"
VOCABULARY = 4 + len(CHARACTERS)
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


def _bias(model):
    """A head with a bias, which no small family of transformers has by default."""
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.linspace(-1.0, 1.0, head.weight.shape[0]))
    return model


# The heads that families of transformers have.
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "bias": lambda: _bias(LlamaForCausalLM(LlamaConfig(**SIZES))),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{k: v for k, v in SIZES.items() if "key_value" not in k})),
    "moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE)),
}


def save(root, *names: str):
    """Models as a user has them, in folders of their names with the tokenizer; gives root."""
    for name in names:
        build(name).save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    return root


def build(name: str = "llama", seed: int = 0):
    """A model with random weights large enough that its predictions differ from uniform."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *CHARACTERS]
    characters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


def batch(rollouts: int = 4, prompt: int = 5, response: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """What policy_loss_from_model takes: left-padded prompts, responses of several lengths, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (rollouts, prompt + response), generator=generator)
    attention = torch.ones_like(ids)
    attention[1, :2] = 0
    mask = torch.ones(rollouts, response, dtype=torch.bool)
    mask[1, 4:], mask[2] = False, False
    attention[:, prompt:] = mask
    return {
        "input_ids": ids.masked_fill(attention == 0, 0), "attention_mask": attention, "completion_mask": mask,
        "advantages": torch.linspace(-1.0, 1.5, rollouts),
    }  # fmt: skip


def gradients(model) -> dict[str, torch.Tensor]:
    """Of every parameter that has one; they are taken off the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
