"""DTensor heads and logits on 2 and 4 gloo processes equal plain ones on one, and so do the gradients' placements."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import a3po_kernels as ak
from tests.dtensor_heads import Case, placements, run_case, run_cases
from tests.dtensor_refusals import refused
from tests.dtensor_training import INPUTS, train
from tests.ranks import on_ranks
from tests.split_heads import same_bits

R, S0, S1, P = ("R",), ("S0",), ("S1",), ("P",)
CHUNKS = {"max_chunk_bytes": 8 * 11 * 9}
ALL = ("bias", "lora")
ROUTES = ("one-pass", "recompute")


def _cases(ranks: int) -> list[Case]:
    policy = {"call": "linear_policy_loss", "extras": ("bias",)}
    made = [
        Case("plain hidden", (), ()),
        Case("replicated hidden", R, R, a=R, d_a=R, extras=ALL),
        Case("replicated, a part", R, P, a=R, d_a=R, extras=ALL, options={"grad_hidden": "partial"}),
        Case("replicated, own rows", R, P, options={"grad_hidden": "reduce_scatter"}),
        Case("sharded rows", S1, S1, extras=ALL),
        Case("sharded rows, packed", S0, S0, a=R, d_a=R, extras=(*ALL, "packed")),
        Case("sharded rows, plain", (), (), options={"hidden_layout": "sequence_sharded"}, extras=ALL),
        Case("empty shards", R, R, size=1, extras=ALL),
        Case("padding", S1, S1, vocab_size=9, extras=ALL),
        Case("padding to the brim", R, R, vocab_size=2, extras=("bias",)),
        Case("frozen", R, R, extras=("frozen", *ALL)),
        Case("main_grad", R, R, extras=("main_grad",)),
        Case("on its way", S1, S1, extras=("async",)),
        Case("no leaf", R, R, extras=("scaled",)),
        Case("compiled", R, R, extras=("compiled", "bias")),
        Case("min-p", R, (), call="linear_min_p_token_logprobs", size=3, extras=("bias",)),
        Case("whole weight, same rows", R, R, R, R, a=R, d_a=R, extras=ALL),
        Case("whole weight, own rows", S1, S1, R, P, a=R, d_a=P, extras=ALL),
        Case("whole weight, own rollouts", S0, S0, R, P, a=R, d_a=P, extras=ALL),
        Case("whole frozen weight, plain hidden", (), (), R, extras=("frozen",)),
        Case("logits", ("S2",), ("S2",), call="token_logprobs"),
        Case("logits, packed", S1, S1, call="token_logprobs", extras=("packed",), size=3, vocab_size=2),
        Case("whole logits", R, R, call="token_logprobs"),
        Case("logits of own rollouts", S0, S0, call="token_logprobs"),
        Case("logits, min-p", ("S2",), (), call="min_p_token_logprobs", size=3),
        Case("logits, policy", ("S2",), ("S2",), call="policy_loss", options={"objective": ak.a3po()}),
        Case("logits of own rollouts, policy", S0, S0, call="policy_loss", options={"objective": ak.dapo()}),
    ]
    for route in ROUTES:
        options = {"objective": ak.dapo(entropy_coef=0.01), "route": route, **CHUNKS}
        made += [
            Case(f"policy {route}", R, R, options=options, **policy),
            Case(f"policy {route}, plain", (), (), options=options, **policy),
            Case(f"policy {route}, rows", S1, S1, options={**options, "objective": ak.gspo()}, **policy),
            Case(f"policy {route}, packed", S0, S0, call="linear_policy_loss", options=options, extras=("packed",)),
            Case(f"policy {route}, whole weight", S0, S0, R, P, options=options, **policy),
        ]
    if ranks == 4:
        again = ("plain hidden", "empty shards", "sharded rows", "padding", "min-p", "logits, min-p", "policy one-pass")
        made = [case for case in made if case.name in again]
        two = {"mesh": "dp,tp", "weight": ("R", "S0")}
        options = {"objective": ak.gspo(), **CHUNKS}
        part = {"grad_hidden": "partial"}
        made += [
            Case("one row of the mesh", R, R, a=R, d_a=R, extras=ALL, mesh="dp,tp[tp]"),
            Case("2-D, same rows", ("R", "R"), ("R", "R"), d_weight=("R", "S0"), a=("R", "R"), d_a=("R", "R"),
                 extras=ALL, **two),
            Case("2-D, own rollouts", ("S0", "R"), ("S0", "R"), d_weight=("P", "S0"), a=("R", "R"), d_a=("P", "R"),
                 extras=ALL, **two),
            Case("2-D, own rollouts, a part", ("S0", "R"), ("S0", "P"), d_weight=("P", "S0"), options=part, **two),
            Case("2-D, both", ("S0", "S1"), ("S0", "S1"), d_weight=("P", "S0"), a=("R", "R"), d_a=("P", "R"),
                 extras=ALL, **two),
            Case("2-D, the other way", ("S1", "S0"), ("S1", "S0"), weight=("S0", "R"), d_weight=("S0", "P"),
                 mesh="dp,tp", extras=("bias",)),
            Case("2-D, policy", ("S0", "S1"), ("S0", "S1"), d_weight=("P", "S0"), options=options, extras=("bias",),
                 call="linear_policy_loss", **two),
            Case("2-D, whole weight", ("S0", "S1"), ("S0", "S1"), weight=("R", "R"), d_weight=("P", "P"),
                 mesh="dp,tp", extras=("bias",)),
            Case("2-D, frozen, plain hidden", (), (), extras=("frozen",), **two),
            Case("2-D, logits", ("S0", "S2"), ("S0", "S2"), call="token_logprobs", mesh="dp,tp"),
            Case("2-D, logits, same rows", ("S2", "R"), ("S2", "R"), call="token_logprobs", mesh="dp,tp"),
            Case("2-D, logits of own rows", ("S0", "S1"), ("S0", "S1"), call="token_logprobs", mesh="dp,tp"),
        ]  # fmt: skip
    assert len({case.name for case in made}) == len(made)
    return made


def _work(cases: list[Case]) -> dict[str, Any]:
    """All that a rank does, in one process for all tests."""
    found: dict[str, Any] = {"cases": run_cases(cases), "refused": refused()}
    if dist.get_world_size() == 4:
        found["trained"] = {(inputs, route): train(inputs, route) for inputs in INPUTS for route in ROUTES}
    return found


@functools.cache
def results(ranks: int) -> list[dict[str, Any]]:
    return on_ranks(ranks, _work, _cases(ranks))


def close(got: torch.Tensor, expected: torch.Tensor, name: object, tolerance: float = 1e-12) -> None:
    size = expected.abs().max().item() if expected.numel() and expected.isfinite().all() else 1.0
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=tolerance * max(size, 1e-3), msg=lambda m: f"{name}: {m}"
    )


def _expected(case: Case, name: str, whole: dict[str, Any], part: dict[str, Any], rank: int, ranks: int) -> Any:
    """What a rank must have of the one process's values."""
    value = whole[name]
    if name in ("logprobs", "entropy"):
        return value.flatten()[part["rows"]]
    if name == "main_grad":  # a plain buffer, of the rank's own rows of the weight
        return [*value.chunk(ranks), value[:0]][rank]
    if name == "d_hidden" and case.options.get("hidden_layout") == "sequence_sharded":
        return value.chunk(ranks, -2)[rank]
    return value


