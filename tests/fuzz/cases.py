"""One random case: its entry, arguments and options, all drawn from the seed and the case's number."""

from __future__ import annotations

import torch

from .batch import draw_batch
from .case import LOW, Case, Draw, legal_targets
from .objectives import draw_objective

ENTRIES = {
    "policy_loss": 34, "linear_policy_loss": 38, "logprob_policy_loss": 8, "token_logprobs": 5,
    "linear_token_logprobs": 7, "min_p_token_logprobs": 2, "linear_min_p_token_logprobs": 2, "select_tokens": 3,
    "group_advantages": 1,
}  # fmt: skip
LINEAR = ("linear_policy_loss", "linear_token_logprobs", "linear_min_p_token_logprobs")
WITH_OBJECTIVE = ("policy_loss", "linear_policy_loss", "logprob_policy_loss")


def draw(seed: int, index: int, backend: str) -> Case:
    """Case `index` of a seed; a backend's cases are its own, since the interpreter's are smaller."""
    d = Draw(seed, index if backend == "torch" else -1 - index)
    entry = d.rng.choices(list(ENTRIES), ENTRIES.values())[0]
    weights = (40, 25, 20, 15) if backend == "torch" else (30, 50, 12, 8)
    dtype = d.rng.choices((torch.float64, torch.float32, *LOW), weights)[0]
    case = Case(seed, index, backend, entry, dtype)
    if entry == "group_advantages":
        _draw_groups(d, case)
        return case
    _draw_layout(d, case)
    _draw_tokens(d, case)
    if entry in LINEAR:
        _draw_head(d, case)
    elif entry != "select_tokens":
        _draw_logits(d, case)
    if entry == "select_tokens":
        _draw_selection(d, case)
    elif entry in WITH_OBJECTIVE:
        case.spec = draw_objective(d.rng)
        draw_batch(d, case)
    if entry in ("min_p_token_logprobs", "linear_min_p_token_logprobs"):
        case.options["min_p"] = d.pick(0.02, 0.3, 1.0)
    if d.chance(0.3):
        case.options["validate"] = d.chance(0.5)
    if entry == "policy_loss" and d.chance(0.01):
        _break_a_row(d, case)
    case.mended = d.chance(0.8)
    case.factor = d.pick(1.0, 1.0, 1.5, -0.5, 64.0, 1.0 if case.broken else 0.0) if d.chance(0.95) else 1e-3
    return case


def _break_a_row(d: Draw, case: Case) -> None:
    """NaN or +inf in the logits of a token that has an advantage: whatever depends on them must be NaN."""
    values = case.advantages.double()
    if values.shape == (len(case.boundaries) - 1,):
        values = values.repeat_interleave(torch.tensor(case.boundaries).diff())
    rows = (case.tokens & (values.reshape(-1) != 0)).nonzero()[:, 0].tolist()
    if rows and float(case.keywords.get("denominator", 1.0)):
        at = torch.unravel_index(torch.tensor(d.pick(*rows)), case.shape)
        case.logits[(*at, d.rng.randrange(case.vocabulary))] = d.pick(torch.nan, torch.inf)
        case.broken = True


def _draw_groups(d: Draw, case: Case) -> None:
    count = d.pick(0, 1, 2, 5, 12)
    kind = d.pick("normal", "binary", "equal")
    rewards = d.normal(count) if kind == "normal" else d.true(0.5, count).double()
    rewards = torch.full((count,), 0.1, dtype=torch.float64) if kind == "equal" else rewards
    case.keywords["rewards"] = rewards.to(case.dtype)
    case.keywords["group_ids"] = torch.randint(-3, 3, (count,), generator=d.generator, dtype=torch.int32)
    case.options["normalize"] = d.pick("std", "none")


