"""What the pages of docs/trainers/ touch of four frameworks, by path: the same modules, attributes, calls and order.

Read in prime-rl at 559b44772e47, slime at 624b824a898a, NeMo-RL at 7ea279abfbeb, Megatron-Core 0.19.2. Each framework's
own function is a stub that returns None: what a run prints was computed by ours, or it fails.
"""

from __future__ import annotations

import re

PRIME_RL = {
    "prime_rl/_compat.py": "patched = True",
    # train.py imports _compat before anything else, setup_model by name, and main reads sys.argv: ["@", trainer.json].
    "prime_rl/trainer/rl/train.py": '''
import prime_rl._compat
import sys
import torch
from prime_rl.trainer.model import forward, setup_model


def main():
    assert sys.argv[1] == "@" and sys.argv[2].endswith("trainer.json"), sys.argv
    torch.manual_seed(0)
    model = setup_model()
    input_ids, labels = torch.randint(0, 30, (2, 1, 6))
    temperatures = 0.5 + torch.rand(1, 6)
    out = forward(model, input_ids, None, labels=labels, temperature=temperatures)
    logits = model.model(input_ids).last_hidden_state @ model.lm_head.weight.t() / temperatures.unsqueeze(-1)
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(out["logprobs"], log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(out["entropy"], -(log_p.exp() * log_p).sum(-1))
    print("head", type(model.lm_head).__module__, model.wrapped)
''',
    # The head is injected, by the module's own name, before FSDP wraps the model.
    "prime_rl/trainer/model.py": '''
import sys
import types
from prime_rl.trainer.models.layers.lm_head import inject_prime_lm_head
from torch import nn

assert sys.modules["prime_rl._compat"].patched


class Body(nn.Embedding):
    def forward(self, input_ids):
        return types.SimpleNamespace(last_hidden_state=super().forward(input_ids))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.lm_head, self.wrapped = Body(30, 8), nn.Linear(8, 30, bias=False), False


def setup_model():
    model = Model()
    lm_head_chunk_size = 8192
    inject_prime_lm_head(model, chunk_size=lm_head_chunk_size)
    model.wrapped = True
    return model


def forward(model, input_ids, position_ids, *, labels=None, temperature=None):
    return model(input_ids=input_ids, position_ids=position_ids, labels=labels, temperature=temperature)
''',
    "prime_rl/trainer/models/layers/lm_head.py": '''
import types
from torch import nn


class FusedOutputLinear(nn.Linear):
    def __init__(self, in_features, out_features, chunk_size):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(self, hidden_states, labels=None, temperature=None):
        return None


def inject_prime_lm_head(model, chunk_size=None):
    weight = model.lm_head.weight
    model.lm_head = FusedOutputLinear(8, 30, chunk_size=chunk_size)
    model.lm_head.weight = weight

    def new_forward(self, input_ids=None, position_ids=None, labels=None, logits_to_keep=0, temperature=None):
        hidden_states = self.model(input_ids).last_hidden_state
        slice_indices = slice(None)
        return self.lm_head(
            hidden_states[:, slice_indices, :],
            labels[:, slice_indices] if labels is not None else None,
            temperature=temperature[:, slice_indices] if temperature is not None else None,
        )

    model.forward = types.MethodType(new_forward, model)
''',
}

SLIME = {
    "slime/utils/misc.py": '''
import importlib


def load_function(path):
    module_path, _, attr = path.rpartition(".")
    return getattr(importlib.import_module(module_path), attr)
''',
    "slime/utils/ppo_utils.py": '''
def calculate_log_probs_and_entropy(logits, tokens, tp_group, with_entropy=False, chunk_size=-1,
                                    log_prob_keep_mask=None, with_entropy_grad=True):
    return None
''',
    "slime/backends/megatron_utils/loss.py": '''
from slime.utils.ppo_utils import calculate_log_probs_and_entropy


def get_log_probs_and_entropy(logits, *, args, tokens, tp_group, with_entropy, top_p_keep_mask=None):
    chunk_size = args.log_probs_chunk_size
    with_entropy_grad = with_entropy and getattr(args, "entropy_coef", 0.0) != 0
    log_prob_full, entropy_full = calculate_log_probs_and_entropy(
        logits,
        tokens,
        tp_group,
        with_entropy=with_entropy,
        with_entropy_grad=with_entropy_grad,
        chunk_size=chunk_size,
        log_prob_keep_mask=top_p_keep_mask,
    )
    return log_prob_full.squeeze(-1), entropy_full
''',
    "slime/backends/megatron_utils/initialize.py": '''
def init(args):
    if getattr(args, "custom_megatron_init_path", None):
        from slime.utils.misc import load_function

        custom_init = load_function(args.custom_megatron_init_path)
        custom_init(args)
''',
    # The actor has imported the scoring function by name before init runs.
    "actor.py": '''
from argparse import Namespace
from slime.backends.megatron_utils.initialize import init
from slime.backends.megatron_utils.loss import get_log_probs_and_entropy
import torch

args = Namespace(custom_megatron_init_path="a3po_slime.swap", log_probs_chunk_size=-1, entropy_coef=0.01)
init(args)
torch.manual_seed(0)
logits, tokens = torch.randn(5, 30, requires_grad=True), torch.randint(0, 30, (5,))
for with_entropy in (False, True):
    logprobs, entropy = get_log_probs_and_entropy(
        logits, args=args, tokens=tokens, tp_group=None, with_entropy=with_entropy
    )
    log_p = torch.log_softmax(logits, -1)
    torch.testing.assert_close(logprobs, log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1))
    assert (entropy is not None) is with_entropy
torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1))
(logprobs.sum() + entropy.sum()).backward()
print("gradient", bool(logits.grad.norm() > 0))
''',
}

