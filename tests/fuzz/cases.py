"""One random case: its entry, arguments and options, all drawn from the seed and the case's number."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .objectives import Made, draw_objective

ENTRIES = {
    "policy_loss": 34, "linear_policy_loss": 38, "logprob_policy_loss": 8, "token_logprobs": 5,
    "linear_token_logprobs": 7, "min_p_token_logprobs": 2, "linear_min_p_token_logprobs": 2, "select_tokens": 3,
    "group_advantages": 1,
}  # fmt: skip
LINEAR = ("linear_policy_loss", "linear_token_logprobs", "linear_min_p_token_logprobs")
WITH_OBJECTIVE = ("policy_loss", "linear_policy_loss", "logprob_policy_loss")
LOW = (torch.bfloat16, torch.float16)


class Draw:
    """The random choices of one case: Python's for words, torch's for arrays."""

    def __init__(self, seed: int, index: int):
        self.rng = random.Random(f"{seed}:{index}")
        self.generator = torch.Generator().manual_seed(self.rng.getrandbits(62))

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, *choices) -> Any:
        return self.rng.choice(choices)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def true(self, probability: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < probability


@dataclass
class Case:
    """What is called. keywords: as the call takes them; head: hidden, weight, ... of a linear entry.

    tokens: bool [N], rows that are tokens; boundaries: where the rollouts begin, [S + 1].
    """

    seed: int
    index: int
    backend: str
    entry: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    boundaries: list[int] = field(default_factory=list)
    vocabulary: int = 1
    spec: Made | None = None
    logits: Tensor | None = None
    spelling: str = "plain"
    head: dict[str, Tensor] = field(default_factory=dict)
    lora_scale: float = 0.5
    targets: Tensor | None = None
    tokens: Tensor | None = None
    advantages: Tensor | None = None
    keywords: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()
    factor: float = 1.0
    plan: bool = False
    main_grad: bool = False
    module: bool = False
    uncounted: bool = False  # one pass as on a GPU, where counting a chunk's rows would wait
    extreme: bool = False
    mended: bool = False
    broken: bool = False

    @property
    def command(self) -> str:
        return f"python -m tests.fuzz --seed {self.seed} --case {self.index} --backend {self.backend}"

    @property
    def head_dtype(self) -> torch.dtype:
        """Of the logits."""
        if not self.head:
            return self.dtype
        given = self.options.get("head_dtype")
        return given or torch.promote_types(self.head["hidden"].dtype, self.head["weight"].dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.head_dtype == torch.float64 else torch.float32


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
        _draw_batch(d, case)
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


def legal_targets(case: Case) -> tuple[Tensor, Tensor]:
    """(bool: rows whose target is in the vocabulary, targets with 0 elsewhere)."""
    legal = (case.targets >= 0) & (case.targets < case.vocabulary)
    return legal, torch.where(legal, case.targets, 0).long()


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


def current_logprobs(case: Case) -> Tensor:
    """fp64 [...] of the case's own policy, to draw old and reference log-probs around; 0 where there is none."""
    if case.head:
        head = {name: value.double() for name, value in case.head.items()}
        weight = head["weight"]
        if "lora A" in head:
            weight = weight + case.lora_scale * head["lora B"] @ head["lora A"]
        logits = head["hidden"].nan_to_num() @ weight.T + head.get("bias", 0.0)
        logits = logits[..., : case.vocabulary]
    else:
        logits = case.logits.double().nan_to_num(neginf=-torch.inf)
    y = logits * case.options.get("logit_scale", 1.0)
    if softcap := case.options.get("softcap"):
        y = torch.where(y.isfinite(), softcap * torch.tanh(y / softcap), y)
    temperature = case.options.get("temperature", 1.0)
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature.double().unsqueeze(-1)
    _, targets = legal_targets(case)
    found = torch.log_softmax(y / temperature, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.where(found.isfinite(), found, 0.0)


def _draw_batch(d: Draw, case: Case) -> None:
    """The N-sized arguments of a policy loss."""
    shape, tokens, keywords = case.shape, case.tokens.view(case.shape), case.keywords
    rollouts = len(case.boundaries) - 1
    compute = case.compute_dtype

    def given(values: Tensor) -> Tensor:
        """In a dtype that the statistics' dtype holds without rounding."""
        dtype = d.pick(compute, compute, compute, torch.float32, torch.bfloat16)
        return values.to(dtype).to(d.pick(dtype, dtype, torch.float64))

    def hidden(values: Tensor) -> Tensor:
        return given(values).masked_fill(~tokens, torch.nan) if d.chance(0.8) else given(values)

    current = current_logprobs(case)
    off = d.pick(0.05, 0.3, 0.3, 1.0)
    old = current + off * d.normal(*shape)
    case.extreme = compute == torch.float64 and d.chance(0.08)
    if case.extreme:
        old = old + d.pick(20.5, 30.0) * d.true(0.3, *shape) - d.pick(20.5, 40.0) * d.true(0.2, *shape)
    if d.chance(0.3):
        old = (4 * old).round() / 4  # ties
    if d.chance(0.75):
        keywords["old_logprobs"] = hidden(old)
    if d.chance(0.97 if "kl_coef" in case.spec.fields else 0.4):
        keywords["ref_logprobs"] = hidden(current + 0.3 * d.normal(*shape))
    if d.chance(0.6):
        keywords["old_entropy"] = hidden((4 * d.normal(*shape).abs()).round() / 4)
    low_head = bool(case.head) and case.head_dtype in LOW
    lp_reg = case.spec.name == "lp_reg" or "low_probability" in case.spec.fields
    # Where min-p keeps all tokens t is logp but for rounding, and t > logp a coin: only where both ways are the same.
    hinges = lp_reg and (low_head or case.spec.name != "lp_reg")
    if d.chance(0.5 if lp_reg else 0.1) or (hinges and d.chance(0.97 if "old_logprobs" in keywords else 1.0)):
        keywords["min_p_logprobs"] = hidden(torch.where(d.true(0.1, *shape), -torch.inf, current + d.normal(*shape)))
    alike = shape == (rollouts,)  # then values are the rollouts'
    kind = "rollout" if alike else d.pick("rollout", "token")
    signs = torch.tensor([1.0, -1.0, 0.0, -0.0], dtype=torch.float64)
    sign = signs[torch.randint(0, d.pick(2, 3, 4), shape if kind == "token" else (rollouts,), generator=d.generator)]
    advantages = given(sign * (0.5 + d.normal(*sign.shape).abs()))
    empty = torch.tensor([
        not case.tokens[a:b].any() for a, b in zip(case.boundaries, case.boundaries[1:], strict=False)
    ], dtype=torch.bool)  # fmt: skip
    if d.chance(0.8):
        advantages = advantages.masked_fill(~tokens if kind == "token" else empty, torch.nan)
    case.advantages = advantages
    if d.chance(0.25):
        size = shape if d.chance(0.5) else (rollouts,)
        polarity = torch.randint(-1, 2, size, generator=d.generator)
        keywords["polarity"] = polarity.to(d.pick(torch.int64, torch.int8, torch.float32, torch.float64))
    if d.chance(0.25):
        per_token = d.chance(0.6) and not alike
        importance = 0.5 + torch.rand(shape if per_token else (rollouts,), generator=d.generator)
        keywords["importance_weights"] = hidden(importance) if per_token else given(importance)
    kind = d.pick("none", "none", "float", "0-d")
    if kind != "none":
        value = d.pick(0.5, 7.0, 100.0, 0.0)
        dtype = d.pick(torch.float32, torch.float64)
        keywords["denominator"] = value if kind == "float" else torch.tensor(value, dtype=dtype)
    if d.chance(0.5):
        keywords["max_length"] = d.pick(5, 9.0)
    if d.chance(0.7):
        step = d.pick(0, 3, 50, 150.5)
        keywords["step"] = torch.tensor(step, dtype=compute) if d.chance(0.4) else step
    if case.entry == "logprob_policy_loss":
        # Given in the logits' dtype.
        keywords["logprobs"] = current.masked_fill(~tokens, torch.nan).to(case.dtype)
        if d.chance(0.7):
            keywords["entropy"] = d.normal(*shape).abs().masked_fill(~tokens, torch.nan).to(case.dtype)
        case.wanted = tuple(name for name in ("logprobs", "entropy") if name in keywords and d.chance(0.9))
        case.logits, case.spelling = None, "plain"