def _draw_layout(d: Draw, case: Case) -> None:
    small = case.backend == "triton"
    if d.chance(0.5):
        batch = d.pick(0, 1, 2, 3, 3, 4) if not small else d.pick(0, 1, 2, 2)
        length = d.pick(0, 1, 3, 5, 7, 9) if not small else d.pick(0, 1, 3, 4)
        if d.chance(0.7):
            batch, length = max(batch, 2), max(length, 3)
        case.shape, case.boundaries = (batch, length), [length * i for i in range(batch + 1)]
    else:
        rollouts = d.pick(0, 1, 2, 3, 4, 5) if not small else d.pick(0, 1, 2, 3)
        lengths = [d.pick(0, 1, 2, 4, 6, 8) if not small else d.pick(0, 1, 3) for _ in range(rollouts)]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        case.shape, case.boundaries = (sum(lengths),), ends.tolist()
        case.keywords["cu_seqlens"] = ends.to(d.pick(torch.int32, torch.int64))
    case.vocabulary = d.pick(1, 2, 5, 17, 32, 37, 64, 70, 130) if d.chance(0.3) else d.pick(17, 37, 64)
    if case.entry in LINEAR and d.chance(0.3):
        case.vocabulary = d.pick(70, 130, 200)  # more than the 64 columns of the narrowest tile


def _draw_tokens(d: Draw, case: Case) -> None:
    """Mask, targets, and which rows are tokens."""
    shape = case.shape
    kind = d.pick("none", "bool", "bool", "number")
    mask = torch.ones(shape, dtype=torch.bool) if kind == "none" else d.true(d.pick(0.0, 0.6, 0.85, 0.85, 1.0), *shape)
    if kind == "number":
        case.keywords["mask"] = mask.to(d.pick(torch.int64, torch.int32, torch.uint8, torch.float32, torch.float64))
    elif kind == "bool":
        case.keywords["mask"] = mask
    ignore = d.pick(-100, -100, -1, 0, case.vocabulary - 1, case.vocabulary + 3)
    targets = torch.randint(0, case.vocabulary, shape, generator=d.generator)
    ignored = d.true(d.pick(0.0, 0.1, 0.3), *shape)
    if case.entry in ("token_logprobs", "linear_token_logprobs", "min_p_token_logprobs", "linear_min_p_token_logprobs"):
        ignored = ignored | ~mask  # they take no mask
        case.keywords.pop("mask", None)
        case.keywords.pop("cu_seqlens", None)
        mask = torch.ones(shape, dtype=torch.bool)
    targets = targets.masked_fill(ignored, ignore)
    if case.entry not in ("select_tokens", "logprob_policy_loss"):
        mask = mask & (targets != ignore)
        case.options["ignore_index"] = ignore
    # Where the mask is 0 the target may be anything.
    outside = (case.keywords["mask"] == 0) if "mask" in case.keywords else torch.zeros(shape, dtype=torch.bool)
    targets = torch.where(outside & d.true(0.3, *shape), case.vocabulary + 7, targets)
    case.targets, case.tokens = targets.to(d.pick(torch.int32, torch.int64)), mask.reshape(-1)


def _draw_transform(d: Draw, case: Case) -> None:
    options, dtype = case.options, case.compute_dtype
    if case.entry in ("min_p_token_logprobs", "linear_min_p_token_logprobs"):
        pass
    elif d.chance(0.4):
        kind, value = d.pick("float", "0-d", "per token"), d.pick(0.6, 1.0, 1.7)
        if kind == "per token":
            options["temperature"] = (0.5 + torch.rand(case.shape, generator=d.generator)).to(dtype)
        else:
            options["temperature"] = value if kind == "float" else torch.tensor(value, dtype=dtype)
    if d.chance(0.25):
        options["softcap"] = d.pick(1.5, 4.0, 30.0)
    if d.chance(0.25):
        options["logit_scale"] = d.pick(0.5, 1.3)


def _draw_logits(d: Draw, case: Case) -> None:
    """The logits, in a spelling of strides; NaN, mostly, where no token is. logprob_policy_loss has none."""
    _draw_transform(d, case)
    if case.entry == "logprob_policy_loss":
        for name in ("temperature", "softcap", "logit_scale"):
            case.options.pop(name, None)
    vocabulary = case.vocabulary
    logits = d.pick(0.1, 2.0, 2.0, 6.0) * d.normal(*case.shape, vocabulary)
    equal = bool(logits.numel()) and d.chance(0.1)  # equal rows tie in every metric
    if equal:
        logits = logits[(0,) * len(case.shape)].expand(logits.shape).clone()
    if vocabulary > 1 and d.chance(0.15):
        off = d.true(0.2, vocabulary).expand(logits.shape) if equal else d.true(0.2, *logits.shape)
        _, targets = legal_targets(case)
        hit = torch.zeros(logits.shape, dtype=torch.bool).scatter_(-1, targets.unsqueeze(-1), True)
        hit = hit.reshape(-1, vocabulary).any(0).expand(logits.shape) if equal else hit
        # A target at -inf has a log-prob, but no finite loss.
        off = off if case.entry not in WITH_OBJECTIVE and d.chance(0.3) and not equal else off & ~hit
        logits = logits.masked_fill(off, -torch.inf)
    if d.chance(0.7):
        logits = logits.masked_fill(~case.tokens.view(case.shape).unsqueeze(-1), torch.nan)
    case.logits = logits.to(case.dtype)
    case.spelling = d.pick("plain", "plain", "transposed", "wider", "every other row", "leading transposed")
    if case.entry in ("policy_loss", "token_logprobs"):
        case.options["inplace_backward"] = d.chance(0.3)
        case.wanted = ("logits",) if d.chance(0.93) else ()
    if case.entry == "policy_loss":
        case.options["route"] = d.pick("auto", "two-stage", "one-launch", "one-launch")
    case.module = d.chance(0.1)


