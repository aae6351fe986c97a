"""The model around the head, from its config.json or by assumption: what its forward and backward multiply."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Where models of several towers keep the language model's own entries.
NESTED = ("thinker_config", "text_config", "language_config", "llm_config")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
RECURRENT = ("ssm_cfg", "mamba_d_state", "attn_layer_period", "layers_block_type", "hybrid_override_pattern")
# Families (model_type) whose parameters were counted: their MLP has a gate, three matrices, or none, two.
GATED = frozenset(
    "bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3 diffllama ernie4_5 exaone4 gemma gemma2 "
    "gemma3_text glm4_moe gpt_oss granite granitemoe granitemoeshared hyperclovax internlm3 llama minicpm3 minimax_m2 "
    "ministral3 mistral mixtral olmo olmo2 olmo3 olmoe phimoe qwen2 qwen2_moe qwen2_vl_text qwen2_5_vl_text qwen3 "
    "qwen3_moe qwen3_vl_text qwen3_vl_moe_text seed_oss solar_open stablelm vaultgemma youtu".split()
)
UNGATED = frozenset("apertus arcee gpt_neox jais2 nanochat nemotron persimmon phi starcoder2".split())
FULL, WINDOW = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Model:
    """hidden, vocabulary: H and V of its head; layers: None where unknown; dtype: as its config says, or None.

    tied: whether the head is the embedding, None where nothing says so. parameters: those that multiply one token,
    without embedding and head (of experts the ones that a token meets); None where they are not known, for the reason
    in `unknown`. attention, windowed: numbers that a token's products with each earlier token multiply, in layers that
    see all of them and in layers that see `window`. origin: what these rest on.
    """

    hidden: int
    vocabulary: int
    layers: int | None = None
    dtype: torch.dtype | None = None
    tied: bool | None = None
    parameters: int | None = None
    attention: int = 0
    windowed: int = 0
    window: int = 0
    unknown: str = ""
    origin: str = ""

    def operations(self, tokens: int, length: int) -> int:
        """Of forward and backward of so many tokens in rollouts of this length, causal, nothing formed again."""
        if self.parameters is None:
            raise ValueError(self.unknown)
        seen = min(length, self.window)
        keys = self.attention * length / 2 + (self.windowed * seen * (1 - seen / (2 * length)) if seen else 0)
        return round(tokens * (6 * self.parameters + 6 * keys))


def assumed_model(hidden: int, vocabulary: int, layers: int | None = None) -> Model:
    """Of a width and layers alone: 12 H^2 parameters a layer, and attention as wide as the hidden states."""
    if layers is None:
        return Model(hidden, vocabulary, unknown="neither --model nor --layers says what the model is")
    if layers < 1:
        raise ValueError(f"layers must be positive; got {layers}")
    return Model(
        hidden, vocabulary, layers, None, None, 12 * hidden * hidden * layers, 2 * hidden * layers,
        origin="12 H^2 parameters a layer assumed",
    )  # fmt: skip


class _Entries:
    """The entries of a config that were asked for must be of their kind."""

    def __init__(self, path: Path, entries: dict[str, Any]):
        self.path, self.entries = path, entries

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.entries.get(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{self.path}: {name} must be a whole number of {least} or more; got {value!r}")
        return value

    def listed(self, name: str) -> list[Any]:
        value = self.entries.get(name)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{self.path}: {name} must be a list; got {value!r}")
        return value or []

    def one_of(self, *names: str) -> str | None:
        return next((name for name in names if self.entries.get(name) is not None), None)


def _merged(path: Path) -> dict[str, Any]:
    """The language model's entries over the file's own."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"model must be a config.json or a folder with one; got {path}: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"model must be a config.json; {path} is no JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"model must be a config.json, an object; {path} holds {type(entries).__name__}")
    found = True
    while found:
        found = False
        for name in NESTED:
            if isinstance(entries.get(name), dict):
                inner = entries.pop(name)
                told = {key: value for key, value in inner.items() if value is not None or key not in entries}
                entries, found = {**entries, **told}, True
    return entries


def _dtype(entries: dict[str, Any], path: Path) -> torch.dtype | None:
    words = (entries.get(name) for name in ("dtype", "torch_dtype"))
    word = next((found for found in words if found is not None), None)
    if word is None or word == "auto":
        return None
    key = str(word).removeprefix("torch.")
    if key not in DTYPES:
        raise ValueError(f"{path}: dtype must be one of {', '.join(DTYPES)}; got {word!r}")
    return DTYPES[key]


