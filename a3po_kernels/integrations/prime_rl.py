"""prime-rl 0.8: its fused head (src/prime_rl/trainer/models/layers/lm_head.py, lm_head_gemma.py) by our linear head.

And our objectives as its custom loss (src/prime_rl/trainer/rl/loss.py).

Read at commit 559b44772e471d1538537b8805cc77f3824a5e64: inject_prime_lm_head puts a FusedOutputLinear in model.lm_head,
for a softcap a GemmaFusedOutputLinear, and a model.forward that calls it with labels and a temperature a token. Before
its trainer builds the model:

    from prime_rl.trainer import model
    model.inject_prime_lm_head = swapping(model.inject_prime_lm_head)

The loss is a setting of its trainer:

    [trainer.loss]
    type = "custom"
    import_path = "a3po_kernels.integrations.prime_rl.policy_loss"
    kwargs = { objective = "a3po", rho = 2.0 }

Nothing of prime-rl is imported.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..core.checks import is_dtensor
from ..losses.logprobs import logprob_policy_loss
from ..objectives import CustomSurrogate, Objective, TokenRule, Vespo
from ..ops.linear_token_logprobs import linear_token_logprobs
from ._presets import build_objective
from ._steps import OptimizerSteps

__all__ = ["LossOutputs", "OutputLinear", "policy_loss", "swap_head", "swapping"]

_LOGGED = (
    "approx_kl", "ratio_mean", "ratio_max", "clip_fraction_low", "clip_fraction_high", "dual_clip_fraction",
    "selected_fraction_positive", "selected_fraction_negative", "active_fraction", "weight",
)  # fmt: skip


class LossInputs(Protocol):
    """What prime-rl hands a custom loss of one rollout, each [seq]: see policy_loss."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None


class LossOutputs(NamedTuple):
    """What prime-rl reads of a custom loss. loss: 0-d, a sum over tokens. metrics: 0-d tensors of one rollout."""

    loss: Tensor
    metrics: dict[str, Tensor]


@functools.cache
def _steps() -> OptimizerSteps:
    """The count, from the first loss on, when prime-rl has made its optimizer."""
    steps = OptimizerSteps()
    offload = getattr(sys.modules.get("prime_rl.trainer.optim.offload"), "FullCPUOffloadOptimizer", None)
    if offload is not None:  # its kernels step no optimizer of torch, whose hook would tell
        own = offload.step

        @functools.wraps(own)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = own(self, *args, **kwargs)
            steps.advance()
            return result

        offload.step = step
    return steps


