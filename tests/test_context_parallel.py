"""Rollouts spread over context-parallel ranks, on two and on four processes, against one process with all tokens."""

from __future__ import annotations

import functools

import pytest
import torch
from batches import INTERPRETED, largest_error
from context_parallel_cases import (
    LAYOUTS,
    LENGTH,
    OBJECTIVES,
    ON_RANKS,
    OTHER,
    PRESETS,
    ROLLOUTS,
    SELECTIONS,
    VOCABULARY,
    call,
    first_advantages,
    needs,
    rows_of,
    share,
    whole,
)
from rank_runner import GATHER, read_ranks, spawn_ranks

import a3po_kernels
import reference


@functools.cache
def alone(name: str):
    """(output, gradient of the logits [B, T, V]) of one process."""
    batch = needs(name, whole())
    return call("logits", (batch.logits, batch.targets, batch.advantages, batch.keywords), OBJECTIVES[name])


def together(parts: list, layout: str, rollouts=slice(0, ROLLOUTS)) -> torch.Tensor:
    """Per-token parts of the ranks as the whole batch's; 0 where no rank has a row."""
    lengths = whole().lengths[rollouts]
    columns = parts[0].shape[-1:] if parts[0].shape[-1] == VOCABULARY else ()
    out = parts[0].new_zeros((len(lengths) * LENGTH, *columns))
    for rank, part in enumerate(parts):
        rows = rows_of(layout, rank, len(parts), lengths)
        out[rows] = part.reshape(len(rows), *out.shape[1:])
    return out.view(len(lengths), LENGTH, *out.shape[1:])


def assert_whole(name, losses, gradients, weights, layout):
    out, gradient = alone(name)
    assert gradient.abs().max() > 1e-3 and out.loss.abs() > 1e-6
    assert largest_error(sum(losses), out.loss) < 1e-12
    assert largest_error(together(gradients, layout), gradient) < 1e-12
    if weights is not None:
        assert torch.equal(together(weights, layout), out.weights)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_sum_to_the_whole(ranks, name):
    """The losses of the ranks add up; every token has its gradient and its weight."""
    for layout in ON_RANKS[len(ranks)]:
        found = [results["every objective"][name, layout] for results in ranks]
        losses, gradients, weights, _ = zip(*found, strict=True)
        assert_whole(name, losses, gradients, weights, layout)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_metrics_of_all_ranks(ranks, name):
    expected, first = alone(name)[0].metrics, ranks[0]["every objective"][name, "metrics"]
    for results in ranks:
        metrics = results["every objective"][name, "metrics"]
        assert all(torch.equal(value, first[key]) for key, value in metrics.items())
        for key, value in expected.items():
            assert largest_error(metrics[key], value) < 1e-12, key


@pytest.mark.parametrize("name", ["a3po", "gspo", "gspo_token", "luspo", "gmpo", "vespo", "topr", "grpo"])
def test_parts_sum_to_the_reference(ranks, name):
    batch = needs(name, whole())
    keywords = {key: value for key, value in batch.keywords.items() if key != "scores"}
    logits = batch.logits.clone().requires_grad_()
    objective = getattr(reference, name)(**PRESETS.get(name, {}))
    out = reference.policy_loss(logits, batch.targets, batch.advantages, objective=objective, **keywords)
    out.loss.backward()
    found = [results["every objective"][name, "balanced"] for results in ranks]
    assert largest_error(sum(part[0] for part in found), out.loss) < 1e-12
    assert largest_error(together([part[1] for part in found], "balanced"), logits.grad) < 1e-12


