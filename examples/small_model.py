"""A character tokenizer for a task and the small model that learns it."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token a character, behind the four special ones."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    by_character = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    by_character.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=by_character, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left",
    )  # fmt: skip


@dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    layers: int


LARGE = Size(128, 384, 4)  # 0.86 million parameters
SMALL = Size(64, 192, 2)  # 0.11 million


def model(tokens: PreTrainedTokenizerFast, size: Size = LARGE) -> LlamaForCausalLM:
    """A Llama of random parameters."""
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        initializer_range=0.08, pad_token_id=tokens.pad_token_id, bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)
