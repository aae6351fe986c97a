"""What every rank of a context-parallel group computes for test_context_parallel; imported by the spawned ranks too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from batches import RandomBatch, random_batch
from host_reads import NoHostReads
from rank_runner import Counted

import a3po_kernels
from a3po_kernels import CustomSurrogate, Objective, OffPolicyMask, Ratio, Reinforce, TokenRule, Topr

ROLLOUTS, LENGTH, VOCABULARY = 6, 16, 5
LAYOUTS = ("contiguous", "balanced", "packed")
ON_RANKS = {2: LAYOUTS, 4: ("balanced",)}  # of every objective
PRESETS = {
    "lp_reg": {"quantile": 0.3}, "kl_cov": {"ratio": 0.2}, "clip_cov": {"ratio": 0.3, "low": 0.0},
    "a3po": {"kl_coef": 0.1, "entropy_coef": 0.01}, "gspo": {"kl_coef": 0.1, "entropy_coef": 0.01},
}  # fmt: skip


def custom(depends_on: str) -> CustomSurrogate:
    def loss(t):
        mean = t.rollout_mean(t.log_ratio) + t.rollout_sum(t.entropy * t.logprobs) / 50
        if depends_on == "batch":
            mean = mean + t.batch_mean(t.logprobs) * t.batch_sum(t.ratio) / 100
        return -t.advantages * mean.exp() * t.ratio * (1 + t.position)

    return CustomSurrogate(loss, depends_on)


OBJECTIVES = {
    **{name: preset(**PRESETS.get(name, {})) for name, preset in a3po_kernels.presets.items()},
    "keeps": Objective(
        shaping=(
            TokenRule(1, "entropy", "current", "high", 0.4, rest_scale=0.0),
            TokenRule(ratio=0.3, rounding="ceil", scope="batch", selected_scale=0.5, threshold=0.9),
        ),
        aggregation="seq-mean-token-mean", normalize_over="selected",
    ),
    "quantile": Objective(
        shaping=(TokenRule(-1, source="current", side="high", quantile=0.37, scope="batch", rest_scale=0.5),)
    ),
    "global": Objective(shaping=(TokenRule(metric="ties", ratio=0.29, rest_scale=0.5, scope="global"),)),
    "ties": Objective(
        shaping=(
            TokenRule(metric="ties", ratio=0.3, rest_scale=0.5),
            TokenRule(metric="ties", ratio=0.3, side="high", rest_scale=0.5, scope="batch"),
        ),
    ),
    "replaced": Objective(shaping=(TokenRule(ratio=0.3, replacement=Ratio(0.1)),), ratio_level="sequence-token"),
    "masked": Objective(ratio_weights=(OffPolicyMask(0.0), Topr("geometric")), log_ratio_coef=0.1),
    "length": Objective(surrogate=Reinforce(), aggregation="seq-mean-token-sum-norm"),
    "rollout function": Objective(surrogate=custom("rollout"), kl_coef=0.1),
    "batch function": Objective(surrogate=custom("batch")),
}  # fmt: skip


def whole() -> RandomBatch:
    batch = random_batch(5, rollouts=ROLLOUTS, length=LENGTH, vocabulary=VOCABULARY)
    batch.keywords["scores"] = {"ties": (batch.keywords["old_logprobs"].nan_to_num(0.0) / 2).round()}
    return batch


def needs(name: str, batch: RandomBatch) -> RandomBatch:
    """The batch with what an objective reads."""
    keywords = {k: v for k, v in batch.keywords.items() if k != "min_p_logprobs" or name == "lp_reg"}
    return RandomBatch(batch.logits, batch.targets, batch.advantages, keywords, batch.lengths)


def rows_of(layout: str, rank: int, world: int, lengths: list[int]) -> torch.Tensor:
    """The rows of the padded batch, flat, that a rank holds; its rollouts' one after another."""
    size = LENGTH // world
    columns = list(range(rank * size, (rank + 1) * size))
    if layout != "contiguous":
        half = size // 2
        last = 2 * world - 1 - rank
        columns = [*range(rank * half, (rank + 1) * half), *range(last * half, (last + 1) * half)]
    if layout == "packed":
        return torch.tensor([s * LENGTH + t for s, n in enumerate(lengths) for t in reversed(columns) if t < n]).long()
    return torch.tensor([s * LENGTH + t for s in range(len(lengths)) for t in columns])