def policy_loss(inputs: LossInputs, objective: str | Objective = "a3po", **options: Any) -> LossOutputs:
    """An objective as prime-rl's custom loss: of one rollout, the sum over its tokens, which the trainer divides.

    The behaviour policy is the inference engine. prime-rl divides by the tokens of the whole step, so the aggregation
    is "token-mean", and calls once a rollout, so rules select within it. prime-rl tells no step: schedules count
    optimizer steps that follow this loss, from the environment variable A3PO_INITIAL_STEP on.

    Args:
        inputs: prime-rl's LossInputs of a rollout, each [seq]: trainer_logprobs and inference_logprobs (nats),
            ref_logprobs or None, advantages, loss_mask (bool), loss_weights (constant factors of the tokens' losses, at
            least 0) or None.
        objective: a preset's name (the kwargs of a configuration hold no objects) or an Objective.
        options: the preset's keywords, as in a3po(rho=...); none beside an Objective.

    Returns:
        LossOutputs: loss 0-d, metrics by the names of PolicyLossOutput's (approx_kl, ratio_mean, ratio_max, the clip
        and selected fractions, active_fraction, weight).

    Raises:
        ValueError: an unknown objective or option; another aggregation, normalize_over="selected", what reads the batch
            or an entropy, which one rollout's log-probs do not show; loss_weights with a term beside the surrogate (KL,
            log_ratio_coef) or VESPO's factor, which they would not weigh.
    """
    chosen = _objective(objective, options)
    if inputs.loss_weights is not None:
        _check_weighable(chosen)
    steps = _steps()

    def row(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.unsqueeze(0)

    out = logprob_policy_loss(
        inputs.trainer_logprobs.unsqueeze(0), inputs.advantages.unsqueeze(0), objective=chosen,
        old_logprobs=row(inputs.inference_logprobs), ref_logprobs=row(inputs.ref_logprobs) if chosen.kl_coef else None,
        mask=row(inputs.loss_mask), importance_weights=row(inputs.loss_weights), denominator=1.0, step=steps.step,
    )  # fmt: skip
    steps.pending |= inputs.trainer_logprobs.requires_grad
    return LossOutputs(out.loss, {name: out.metrics[name] for name in _LOGGED})


def _check_weighable(chosen: Objective) -> None:
    """Raises ValueError for an objective of which importance weights do not scale the whole loss of a token."""
    terms = {"kl_coef": chosen.kl_coef, "log_ratio_coef": chosen.log_ratio_coef}
    terms["VESPO's factor"] = any(isinstance(weight, Vespo) for weight in chosen.ratio_weights)
    for name, there in terms.items():
        if there:
            raise ValueError(
                f"loss_weights scale a token's whole loss, and {name} is not in what is weighed here: leave it out, or "
                "train without weights"
            )


def _objective(objective: str | Objective, options: dict[str, Any]) -> Objective:
    """The objective, if one rollout at a time shows all that it reads."""
    if isinstance(objective, Objective):
        if options:
            raise ValueError(f"{next(iter(options))} is an option of the presets; set it on the Objective given")
        chosen = objective
    else:
        chosen = build_objective(objective, options)
    if chosen.aggregation != "token-mean":
        raise ValueError(
            f"prime-rl divides by the tokens of a step: the objective's aggregation must be 'token-mean'; got "
            f"{chosen.aggregation!r}"
        )
    if chosen.normalize_over == "selected":
        raise ValueError("normalize_over='selected' is not what prime-rl divides by: normalize_over must be 'all'")
    scopes = [rule.scope for rule in chosen.shaping if isinstance(rule, TokenRule)]
    if isinstance(chosen.surrogate, CustomSurrogate):
        scopes.append(chosen.surrogate.depends_on)
    for scope in scopes:
        if scope not in ("rollout", "token"):
            raise ValueError(f"the objective reads the {scope}, and prime-rl shows its loss one rollout at a time")
    return chosen


class OutputLinear(nn.Linear):
    """A head without a bias that gives log-probs and entropy in the logits' place.

    Args:
        in_features, out_features: H and V. softcap: cap of the logits, before the temperature; None: none.
        max_chunk_bytes: budget of the tile of logits that exists at a time, in the place of prime-rl's chunk_size;
            None: linear_token_logprobs' default.
        device, dtype: of the weight.

    Its forward raises ValueError without labels or temperature, or where one has another shape.
    """

    def __init__(
        self, in_features: int, out_features: int, softcap: float | None = None, max_chunk_bytes: int | None = None,
        device=None, dtype=None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.softcap, self.max_chunk_bytes = softcap, max_chunk_bytes

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, labels: Tensor | None = None, temperature: Tensor | None = None
    ) -> dict[str, Tensor]:
        """prime-rl's PrimeLmOutput, with log-probs and entropy.

        Args:
            hidden_states: [B, S, H]. labels: [B, S], int64: position i is scored for labels[i]; -100 gives 0 and no
                gradient. temperature: [B, S], positive: what the logits of a position are divided by.

        Returns:
            {"logprobs", "entropy"}: [B, S], fp32, nats, of the tempered distribution; both differentiable (prime-rl's
            own entropy is not).

        Raises:
            ValueError: without labels or temperature, or of another shape. IndexError: a label outside the vocabulary,
                on the CPU; on a GPU its log-prob is NaN.
        """
        for name, value in (("labels", labels), ("temperature", temperature)):
            if value is None or value.shape != hidden_states.shape[:-1]:
                got = "None" if value is None else list(value.shape)
                raise ValueError(f"{name} must have shape {list(hidden_states.shape[:-1])}, one a position; got {got}")
        assert labels is not None and temperature is not None
        stats = linear_token_logprobs(
            hidden_states, self.weight, labels, temperature=temperature, softcap=self.softcap,
            max_chunk_bytes=self.max_chunk_bytes,
        )  # fmt: skip
        return {"logprobs": stats.logprobs, "entropy": stats.entropy}


def swap_head(model: nn.Module, max_chunk_bytes: int | None = None) -> OutputLinear:
    """Puts an OutputLinear in the place of the fused head that inject_prime_lm_head gave a model; returns it.

    It has the same weight, tied or not, and the softcap. Before FSDP wraps the model.

    Args:
        model: one that inject_prime_lm_head was called on with a chunk_size.
        max_chunk_bytes: budget of the tile of logits that exists at a time; None: linear_token_logprobs' default.

    Raises:
        ValueError: model.lm_head is no fused head of prime-rl, has a bias, hooks or a weight that is sharded already.
    """
    head = getattr(model, "lm_head", None)
    if not isinstance(head, nn.Linear) or not hasattr(head, "chunk_size"):
        raise ValueError(
            "model.lm_head must be a fused head of prime-rl, which inject_prime_lm_head(model, chunk_size=...) puts "
            f"there; got {type(head).__name__}"
        )
    if head.bias is not None:
        raise ValueError("model.lm_head must have no bias, as prime-rl's heads; it has one")
    if is_dtensor(head.weight) or head._forward_pre_hooks or head._forward_hooks:
        raise ValueError(
            "model.lm_head has hooks or a sharded weight, which another module would not have: swap it before FSDP "
            "wraps the model"
        )
    ours = OutputLinear(
        head.in_features, head.out_features, getattr(head, "softcap", None), max_chunk_bytes, device="meta"
    )
    ours.weight = head.weight
    model.lm_head = ours.train(head.training)
    return ours


def swapping(inject: Callable[..., None], max_chunk_bytes: int | None = None) -> Callable[..., None]:
    """prime-rl's inject_prime_lm_head with our head in the place of its fused one.

    With chunk_size=None (the configuration's fused_lm_head_token_chunk_size is off) prime-rl asks for logits: its own
    head stays.

    Args:
        inject: prime-rl's inject_prime_lm_head.
        max_chunk_bytes: budget of the tile of logits that exists at a time; None: linear_token_logprobs' default.

    Returns:
        A function of inject's arguments, which raises ValueError for a head that swap_head refuses.
    """

    def inject_prime_lm_head(model: nn.Module, chunk_size: int | None = None) -> None:
        inject(model, chunk_size=chunk_size)
        if isinstance(chunk_size, int):
            swap_head(model, max_chunk_bytes)

    return inject_prime_lm_head
