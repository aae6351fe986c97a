"""linear_policy_loss: hidden states and the head's weight to loss and gradient; the logits never exist whole."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.checks import compute_dtype
from ..core.layout import token_layout
from ..core.tiles import default_chunk_bytes
from ..core.transform import Transform
from ..objectives import Objective, TokenRule
from ..ops.linear_min_p import linear_min_p_unchecked
from ..ops.linear_token_logprobs import (
    EVERY,
    EXACT,
    Lora,
    check_head_rows,
    head_statistics_unchecked,
    read_compaction,
    read_head,
    split_rows,
)
from ..ops.surrogate import token_counts
from ..ops.token_logprobs import check_targets
from ..schedules import Value
from .one_pass import attach, one_pass, plan_chunks
from .stages import (
    PolicyLossOutput,
    TokenBatch,
    check_objective,
    check_token_arguments,
    loss_scale,
    policy_output,
    reads_current,
    shape,
    token_batch,
    token_terms,
)

ROUTES = ("auto", "one-pass", "recompute")


def _reads(objective: Objective, batch: TokenBatch) -> str:
    """Whose statistics the gradient of a token depends on: the "token"'s own, its "rollout"'s or the "batch"'s."""
    current = [rule for rule in objective.shaping if isinstance(rule, TokenRule) and reads_current(rule, batch)]
    if any(rule.scope != "rollout" for rule in current) or (current and objective.normalize_over == "selected"):
        return "batch"
    return "rollout" if current or objective.ratio_level == "sequence" else "token"


def _possible(objective: Objective, batch: TokenBatch, weights: Tensor | None) -> Tensor:
    """Bool [N]: the tokens whose own terms may have a gradient, from what is known before any logit is."""
    possible = batch.tokens if weights is None else batch.tokens & (weights != 0)
    if objective.kl_coef == 0 and objective.entropy_coef == 0:
        possible = possible & (batch.advantages != 0)
    return possible


