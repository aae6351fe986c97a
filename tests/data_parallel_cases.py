"""What every rank of a data-parallel group computes for test_data_parallel; imported by the spawned ranks too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from batches import random_batch
from rank_runner import Counted

import a3po_kernels
from a3po_kernels import Objective, PolarityWeights, TokenRule

ROLLOUTS, LENGTH = 8, 7
GLOBAL = TokenRule(metric="probability", ratio=0.29, rest_scale=0.5, scope="global")
# reduce_metrics: rules of one rollout or one token, whose weights do not depend on which rank has which rollouts.
OBJECTIVES = {
    "a3po": a3po_kernels.a3po(kl_coef=0.1, kl_clamp=0.2, entropy_coef=0.01),
    "dapo": a3po_kernels.dapo(dual_clip=1.1),
    "psr": a3po_kernels.psr(),
    "gspo": a3po_kernels.gspo(),
    "keeps": Objective(shaping=(TokenRule(1, ratio=0.4, rest_scale=0.0),)),
    "global": Objective(shaping=(GLOBAL,)),
}
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
DENOMINATED = {
    (aggregation, over): Objective(
        aggregation=aggregation, normalize_over=over, shaping=(PolarityWeights(1.0, 0.0, 0.5), TokenRule(1, ratio=0.4))
    )
    for aggregation in AGGREGATIONS for over in ("all", "selected")
}  # fmt: skip


def whole(per_token: bool = False):
    """The batch of all ranks; a ratio of NaN where asked for."""
    return random_batch(3, rollouts=ROLLOUTS, length=LENGTH, per_token=per_token)


def part(batch, rows: slice):
    """(logits, targets, advantages, keywords) of some rollouts."""
    keywords = {name: value[rows] for name, value in batch.keywords.items() if name != "min_p_logprobs"}
    return batch.logits[rows], batch.targets[rows], batch.advantages[rows], keywords


def mine(rank: int, world: int) -> slice:
    size = ROLLOUTS // world
    return slice(rank * size, (rank + 1) * size)


def loss_of(arguments, objective, **options):
    logits, targets, advantages, keywords = arguments
    logits = logits.clone().requires_grad_()
    out = a3po_kernels.policy_loss(logits, targets, advantages, objective=objective, **keywords, **options)
    out.loss.backward()
    return out, logits.grad


def reduced(rank, world):
    """Metrics of all ranks on every call, twice for the same bits, and what was called for them."""
    arguments, found = part(whole(), mine(rank, world)), {}
    for name, objective in OBJECTIVES.items():
        with Counted() as counted:
            metrics = loss_of(arguments, objective, reduce_metrics=True)[0].metrics
        again = loss_of(arguments, objective, reduce_metrics=True)[0].metrics
        assert all(torch.equal(metrics[key], again[key]) for key in metrics)
        found[name] = metrics, counted.calls
    return found


def reduced_elsewhere(rank, world):
    """The linear head with few active rows, log-probs without entropy, and a NaN on one rank."""
    logits, targets, advantages, keywords = part(whole(), mine(rank, world))
    hidden, weight = logits.nan_to_num(0.0).clone().requires_grad_(), torch.eye(logits.shape[-1], dtype=logits.dtype)
    found = {}
    for route in ("one-pass", "recompute"):
        found[route] = a3po_kernels.linear_policy_loss(
            hidden, weight, targets, advantages, objective=a3po_kernels.a3po(), route=route, statistics="active",
            reduce_metrics=True, **keywords,
        ).metrics  # fmt: skip
    old = keywords["old_logprobs"]
    found["logprobs"] = a3po_kernels.logprob_policy_loss(
        old + 0.1, advantages, objective=a3po_kernels.dapo(), reduce_metrics=True, **{**keywords, "ref_logprobs": old}
    ).metrics
    broken = old + torch.where(torch.tensor(rank == world - 1), torch.nan, 0.1)
    found["nan"] = a3po_kernels.logprob_policy_loss(
        broken, advantages, objective=a3po_kernels.dapo(), reduce_metrics=True, **keywords
    ).metrics
    return found


def denominators(rank, world):
    """Loss parts and gradients of two micro-batches a rank, divided by the count of the whole step."""
    batch, rows, found = whole(), mine(rank, world), {}
    _, targets, advantages, keywords = part(batch, rows)
    mask = keywords["mask"] & (targets != -100)
    middle = (rows.start + rows.stop) // 2
    for (aggregation, over), objective in DENOMINATED.items():
        length = {"max_length": 9.0} if aggregation == "seq-mean-token-sum-norm" else {}
        with Counted() as counted:
            count = a3po_kernels.global_denominator(
                objective, mask, advantages, accumulation=2, average_over_ranks=True, **length
            )
        loss, gradients = 0.0, []
        for micro in (slice(rows.start, middle), slice(middle, rows.stop)):
            out, gradient = loss_of(part(batch, micro), objective, denominator=count, **length)
            # As a trainer that divides by its number of micro-batches, and DDP by its ranks.
            loss = loss + out.loss.detach() / 2 / world
            gradients.append(gradient / 2 / world)
        found[aggregation, over] = count, loss, torch.cat(gradients), counted.calls
    return found


def subgroups(rank, world):
    """Selection and metrics over halves of the ranks; what a rank that is outside gets."""
    halves = [dist.new_group(list(range(half * world // 2, (half + 1) * world // 2))) for half in range(2)]
    group = halves[rank * 2 // world]
    arguments = part(whole(), mine(rank, world))
    with Counted() as counted:
        out, _ = loss_of(arguments, OBJECTIVES["global"], group=group, reduce_metrics=True)
    count = a3po_kernels.global_denominator(OBJECTIVES["dapo"], out.weights != 0, group=group, average_over_ranks=True)
    metric = torch.randn(LENGTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).round(decimals=1)
    chosen = a3po_kernels.select_tokens(metric, ratio=0.4, side="high", scope="global", group=group)
    refused = {}
    for name, call in {
        "not ours": lambda: a3po_kernels.select_tokens(
            metric, ratio=0.4, side="low", scope="global", group=halves[1 - rank * 2 // world]
        ),
        "nothing to reduce": lambda: loss_of(arguments, OBJECTIVES["dapo"], group=group),
        "no group": lambda: loss_of(arguments, OBJECTIVES["dapo"], group=3, reduce_metrics=True),
        "another scope": lambda: a3po_kernels.select_tokens(metric, ratio=0.4, side="low", group=group),
    }.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            refused[name] = f"{type(error).__name__}: {error}"
    return out.weights, count, out.metrics, metric, chosen, refused, counted.calls


CASES = {
    "reduced": reduced, "reduced elsewhere": reduced_elsewhere, "denominators": denominators, "subgroups": subgroups,
}  # fmt: skip