NAMED = [pytest.param(ranks, case, id=f"{ranks} {case.name}") for ranks in (2, 4) for case in _cases(ranks)]


@pytest.mark.parametrize(("ranks", "case"), NAMED)
def test_ranks_equal_one_process(ranks, case):
    parts = [each["cases"][_cases(ranks).index(case)] for each in results(ranks)]
    for part in parts:
        assert not isinstance(part, str), part
        assert part["twice"], "another run gives other bits"
    whole = run_case(case)
    gradients = {name.removeprefix("d_") for name, x in whole.items() if name.startswith("d_") and x is not None}
    letters = {"hidden": case.d_hidden, "logits": case.d_hidden, "a": case.d_a}
    known = {name: letters.get(name, case.d_weight) for name in gradients}
    assert "loss" not in whole or gradients, "nothing to compare"
    for rank, part in enumerate(parts):
        assert set(whole) == set(part) - {"twice"}
        assert part["placements"] == {name: tuple(placements(x)) for name, x in known.items() if x}
        for name, value in whole.items():
            if isinstance(value, torch.Tensor) and name not in ("loss", "rows"):
                tolerance = 1e-6 if name == "main_grad" else 1e-12
                close(part[name], _expected(case, name, whole, part, rank, ranks), name, tolerance)
            elif name in ("route", *(f"d_{x}" for x in ("weight", "hidden"))) and not isinstance(value, torch.Tensor):
                assert part[name] == value
    if "loss" in whole:
        # Of ranks with other rows each has its part.
        shares = sum(part["rows"].numel() for part in parts) / whole["rows"].numel()
        close(sum(part["loss"] for part in parts) / shares, whole["loss"], "loss")
    same = [part for part in parts if torch.equal(part["rows"], parts[0]["rows"])]
    for name in {"loss", "logprobs", "entropy"} & set(whole):
        assert all(same_bits(same[0][name], part[name]) for part in same), f"{name} differs between the ranks"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("inputs", INPUTS)
def test_fsdp2_and_tensor_parallel_train_as_one_process(inputs, route):
    """Two steps of AdamW with clipped gradients, on a mesh of 2 x 2 ranks."""
    whole = train(None, route)
    hidden = {"plain": (), "replicated": R, "sharded": S1}[inputs]
    parts = [each["trained"][inputs, route] for each in results(4)]
    for part in parts:
        assert part["seen"] == tuple(tuple(placements(x)) for x in (hidden, S0))
        for name, value in whole["parameters"].items():
            close(part["parameters"][name], value, name, 1e-10)  # AdamW divides by the roots of small numbers
        for got, value in zip(part["norms"], whole["norms"], strict=True):
            close(got, value, "norm")
    for i, value in enumerate(whole["losses"]):
        close(sum(part["losses"][i] for part in parts) / 4, value, "loss")


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_refused(ranks):
    """By the same message on every rank, so that none waits for another."""
    for each in results(ranks):
        messages = each["refused"]
        assert len(messages) >= 38
        for name, (got, expected) in messages.items():
            assert re.search(expected, got), f"{name}: {got}"


def test_nothing_imports_dtensors_before_one_is_met():
    """At the top of a module, that is; PyTorch itself may have imported them."""
    root = Path(ak.__file__).parent
    for path in root.rglob("*.py"):
        if path.parent.name != "integrations":
            assert not re.search(r"^(from|import) torch\.distributed\.tensor", path.read_text(), re.MULTILINE), path