def _attention(entries: _Entries, hidden: int) -> tuple[int, int]:
    """(parameters of a layer's attention, numbers that meet each earlier token: its heads' keys and values)."""
    heads = entries.whole("num_attention_heads")
    if entries.one_of("kv_lora_rank") is not None:  # latent attention
        rank, query = entries.whole("kv_lora_rank"), entries.one_of("q_lora_rank")
        turned, plain = entries.whole("qk_rope_head_dim"), entries.whole("qk_nope_head_dim")
        value = entries.whole("v_head_dim")
        wide = heads * (turned + plain)
        ask = hidden * wide if query is None else entries.whole("q_lora_rank") * (hidden + wide)
        latent = hidden * (rank + turned) + rank * heads * (plain + value)
        return ask + latent + heads * value * hidden, heads * (turned + plain + value)
    groups = entries.whole("num_key_value_heads", heads)
    size = entries.whole("head_dim", max(hidden // heads, 1))
    return 2 * hidden * size * (heads + groups), 2 * heads * size


def _mlp_widths(entries: _Entries, layers: int) -> Iterator[tuple[int, int]]:
    """(width of what a token meets, experts to choose from) of each layer."""
    dense = entries.entries.get("intermediate_size")
    name = entries.one_of(*EXPERTS)
    experts = 0 if name is None else entries.whole(name)
    if experts <= 1:
        width = entries.whole("intermediate_size")
        yield from ((width, 0) for _ in range(layers))
        return
    width = entries.whole("moe_intermediate_size", dense)
    met = entries.whole("num_experts_per_tok") * width + entries.whole("n_shared_experts", 0, 0) * width
    met += entries.whole("shared_expert_intermediate_size", 0, 0)
    first, every = entries.whole("first_k_dense_replace", 0, 0), entries.whole("decoder_sparse_step", 1)
    plain = set(entries.listed("mlp_only_layers"))
    for layer in range(layers):
        if layer < first or layer in plain or (layer + 1) % every:
            yield entries.whole("intermediate_size"), 0
        else:
            yield met, experts


def read_model(path: str | Path) -> Model:
    """The model of a Hugging Face config.json, or of the folder that holds one, read as JSON.

    A vision-language model's is its text model. The parameters of a family that was not checked are by the entries
    that most share, and `origin` says so; layers of a kind that is not known (linear attention) leave them unknown.
    Raises ValueError with the file and the entry for one that is missing or of another kind.
    """
    path = Path(path)
    path = path / "config.json" if path.is_dir() else path
    raw = _merged(path)
    entries = _Entries(path, raw)
    hidden, vocabulary, layers = (entries.whole(n) for n in ("hidden_size", "vocab_size", "num_hidden_layers"))
    tied = raw.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise ValueError(f"{path}: tie_word_embeddings must be true or false; got {tied!r}")
    known = (hidden, vocabulary, layers, _dtype(raw, path), tied)
    if (other := entries.one_of(*RECURRENT)) is not None:
        return Model(*known, unknown=f"{path}: layers by {other} are not modelled")
    kinds = entries.listed("layer_types") or [FULL] * layers
    if strange := sorted({str(kind) for kind in kinds} - {FULL, WINDOW}):
        return Model(*known, unknown=f"{path}: layer_types of {', '.join(strange)} are not modelled")
    if len(kinds) != layers:
        raise ValueError(f"{path}: layer_types must have num_hidden_layers = {layers} entries; got {len(kinds)}")
    attention, keys = _attention(entries, hidden)
    widths = list(_mlp_widths(entries, layers))
    family = raw.get("model_type")
    matrices = 2 if family in UNGATED else 3
    parameters = layers * attention + sum(matrices * hidden * width + hidden * experts for width, experts in widths)
    windows = kinds.count(WINDOW)
    origin = f"{parameters / 1e9:.2f} G parameters that a token meets, by {path.name}"
    if family not in GATED and family not in UNGATED:
        origin += f"; of model_type {family!r} not checked, MLPs taken to have a gate"
    if raw.get("sliding_window") and not raw.get("layer_types") and raw.get("use_sliding_window") is not False:
        origin += "; no layer_types: every layer taken to see all tokens"
    window = entries.whole("sliding_window") if windows else 0
    return Model(*known, parameters, keys * (layers - windows), keys * windows, window, origin=origin)