# All-reduces: the counts of the rollouts and what the objective adds; and selections, each of which takes the number of
# tokens, eight bytes of an fp64, and of the position three (of blocks) or four. One of a batch takes the rollout's byte
# too, and one of all ranks the rank's byte and four of each, as other ranks may have more.
COLLECTIVES = {
    "dapo": (1, 0), "grpo": (1, 0), "psr": (2, 0), "a3po": (1, 2), "fork_tokens": (1 + 1 + 1, 1), "gspo": (1 + 2, 0),
    "gspo_token": (1 + 1, 0), "gmpo": (1 + 2, 0), "topr": (1 + 1, 0), "vespo": (1 + 2, 0), "masked": (1 + 2, 0),
    "quantile": (1 + 1 + 8, 0), "rollout function": (1 + 2 * 2, 0), "length": (1, 0), "global": (1 + 1 + 8 + 1 + 8, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", COLLECTIVES)
def test_number_of_collectives(ranks, name):
    layout = ON_RANKS[len(ranks)][0]
    fixed, selections = COLLECTIVES[name]
    for results in ranks:
        calls = results["every objective"][name, layout][3]
        assert len(calls) == fixed + selections * (1 + 8 + (3 if layout == "contiguous" else 4)), calls
        assert set(calls) == {"all_reduce"}


def test_no_host_reads(ranks):
    assert all(results["no host reads"] for results in ranks)


@pytest.mark.parametrize("at", range(len(OTHER)), ids=lambda at: f"{OTHER[at][0]}-{OTHER[at][1]}-{at}")
def test_other_losses_and_routes(ranks, at):
    """Token-level objectives still take one pass; what needs rollouts takes all statistics first."""
    _, name, route, options = OTHER[at]
    losses, gradients, weights, routes = zip(*(results["other losses"][at] for results in ranks), strict=True)
    assert set(routes) == {route}
    assert_whole(name, losses, gradients, None if "statistics" in options else weights, "packed")


@pytest.mark.parametrize("statistics", ["all", "active"])
def test_rows_that_another_rank_moves(ranks, statistics):
    """Rows are left out of the products only where no rank has a token that moves their rollout."""
    batch = first_advantages()
    keywords = {key: batch.keywords[key] for key in ("mask", "old_logprobs")}
    given = (batch.logits, batch.targets, batch.advantages, keywords)
    out, gradient = call("linear", given, a3po_kernels.gspo())
    found = [results["moved"][statistics] for results in ranks]
    assert largest_error(sum(part[0] for part in found), out.loss) < 1e-12
    assert largest_error(together([part[1] for part in found], "balanced"), gradient) < 1e-12
    assert all(part[1].abs().max() > 1e-4 for part in found)


@pytest.mark.parametrize("loss", ["logits", "linear"])
@pytest.mark.parametrize("name", ["a3po", "gspo", "dapo", "keeps", "rollout function", "quantile"])
def test_ranks_without_a_row(ranks, name, loss):
    """They take part in every sum, and nobody waits for them."""
    found = [results["lonely"][name, loss] for results in ranks]
    out, gradient = alone(name)
    rows = rows_of("packed", 0, 1, whole().lengths)
    assert largest_error(sum(part[0] for part in found), out.loss) < 1e-12
    assert all(part[1].numel() == 0 and part[0] == 0 for part in found[:-1])
    assert largest_error(found[-1][1], gradient.flatten(0, 1)[rows]) < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scope, side, rounding", SELECTIONS)
def test_selections(ranks, layout, scope, side, rounding):
    """Exactly the tokens of one process, ties to the earlier position wherever it lies."""
    metric, mask, _ = ranks[0]["selections"]
    for dtype in (torch.float32, torch.float64):
        parts = [results["selections"][2][dtype, layout, scope, side, rounding] for results in ranks]
        want = reference.select_tokens(metric.to(dtype), mask, ratio=0.29, side=side, scope=scope, rounding=rounding)
        assert torch.equal(together(parts, layout), want)


def test_replicas_of_other_sizes_select_together(ranks):
    """Pairs of ranks with other numbers and lengths of rollouts take as many rounds, and select as one batch."""
    if len(ranks) < 4:
        pytest.skip("needs two pairs of ranks")
    for name in ("long", "many"):
        found = [results["unlike"][name] for results in ranks]
        scores, chosen = (torch.cat([part[i].reshape(-1) for part in found]) for i in range(2))
        count = int(scores.numel() * 0.25)
        assert chosen.sum() == count
        assert scores[chosen].max() < scores[~chosen].min()
    assert all("group must hold every rank of cp_group" in results["unlike"]["overlap"] for results in ranks)


@pytest.mark.parametrize("which", ["outside", "inside"])
@pytest.mark.parametrize("name", ["global", "gspo", "dapo", "length"])
def test_data_and_context_parallel(ranks, name, which):
    """Pairs of ranks share rollouts: divisor, global rule and metrics go over all, by a group beside or around them."""
    out, gradient = alone(name)
    world, size = len(ranks), ROLLOUTS // (len(ranks) // 2)
    found = [results["mesh"][name, which] for results in ranks]
    assert all(torch.equal(part[0], found[0][0]) for part in found)
    assert largest_error(sum(part[1] for part in found), out.loss) < 1e-12
    for pair in range(world // 2):
        rows = slice(pair * size, (pair + 1) * size)
        mine = found[2 * pair : 2 * pair + 2]
        assert largest_error(together([part[2] for part in mine], "balanced", rows), gradient[rows]) < 1e-12
        assert torch.equal(together([part[3] for part in mine], "balanced", rows), out.weights[rows])
    for part in found:
        for key, value in out.metrics.items():
            assert largest_error(part[4][key], value) < 1e-12, key
        if name != "global" and world == 4:
            rollouts = name == "gspo"
            # The tokens over the pair and then over the others; rollouts take the pair's sums in either way.
            assert len(part[5]) == {"gspo": 2, "dapo": 2 - (which == "inside"), "length": 1}[name], part[5]
            assert part[6].count(GATHER) == (1 if which == "inside" else 2)
            assert part[6].count("all_reduce") == (3 if rollouts else 1)


def test_refusals(ranks):
    for rank, results in enumerate(ranks):
        found, *_ = results["refusals"]
        length = LENGTH // len(ranks) - (rank == 0)
        expected = {
            "one-pass": "'one-pass' is not possible here: a token's gradient needs its whole rollout, which cp_group",
            "one-launch": "route='one-launch' is not possible here: the ratio is the rollout's",
            "no positions": "packed rollouts under cp_group need positions, for a TokenRule of scope 'rollout'",
            "no order": "reads position, which was not given",
            "declared token": "depends_on='token' reads a sum over other tokens, which cp_group spreads over ranks",
            "no cp_group": "positions are of tokens that cp_group spreads over ranks; got them without cp_group",
            "shape": "positions must have shape",
            "dtype": "positions must have one of the dtypes torch.int32, torch.int64; got torch.float32",
            "twice": "positions must be different for the tokens of a rollout; got one twice",
            "negative": "positions must lie in [0, 2^31); got -1",
            "no group": "cp_group must be a torch.distributed ProcessGroup or None; got str",
            "uneven": f"got T = {length} here",
            "uneven selection": f"got T = {length} here",
            "uneven length": "unless positions (and max_length where T would be it) are given",
            "global": "cp_group is of scope 'rollout' and 'batch'",
        }
        assert set(found) == set(expected)
        for name, message in expected.items():
            assert message in found[name], found[name]
    losses, gradients, others, wide = zip(*(results["refusals"][1:] for results in ranks), strict=True)
    assert_whole("gspo", losses, gradients, None, "packed")
    assert_whole("a3po", others, wide, None, "balanced")


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="runs Triton's interpreter on every rank")
def test_the_kernels_between_the_sums(tmp_path):
    """On the Triton backend: a rollout-wide ratio, a selection, and a token-level objective in one pass."""
    spawn_ranks(2, tmp_path, ("interpreted_cases",))
    found = read_ranks(2, tmp_path)
    for name in ("gspo", "a3po", "dapo"):
        losses, gradients, weights = zip(*(results["kernels"][name] for results in found), strict=True)
        assert_whole(name, losses, gradients, weights, "balanced")


@pytest.mark.parametrize("name", ["a3po", "ties", "gspo", "clip_cov"])
def test_a_group_of_one(ranks, name):
    """Its rows may lie in any order, and nothing is called."""
    for results in ranks:
        loss, gradient, weights, calls = results["group of one"][name]
        assert not calls
        assert_whole(name, [loss], [gradient], [weights], "packed")


def test_one_rank_needs_no_group():
    """positions belong to a cp_group; without torch.distributed there is none."""
    arguments = share(needs("dapo", whole()), "contiguous", 0, 1)
    with pytest.raises(ValueError, match="got them without cp_group"):
        call("logits", arguments, OBJECTIVES["dapo"], positions=torch.zeros(ROLLOUTS, LENGTH, dtype=torch.long))
    with pytest.raises(ValueError, match="got them without cp_group"):
        a3po_kernels.select_tokens(torch.zeros(2, 3), ratio=0.5, side="low", positions=torch.zeros(2, 3).long())