def _draw_head(d: Draw, case: Case) -> None:
    width, columns = d.pick(1, 4, 6, 8), case.vocabulary + d.pick(0, 0, 3)
    options, head = case.options, case.head
    other = torch.float32 if case.dtype in LOW and d.chance(0.3) else case.dtype
    hidden = d.normal(*case.shape, width)
    if d.chance(0.7):
        hidden = hidden.masked_fill(~case.tokens.view(case.shape).unsqueeze(-1), torch.nan)
    head["hidden"] = hidden.to(case.dtype)
    head["weight"] = (d.pick(0.1, 0.5, 1.0) * d.normal(columns, width)).to(other)
    if d.chance(0.4):
        bias = d.normal(columns)
        head["bias"] = bias.to(d.pick(case.dtype, case.dtype, torch.float32))
    if d.chance(0.3):
        rank = d.pick(1, 2)
        head["lora A"] = (0.5 * d.normal(rank, width)).to(case.dtype)
        head["lora B"] = (0.5 * d.normal(columns, rank)).to(case.dtype)
        case.lora_scale = d.pick(0.5, 2.0, 1.0)
    if columns > case.vocabulary or d.chance(0.1):
        options["vocab_size"] = case.vocabulary
    if d.chance(0.15):
        options["head_dtype"] = torch.float64 if case.dtype == torch.float64 else torch.float32
    _draw_transform(d, case)
    if case.entry != "linear_min_p_token_logprobs" and d.chance(0.95):
        case.wanted = tuple(name for name in head if d.chance(0.8)) or ("hidden",)
    case.main_grad = "weight" in case.wanted and d.chance(0.2)
    item = torch.empty((), dtype=case.head_dtype).element_size()
    row = case.vocabulary * item
    options["max_chunk_bytes"] = d.pick(None, 1, row, 3 * row, 5 * row, 9 * row, 16 * row, 100)
    compactions = ("auto", "exact", "none", "number")
    compaction = d.pick(*compactions)
    count = case.tokens.numel()
    options["compaction"] = max(count + d.pick(-1, 0, 3), 1) if compaction == "number" else compaction
    if case.entry == "linear_policy_loss":
        options["route"] = d.pick("auto", "auto", "recompute", "one-pass")
        options["statistics"] = d.pick("all", "all", "active")
        case.plan, case.uncounted = d.chance(0.25), d.chance(0.3)
        if case.plan and d.chance(0.9) and (compaction == "none" or case.backend == "triton"):
            options["compaction"] = d.pick("auto", "exact")
        case.module = d.chance(0.1)


def _draw_selection(d: Draw, case: Case) -> None:
    values = d.normal(*case.shape)
    if d.chance(0.5):
        values = (2 * values).round() / 2  # ties, and zeros of both signs
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=torch.float64)
    chosen = special[torch.randint(0, 4, case.shape, generator=d.generator)]
    values = torch.where(d.true(d.pick(0.0, 0.2), *case.shape), chosen, values)
    case.keywords["metric"] = values.to(case.dtype)
    case.options.update(
        ratio=d.pick(0.01, 0.2, 0.29, 1 / 3, 0.5, 0.9, 1.0), side=d.pick("low", "high"),
        scope=d.pick("rollout", "batch", "global"), rounding=d.pick("floor", "ceil"),
    )  # fmt: skip
    if len(case.shape) == 1 and d.chance(0.2):
        case.keywords.pop("cu_seqlens")
        case.boundaries = [0, case.shape[0]]
