"""verl's Megatron engine with a split head: its output processor by ours, and who sums dHidden where it has none.

verl's head leaves each rank's part of dHidden to its caller, and no caller of verl's sums it but the gather of sequence
parallelism, in backward. Without sequence parallelism verl 0.9.1 trains the layers below on one rank's part.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor

from .megatron import HeadContext, output_processor

FUSED = "verl.models.mcore.model_forward_fused"
OVERLAP = "verl.models.mcore.model_forward_1f1b_overlap"

# What linear_cross_entropy leaves of dHidden, for the caller that runs.
grad_hidden: ContextVar[str] = ContextVar("grad_hidden", default="partial")


def replace_fused_forward(module: ModuleType) -> None:
    """Puts ours in the place of FUSED's processor (Megatron-Core 0.18), and tells the head who sums in its forward."""
    if getattr(module.fused_output_processor, "ours", False):
        return

    def fused_output_processor(
        *, hidden_states: Tensor, labels: Tensor, context: Any, config: Any, **given: Any
    ) -> Any:
        """verl's, by output_processor, which sums dHidden itself, with and without sequence parallelism.

        Raises:
            ValueError: as output_processor does, and for more than the one packed row that verl makes.
        """
        if labels is not None and labels.shape[0] != 1:
            raise ValueError(f"labels must be one packed row [1, S], as verl's; got {list(labels.shape)}")
        found = output_processor(
            hidden_states=hidden_states, labels=labels, context=HeadContext(temperature=context.temperature),
            config=config, **given,
        )  # fmt: skip
        output = module.CausalLMOutputForPPO(
            loss=None, logits=None, past_key_values=None, hidden_states=hidden_states, attentions=None
        )
        output.log_probs, output.entropy = found.logprobs[0], found.entropy[0]
        if module.has_config_logger_enabled(config):
            names = ("input_ids", "position_ids", "attention_mask", "decoder_input")
            payload = OrderedDict({name: given[name] for name in names})
            payload.update(logprobs=output.log_probs, entropy=output.entropy)
            module.log_config_to_disk(config, payload, prefix="input_and_logits")
        return output

    theirs = module._fused_GPTModel_forward

    @wraps(theirs)
    def forward(model: Any, *arguments: Any, **keywords: Any) -> Any:
        # It gathers under sequence parallelism, and in backward sums; else the head must.
        token = grad_hidden.set("partial" if model.config.sequence_parallel else "all_reduce")
        try:
            return theirs(model, *arguments, **keywords)
        finally:
            grad_hidden.reset(token)

    fused_output_processor.ours = True  # type: ignore[attr-defined]
    module.fused_output_processor = fused_output_processor  # type: ignore[attr-defined]
    module._fused_GPTModel_forward = forward  # type: ignore[attr-defined]


def guard_overlap(module: ModuleType) -> None:
    """OVERLAP calls the head where neither we nor it sum without sequence parallelism: refused."""
    theirs = module.gptmodel_forward_1f1b_overlap
    if getattr(theirs, "ours", False):
        return

    @wraps(theirs)
    def forward(model: Any, *arguments: Any, **keywords: Any) -> Any:
        config = module.unwrap_model(model).config
        if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            raise ValueError(
                f"verl's 1f1b overlap with tensor_model_parallel_size = {config.tensor_model_parallel_size} needs "
                "sequence_parallel=True: nothing else sums the gradient of the hidden states there"
            )
        return theirs(model, *arguments, **keywords)

    forward.ours = True  # type: ignore[attr-defined]
    module.gptmodel_forward_1f1b_overlap = forward  # type: ignore[attr-defined]


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls `then` with a module once that is imported, which without Megatron it never is."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]):
        self.name, self.then = name, then

    def install(self) -> None:
        """At once where the module is here; no second one of a name."""
        if self.name in sys.modules:
            self.then(sys.modules[self.name])
        elif not any(isinstance(finder, AfterImport) and finder.name == self.name for finder in sys.meta_path):
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            try:
                load(module)
            except BaseException:
                sys.meta_path.insert(0, self)  # for another try
                raise
            self.then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