def _spread(flags: Tensor, batch: TokenBatch, unit: str) -> Tensor:
    """The tokens that share a unit with a flagged one."""
    if unit == "token":
        return flags
    if unit == "batch":
        return batch.tokens
    some = token_counts(flags, flags.to(batch.advantages.dtype), batch.offsets)[0] > 0
    rows = torch.arange(flags.numel(), device=flags.device)
    rollout = (torch.searchsorted(batch.offsets, rows, right=True) - 1).clamp(max=max(some.numel() - 1, 0))
    return batch.tokens & some[rollout] if some.numel() else batch.tokens


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    objective: Objective,
    bias: Tensor | None = None,
    vocab_size: int | None = None,
    lora: Lora | None = None,
    main_grad: Tensor | None = None,
    max_chunk_bytes: int | None = None,
    route: str = "auto",
    compaction: str | int = "auto",
    statistics: str = "all",
    head_dtype: torch.dtype | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    polarity: Tensor | None = None,
    old_entropy: Tensor | None = None,
    min_p_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    step: Value = 0,
    denominator: Tensor | float | None = None,
    max_length: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    validate: bool = False,
    backend: str = "auto",
) -> PolicyLossOutput:
    """policy_loss of the logits hidden @ weight.T + bias, which never exist as a whole.

    Args:
        hidden: [B, T, H], or [N, H] with cu_seqlens; row i predicts targets[i].
        weight, bias, vocab_size, lora, main_grad, max_chunk_bytes, compaction, head_dtype: as in linear_token_logprobs.
        route: "one-pass" forms the logits of a chunk of rows once, with their gradient in place; it needs all that a
            token's coefficients depend on in one chunk: nothing but the token, or whole rollouts (a rollout-wide ratio,
            a selection by the current policy), or the batch. Its gradient is scaled by the incoming one in backward,
            which therefore runs once. "recompute" takes the statistics first and forms the logits of the rows that
            have a gradient again in backward. "auto": one-pass where it is possible, else recompute; a number of
            rows as compaction takes recompute.
        statistics: "all" tokens, or "active": only those that may have a gradient, or that one with a gradient
            depends on; the others never meet the weight. Their log-probs and entropy are 0, and the metrics are means
            over the computed tokens (token_count and active_fraction are of all of them). With a number of rows as
            compaction these must fit as well, else everything is NaN.
        The rest: as in policy_loss.

    Returns:
        PolicyLossOutput as policy_loss gives; route is "one-pass", "recompute", or "statistics" where nothing requires
        a gradient.

    Raises:
        ValueError, TypeError, IndexError: as policy_loss does, and for route="one-pass" where a chunk cannot hold what
            it must.
        RuntimeError: on a double backward; on a second backward of the one-pass route.
    """
    check_objective(objective)
    head = read_head(hidden, weight, bias, lora, vocab_size, main_grad, head_dtype)
    if hidden.ndim != (3 if cu_seqlens is None else 2):
        expected = "[N, H] with cu_seqlens" if cu_seqlens is not None else "[B, T, H]"
        hint = "; packed hidden states [N, H] need cu_seqlens" if cu_seqlens is None and hidden.ndim == 2 else ""
        raise ValueError(f"hidden must have shape {expected}; got {list(hidden.shape)}{hint}")
    check_head_rows(
        head, targets, tuple(hidden.shape[:-1]), temperature, softcap, logit_scale, max_chunk_bytes, compaction, backend
    )
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}; got {route!r}")
    if statistics not in ("all", "active"):
        raise ValueError(f"statistics must be 'all' or 'active'; got {statistics!r}")
    layout = token_layout("targets", targets, cu_seqlens, validate=validate)
    check_token_arguments(
        layout, objective, advantages, old_logprobs, ref_logprobs, polarity, old_entropy, min_p_logprobs,
        importance_weights, step, denominator, max_length,
    )  # fmt: skip
    keep = layout.flat_mask(mask)
    targets = targets.reshape(-1)
    if keep is not None:
        targets = torch.where(keep, targets, ignore_index)
    check_targets(targets, head.vocabulary, ignore_index, validate)
    tokens = targets != ignore_index

    transform = Transform.of(temperature, softcap, logit_scale, ignore_index)
    max_bytes = max_chunk_bytes or default_chunk_bytes(hidden.device)
    chosen = read_compaction(compaction, hidden.device, backend)
    if chosen > 0 and route == "one-pass":
        raise ValueError("route='one-pass' takes compaction 'exact' or 'none'; a number of rows needs 'recompute'")
    exact = EXACT if chosen == EXACT else EVERY
    batch = token_batch(
        layout, tokens, compute_dtype(head.dtype), advantages, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        polarity=polarity, old_entropy=old_entropy, min_p_logprobs=min_p_logprobs,
        importance_weights=importance_weights,
    )  # fmt: skip
    if objective.low_probability is not None and min_p_logprobs is None:
        candidates = torch.where(batch.advantages < 0, targets, ignore_index)
        kappa = objective.low_probability.min_p
        proxy = linear_min_p_unchecked(head, candidates, kappa, transform, max_bytes, exact, backend)
        batch = replace(batch, proxy=proxy)

    reads = _reads(objective, batch)
    known = not any(isinstance(rule, TokenRule) and reads_current(rule, batch) for rule in objective.shaping)
    shaped = shape(objective, batch, None, step, backend) if known else None
    possible = _possible(objective, batch, None if shaped is None else shaped.weights)
    computed = tokens if statistics == "all" else _spread(possible, batch, reads)
    computed_targets = torch.where(computed, targets, ignore_index)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in head.parameters)

    chunks = None
    if any(wanted) and route != "recompute" and chosen <= 0 and not torch.compiler.is_compiling():
        unit = "batch" if objective.low_probability is not None else reads
        mine = _spread(possible, batch, unit)
        rows, rest = (None, None) if exact == EVERY else split_rows(mine, computed & ~mine)
        chunks = plan_chunks(
            head, batch.offsets, rows, unit, layout.shape[1] if layout.padded else None, max_bytes
        )  # fmt: skip
        if chunks is None and route == "one-pass":
            raise ValueError(
                f"route='one-pass' needs a chunk that holds a whole {unit}; max_chunk_bytes = {max_bytes} does not"
            )
    if chunks is not None and chunks.tiles.total_rows:
        batch = replace(batch, tokens=computed)

        def scale_of(weights: Tensor) -> Tensor:
            return loss_scale(objective, layout, tokens, weights, denominator, max_length)

        # A selection of the current policy drops no token from the divisor, or the batch is one chunk.
        weights = tokens.to(batch.advantages.dtype) if shaped is None else shaped.weights
        scale = scale_of if unit == "batch" and shaped is None else scale_of(weights)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            found = one_pass(
                head, objective, batch, computed_targets, transform, chunks, rest, shaped, scale, step, wanted,
                max_bytes, backend,
            )  # fmt: skip
        loss = attach(found.loss, found.gradients, rows, main_grad, head)
        return policy_output(layout, loss, found.stats, found.shaped, found.sums, tokens, "one-pass")

    # Few rows are computed of "active" ones alone.
    forward_rows = chosen if statistics == "active" else exact
    stats = head_statistics_unchecked(
        head, computed_targets, transform, main_grad, max_bytes, forward_rows, chosen, backend
    )
    batch = replace(batch, tokens=computed)
    shaped = shape(objective, batch, stats, step, backend) if shaped is None else shaped
    scale = loss_scale(objective, layout, tokens, shaped.weights, denominator, max_length)
    terms = token_terms(objective, batch, stats, shaped, scale, backend)
    taken = "recompute" if any(wanted) else "statistics"
    return policy_output(layout, terms.loss, stats, shaped, terms.sums, tokens, taken)


class LinearPolicyLoss(nn.Module):
    """linear_policy_loss as a module: the objective and the keywords given here are fixed, the batch comes by call.

    Call it as linear_policy_loss(hidden, weight, targets, advantages, **the rest); a call may override the keywords.
    """

    def __init__(self, objective: Objective, **options):
        super().__init__()
        check_objective(objective)
        known = set(linear_policy_loss.__kwdefaults__ or ())
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(f"unexpected keyword {unknown[0]!r}; linear_policy_loss takes {', '.join(sorted(known))}")
        self.objective = objective
        self.options = options

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, **batch) -> PolicyLossOutput:
        return linear_policy_loss(
            hidden, weight, targets, advantages, **{"objective": self.objective, **self.options, **batch}
        )

    def extra_repr(self) -> str:
        return f"{self.objective}"