NEMO_RL = {
    "nemo_rl/distributed/model_utils.py": '''
def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states, output_weight_layer, runtime_gather_output, target, vocab_start_index,
    vocab_end_index, tp_group, inference_only=False, cp_group=None, chunk_size=None,
):
    return None


def gpt_forward_with_linear_ce_fusion(hidden_states, output_weight_layer, labels, tp_group, cp_group, chunk_size):
    vocab_start_index, vocab_end_index = 0, output_weight_layer.shape[0]
    return from_parallel_hidden_states_to_logprobs(
        hidden_states,
        output_weight_layer,
        None,
        labels,
        vocab_start_index=vocab_start_index,
        vocab_end_index=vocab_end_index,
        inference_only=False,
        tp_group=tp_group,
        cp_group=cp_group,
        chunk_size=chunk_size,
    )
''',
    "worker.py": '''
import tempfile
import torch
import torch.distributed as dist
from nemo_rl.distributed.model_utils import gpt_forward_with_linear_ce_fusion

dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/rendezvous", rank=0, world_size=1)
torch.manual_seed(0)
hidden, weight = torch.randn(6, 2, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
ids = torch.randint(0, 30, (2, 6))
found = gpt_forward_with_linear_ce_fusion(hidden, weight, ids, dist.group.WORLD, dist.group.WORLD, 4)
log_p = torch.log_softmax((hidden @ weight.t()).transpose(0, 1), -1)[:, :-1]
torch.testing.assert_close(found, log_p.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1))
found.sum().backward()
print("gradient", bool(weight.grad.norm() > 0))
dist.destroy_process_group()
''',
}

# megatron_stand_in.Model under the names and the keywords of Megatron-Core.
MEGATRON = {
    "megatron/core/__init__.py": "",
    "megatron/core/parallel_state.py": '''
import torch.distributed as dist

groups = {}


def initialize_model_parallel(tensor_model_parallel_size=1):
    assert tensor_model_parallel_size == dist.get_world_size()
    groups["data"] = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def get_data_parallel_group():
    return groups["data"]


def get_data_parallel_rank():
    return 0
''',
    "megatron/core/distributed.py": '''
from torch import nn


class DistributedDataParallelConfig:
    pass


class DistributedDataParallel(nn.Module):
    def __init__(self, config, ddp_config, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs, **kwargs):
        return self.module(*inputs, **kwargs)

    def zero_grad_buffer(self):
        for parameter in self.parameters():
            parameter.grad = parameter.main_grad = None


def finalize_model_grads(model):
    for parameter in model[0].parameters():
        parameter.main_grad, parameter.grad = parameter.grad, None
''',
    "megatron/core/models/gpt/__init__.py": '''
import torch
from tests.megatron_stand_in import Model


class GPTModel(Model):
    def __init__(self, *, config, transformer_layer_spec, vocab_size, max_sequence_length, position_embedding_type,
                 share_embeddings_and_output_weights):
        H, normal = config.hidden_size, torch.randn
        whole = {"embedding": normal(vocab_size, H), "body": normal(H, H) / 8, "head": normal(vocab_size, H) / 8}
        super().__init__(whole, share_embeddings_and_output_weights, config.sequence_parallel)

    def forward(self, input_ids, position_ids, attention_mask, labels, output_processor, output_processor_context):
        return super().forward(
            input_ids, labels, output_processor=output_processor, output_processor_context=output_processor_context
        )
''',
    "megatron/core/models/gpt/gpt_layer_specs.py": "def get_gpt_layer_local_spec(): ...",
    "megatron/core/tensor_parallel.py": "def model_parallel_cuda_manual_seed(seed): ...",
    "megatron/core/transformer/transformer_config.py": '''
class TransformerConfig:
    sequence_parallel = False

    def __init__(self, **options):
        vars(self).update(options)
''',
}


def printed_losses(printed: str) -> list[float]:
    """Of the lines that the script of docs/trainers/megatron.md prints, with metrics behind them."""
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+) \{.*'entropy': ", printed, re.MULTILINE)]