def share(batch: RandomBatch, layout: str, rank: int, world: int) -> tuple:
    """(logits, targets, advantages, keywords) of a rank."""
    rows = rows_of(layout, rank, world, batch.lengths)
    rollouts = len(batch.lengths)

    def take(values):
        if isinstance(values, dict):
            return {name: take(value) for name, value in values.items()}
        if values.shape[:2] != (rollouts, LENGTH):
            return values
        flat = values.flatten(0, 1)[rows]
        return flat if layout == "packed" else flat.view(rollouts, LENGTH // world, *values.shape[2:])

    keywords = {name: take(value) for name, value in batch.keywords.items()}
    if layout != "contiguous":
        positions = torch.arange(LENGTH).expand(rollouts, -1)
        keywords["positions"] = take(positions).int()
    if layout == "packed":
        counts = torch.bincount(rows // LENGTH, minlength=rollouts)
        keywords["cu_seqlens"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return take(batch.logits), take(batch.targets), batch.advantages, keywords


def call(loss: str, arguments: tuple, objective, **options):
    """(output, gradient of the logits), by one of the three losses."""
    logits, targets, advantages, keywords = arguments
    keywords = {**keywords, **options}
    if keywords.get("plan"):
        tokens = keywords["mask"] & (targets != -100)
        keywords["plan"] = a3po_kernels.plan_rows(
            tokens, advantages, objective=objective, cu_seqlens=keywords["cu_seqlens"]
        )
    if loss == "linear":
        weight = torch.eye(logits.shape[-1], dtype=logits.dtype)
        logits = logits.nan_to_num(0.0).clone().requires_grad_()
        out = a3po_kernels.linear_policy_loss(logits, weight, targets, advantages, objective=objective, **keywords)
        out.loss.backward()
        return out, logits.grad
    logits = logits.clone().requires_grad_()
    if loss == "logits":
        out = a3po_kernels.policy_loss(logits, targets, advantages, objective=objective, **keywords)
    else:
        stats = a3po_kernels.token_logprobs(logits, targets)
        keywords["mask"] = keywords["mask"] & (targets != -100)
        out = a3po_kernels.logprob_policy_loss(
            stats.logprobs, advantages, objective=objective, entropy=stats.entropy, **keywords
        )
    out.loss.backward()
    return out, logits.grad


def every_objective(rank, world):
    """Each objective in its layouts; the first one twice, for the same bits."""
    found, batch = {}, whole()
    for name, objective in OBJECTIVES.items():
        for layout in ON_RANKS[world]:
            arguments = share(needs(name, batch), layout, rank, world)
            if layout == "packed" and objective.aggregation == "seq-mean-token-sum-norm":
                arguments[3]["max_length"] = LENGTH
            with Counted() as counted:
                out, gradient = call("logits", arguments, objective, cp_group=dist.group.WORLD)
            if layout == ON_RANKS[world][0]:
                again, same = call("logits", arguments, objective, cp_group=dist.group.WORLD, reduce_metrics=True)
                assert torch.equal(again.loss, out.loss) and torch.equal(same, gradient), name
                metrics = again.metrics
            found[name, layout] = out.loss.detach(), gradient, out.weights, counted.calls
        found[name, "metrics"] = metrics
    return found


OTHER = (
    ("linear", "dapo", "one-pass", {"route": "one-pass"}), ("linear", "a3po", "one-pass", {}),
    ("linear", "gspo", "recompute", {}), ("linear", "gspo", "recompute", {"statistics": "active"}),
    ("linear", "a3po", "one-pass", {"plan": True}), ("linear", "gspo", "recompute", {"plan": True}),
    ("linear", "fork_tokens", "recompute", {}), ("linear", "topr", "recompute", {"compaction": "none"}),
    ("linear", "rollout function", "recompute", {"statistics": "active"}),
    ("logits", "a3po", "one-launch", {"route": "one-launch"}), ("logits", "psr", "one-launch", {"route": "one-launch"}),
    ("logprobs", "gmpo", "logprobs", {}), ("logprobs", "a3po", "logprobs", {}), ("logprobs", "lp_reg", "logprobs", {}),
)  # fmt: skip


def other_losses(rank, world):
    found, batch = {}, whole()
    for at, (loss, name, _, options) in enumerate(OTHER):
        arguments = share(needs(name, batch), "packed", rank, world)
        out, gradient = call(loss, arguments, OBJECTIVES[name], cp_group=dist.group.WORLD, **options)
        found[at] = out.loss.detach(), gradient, out.weights, out.route
    return found


def first_advantages() -> RandomBatch:
    """The batch with advantages per token, 0 but at the first token of each rollout, which lies on one rank."""
    batch = whole()
    batch.advantages = torch.zeros(ROLLOUTS, LENGTH, dtype=torch.float64)
    batch.advantages[:, 0] = torch.arange(ROLLOUTS) - 1.5
    batch.keywords["mask"][:, 0], batch.targets[:, 0] = True, 1
    batch.logits[:, 0], batch.keywords["old_logprobs"][:, 0] = batch.logits[0, 0], -1.0
    return needs("gspo", batch)


def moved_from_elsewhere(rank, world):
    """A rollout-wide ratio whose gradient reaches rows of a rank without any advantage."""
    logits, targets, advantages, keywords = share(first_advantages(), "balanced", rank, world)
    rows = rows_of("balanced", rank, world, whole().lengths)
    advantages = advantages.flatten()[rows].view(targets.shape)
    keywords.pop("ref_logprobs"), keywords.pop("importance_weights")
    found = {}
    for statistics in ("all", "active"):
        out, gradient = call(
            "linear", (logits, targets, advantages, keywords), a3po_kernels.gspo(), cp_group=dist.group.WORLD,
            statistics=statistics,
        )  # fmt: skip
        found[statistics] = out.loss.detach(), gradient
    return found


def lonely(rank, world):
    """All tokens of all rollouts on the last rank: the others have no row at all."""
    found, batch = {}, whole()
    full = share(batch, "packed", 0, 1)
    for name in ("a3po", "gspo", "dapo", "keeps", "rollout function", "quantile"):
        logits, targets, advantages, keywords = share(needs(name, batch), "packed", 0, 1)
        if rank < world - 1:
            keywords = {
                key: value[:0] if isinstance(value, torch.Tensor) else {k: v[:0] for k, v in value.items()}
                for key, value in keywords.items()
            }
            keywords["cu_seqlens"] = torch.zeros_like(full[3]["cu_seqlens"])
            logits, targets = logits[:0], targets[:0]
        for loss in ("logits", "linear"):
            out, gradient = call(
                loss, (logits, targets, advantages, keywords), OBJECTIVES[name], cp_group=dist.group.WORLD
            )
            found[name, loss] = out.loss.detach(), gradient
    return found


SELECTIONS = (("rollout", "low", "floor"), ("rollout", "high", "ceil"), ("batch", "high", "floor"))


def selections(rank, world):
    """select_tokens on metrics with ties, NaN and zeros of both signs; by both scopes and in every layout."""
    batch, found = whole(), {}
    metric = torch.randn(ROLLOUTS, LENGTH, generator=torch.Generator().manual_seed(2)).round(decimals=0)
    metric[0, 3], metric[1, 2], metric[2, 2] = torch.nan, -torch.inf, -0.0
    for dtype in (torch.float32, torch.float64):
        batch.keywords = {"metric": metric.to(dtype), "mask": batch.keywords["mask"]}
        for layout in LAYOUTS:
            keywords = share(batch, layout, rank, world)[3]
            for scope, side, rounding in SELECTIONS:
                found[dtype, layout, scope, side, rounding] = a3po_kernels.select_tokens(
                    **keywords, ratio=0.29, side=side, scope=scope, rounding=rounding, cp_group=dist.group.WORLD
                )
    return metric, batch.keywords["mask"], found


def mesh(rank, world):
    """Pairs of context-parallel ranks, each with its own rollouts: a global rule, metrics and the divisor over all."""
    pairs = [dist.new_group([2 * i, 2 * i + 1]) for i in range(world // 2)]
    columns = [dist.new_group(list(range(i, world, 2))) for i in range(2)]
    cp_group, group = pairs[rank // 2], columns[rank % 2]
    batch, size = whole(), ROLLOUTS // (world // 2)
    mine = slice(rank // 2 * size, (rank // 2 + 1) * size)
    keywords = {
        name: value[mine] if isinstance(value, torch.Tensor) else {k: v[mine] for k, v in value.items()}
        for name, value in needs("dapo", batch).keywords.items()
    }
    part = RandomBatch(batch.logits[mine], batch.targets[mine], batch.advantages[mine], keywords, batch.lengths[mine])
    arguments = share(part, "balanced", rank % 2, 2)
    tokens = arguments[3]["mask"] & (arguments[1] != -100)
    found = {}
    for name in ("global", "gspo", "dapo", "length"):
        objective = OBJECTIVES[name]
        length = {"max_length": float(LENGTH)} if name == "length" else {}
        for which, over in (("outside", group), ("inside", None)):
            with Counted() as counted:
                count = a3po_kernels.global_denominator(objective, tokens, group=over, cp_group=cp_group, **length)
            options = {"group": over, "reduce_metrics": True, "cp_group": cp_group, "denominator": count, **length}
            with Counted() as in_loss:
                out, gradient = call("logits", arguments, objective, **options)
            found[name, which] = (
                count, out.loss.detach(), gradient, out.weights, out.metrics, counted.calls, in_loss.calls
            )  # fmt: skip
    return found


def unlike(rank, world):
    """Scores and selected tokens of pairs of ranks: one has longer rollouts, or more of them, than the other."""
    if world < 4:
        return {}
    pairs = [dist.new_group([2 * i, 2 * i + 1]) for i in range(world // 2)]
    rule = TokenRule(metric="s", side="low", ratio=0.25, rest_scale=0.5, scope="global")
    found = {}
    for name, shapes in (("long", ((2, 100), (2, 200))), ("many", ((3, 2), (300, 2)))):
        shape = shapes[rank // 2]
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        out = a3po_kernels.logprob_policy_loss(
            torch.zeros(shape, dtype=torch.float64), torch.ones(shape[0], dtype=torch.float64), scores={"s": scores},
            objective=Objective(shaping=(rule,)), cp_group=pairs[rank // 2],
        )  # fmt: skip
        found[name] = scores, out.weights == 1.0
    try:
        a3po_kernels.global_denominator(
            a3po_kernels.dapo(), torch.ones(2, 3), group=pairs[rank // 2], cp_group=dist.group.WORLD
        )
    except ValueError as error:
        found["overlap"] = str(error)
    return found


def group_of_one(rank, world):
    """A cp_group of this rank alone, and its rollouts' tokens in reverse order."""
    own = [dist.new_group([other]) for other in range(world)][rank]
    found, batch = {}, whole()
    for name in ("a3po", "ties", "gspo", "clip_cov"):
        with Counted() as counted:
            out, gradient = call("logits", share(needs(name, batch), "packed", 0, 1), OBJECTIVES[name], cp_group=own)
        found[name] = out.loss.detach(), gradient, out.weights, counted.calls
    return found


def widened(values):
    """Per-token values [B, T, ...] with a column that is no token."""
    if isinstance(values, dict):
        return {name: widened(value) for name, value in values.items()}
    return torch.cat([values, torch.zeros_like(values[:, :1])], 1)


def refusals(rank, world):
    batch = whole()
    cp = {"cp_group": dist.group.WORLD}
    padded, packed = share(needs("dapo", batch), "contiguous", rank, world), share(batch, "packed", rank, world)
    loose = (*packed[:3], {name: value for name, value in packed[3].items() if name != "positions"})
    hidden = lambda depends: Objective(surrogate=CustomSurrogate(lambda t: 0 * t.rollout_sum(t.logprobs), depends))  # noqa: E731
    position = Objective(surrogate=CustomSurrogate(lambda t: t.logprobs * t.position, "rollout"))
    short = (padded[0][:, :-1], padded[1][:, :-1], padded[2], {})
    twice = torch.zeros_like(packed[1])
    # With positions a rank may hold a column more than the others, here of no token.
    columns = share(needs("a3po", batch), "balanced", rank, world)
    wider = (*map(widened, columns[:2]), columns[2], {name: widened(value) for name, value in columns[3].items()})
    cut = wider if rank == 0 else columns
    calls = {
        "one-pass": lambda: call("linear", padded, OBJECTIVES["gspo"], route="one-pass", **cp),
        "one-launch": lambda: call("logits", padded, OBJECTIVES["gspo"], route="one-launch", **cp),
        "no positions": lambda: call("logits", loose, OBJECTIVES["a3po"], **cp),
        "no order": lambda: call("logits", loose, position, **cp),
        "declared token": lambda: call("logits", padded, hidden("token"), **cp),
        "no cp_group": lambda: call("logits", packed, OBJECTIVES["dapo"]),
        "shape": lambda: call("logits", padded, OBJECTIVES["dapo"], positions=torch.zeros(3, dtype=torch.long), **cp),
        "dtype": lambda: call("logits", padded, OBJECTIVES["dapo"], positions=torch.zeros(padded[1].shape), **cp),
        "twice": lambda: call("logits", packed, OBJECTIVES["a3po"], **{**cp, "positions": twice}),
        "negative": lambda: call("logits", packed, OBJECTIVES["a3po"], **{**cp, "positions": twice - 1}),
        "no group": lambda: call("logits", padded, OBJECTIVES["dapo"], cp_group="cp"),
        "uneven": lambda: call("logits", short if rank == 0 else (*padded[:3], {}), OBJECTIVES["psr"], **cp),
        "uneven length": lambda: call("logits", cut, OBJECTIVES["length"], **cp),
        "uneven selection": lambda: a3po_kernels.select_tokens(short[1].float(), ratio=0.5, side="low", **cp)
        if rank == 0 else a3po_kernels.select_tokens(padded[1].float(), ratio=0.5, side="low", **cp),
        "global": lambda: a3po_kernels.select_tokens(torch.zeros(2, 3), ratio=0.5, side="low", scope="global", **cp),
    }
    found = {}
    for name, attempt in calls.items():
        try:
            attempt()
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    # What needs no order needs no positions.
    out, gradient = call("logits", loose, OBJECTIVES["gspo"], **cp)
    other, wide = call("logits", cut, OBJECTIVES["a3po"], **cp)
    return found, out.loss.detach(), gradient, other.loss.detach(), wide[:, : LENGTH // world]


def no_host_reads(rank, world):
    """Everything that crosses ranks, where reading a value would fail."""
    batch, world_group = whole(), dist.group.WORLD
    logits, targets, advantages, keywords = share(batch, "packed", rank, world)
    mask = keywords.pop("mask") & (targets != -100)
    logp = keywords["old_logprobs"].nan_to_num(0.0) + 0.1
    names = ("a3po", "gspo", "keeps", "quantile", "global", "ties", "masked", "rollout function", "batch function")
    with NoHostReads():
        count = a3po_kernels.global_denominator(
            a3po_kernels.grpo(), mask, cu_seqlens=keywords["cu_seqlens"], cp_group=world_group
        )
        a3po_kernels.select_tokens(
            logp, mask, cu_seqlens=keywords["cu_seqlens"], ratio=0.3, side="low", cp_group=world_group,
            positions=keywords["positions"],
        )  # fmt: skip
        for name in names:
            values = logp.clone().requires_grad_()
            given = needs(name, RandomBatch(logits, targets, advantages, keywords)).keywords
            out = a3po_kernels.logprob_policy_loss(
                values, advantages, objective=OBJECTIVES[name], entropy=logp.abs(), mask=mask, cp_group=world_group,
                reduce_metrics=True, denominator=count, **given,
            )  # fmt: skip
            out.loss.backward()
    return True


CASES = {
    "every objective": every_objective, "other losses": other_losses, "moved": moved_from_elsewhere,
    "lonely": lonely, "selections": selections,
    "mesh": mesh, "unlike": unlike, "no host reads": no_host_reads, "group of one": group_of_one,
    "refusals": refusals,
}  # fmt: skip
