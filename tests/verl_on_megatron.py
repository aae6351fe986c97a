"""verl's modules for Megatron, on gloo ranks, with as much of Megatron-Core put in its place as they import."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from torch import Tensor


class GatherSequence(torch.autograd.Function):
    """Megatron's gather_from_sequence_parallel_region: backward is a reduce-scatter."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        mine = grad.new_empty(grad.shape[0] // dist.get_world_size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, grad)
        return mine


STAND_INS = {
    "megatron": {},
    "megatron.core": {"__version__": "0.18.0", "tensor_parallel": MagicMock()},
    "megatron.core.parallel_state": {"get_tensor_model_parallel_group": lambda: dist.group.WORLD},
    "megatron.core.config_logger": dict.fromkeys(("has_config_logger_enabled", "log_config_to_disk"), MagicMock()),
    "megatron.core.inference": {},
    "megatron.core.inference.contexts": {"BaseInferenceContext": object},
    "megatron.core.models": {},
    "megatron.core.models.common": {},
    "megatron.core.models.common.model_chunk_schedule_plan": {"TransformerModelChunkSchedulePlan": object},
    "megatron.core.models.gpt": {},
    "megatron.core.models.gpt.gpt_model": {"GPTModel": object},
    "megatron.core.packed_seq_params": {"PackedSeqParams": object},
    "megatron.core.tensor_parallel": {},
    "megatron.core.tensor_parallel.mappings": {"gather_from_sequence_parallel_region": GatherSequence.apply},
    "megatron.core.utils": {"deprecate_inference_params": lambda a, b: a, "make_viewless_tensor": MagicMock()},
    "verl.utils.megatron_utils": {"unwrap_model": lambda model: model},
    "verl.models.mcore.util": dict.fromkeys(
        """build_vlm_attn_mask_thd preprocess_packed_seqs preprocess_thd_engine postprocess_packed_seqs_for_dict_output
        postprocess_thd_engine postprocess_packed_seqs""".split()
    ),
}


def put_in_place() -> None:
    """In this process, for good."""
    import verl

    for name, contents in STAND_INS.items():
        module = sys.modules[name] = ModuleType(name)
        module.__path__ = []
        vars(module).update(contents)
    sys.modules["megatron.core"].parallel_state = sys.modules["megatron.core.parallel_state"]
    package = sys.modules["verl.models.mcore"] = ModuleType("verl.models.mcore")  # whose own imports all the models
    package.__path__ = [str(Path(verl.__file__).parent / "models" / "mcore")]


def load(name: str) -> ModuleType:
    return importlib.import_module(f"verl.models.mcore.{name}")


class OldModel(torch.nn.Module):
    """What verl's forward for Megatron-Core below 0.18 reads of a GPTModel; the decoder gives `hidden`."""

    post_process, mtp_process = True, False

    def __init__(self, weight: Tensor, tied: bool, sequence_parallel: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.config = SimpleNamespace(sequence_parallel=sequence_parallel)
        self.output_layer = SimpleNamespace(weight=None if tied else self.weight)
        self.embedding = SimpleNamespace(word_embeddings=SimpleNamespace(weight=self.weight if tied else None))

    def _preprocess(self, decoder_input, **_):
        return (decoder_input, *[None] * 5)

    def decoder(self, hidden_states, **_):
        return hidden_states
