"""The plan against what was measured: every figure from bench/results, of an H200 and, for peaks of PyTorch, a CPU."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED

from a3po_kernels.planning import HeadStep, beside, estimate_memory
from a3po_kernels.planning.cards import CARDS
from a3po_kernels.planning.model import assumed_model
from a3po_kernels.planning.plan import Plan, make_plan
from bench.harness import RESULTS, read

pytestmark = pytest.mark.skipif(INTERPRETED, reason="arithmetic, natively")
H200 = CARDS["h200"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Each of ours as the plan's arguments; "ours, every row" is held below.
OURS: dict[str, dict] = {
    "ours, one pass": {}, "ours, one pass, a3po": {"objective": "a3po"}, "ours, recompute": {"route": "recompute"},
    "ours, with a plan": {}, "ours, one pass, active statistics": {"statistics": "active"},
}  # fmt: skip
PEERS = {"eager": "eager PyTorch", "torch.compile": "torch.compile", "TRL head": "TRL's chunked head"}


def rows_of(folder: str, operation: str) -> list[dict]:
    """Those of the last run, forward and backward, that were run."""
    every = read(RESULTS / folder / f"{operation}.jsonl")
    rows = [row for row in every if row["mode"] == "both" and not row["skipped"]]
    return [row for row in rows if row["run"] == max(row["run"] for row in rows)]


LINEAR = rows_of("nvidia-h200", "linear")
NAME = {"ids": lambda row: f"{row['provider']}, {row['active_fraction']}"}
MINE = [row for row in LINEAR if row["provider"] in OURS]
THEIRS = [row for row in LINEAR if row["provider"] in PEERS]


def planned(row: dict, **changes) -> Plan:
    sizes = (row["rows"], row["vocabulary"], row["hidden"], DTYPES[row["dtype"]])
    step = HeadStep(*sizes, active_fraction=row["active_fraction"], **changes)
    return make_plan(step, H200, assumed_model(row["hidden"], row["vocabulary"]))


def test_there_is_something_to_hold_it_against():
    assert {row["provider"] for row in MINE} == set(OURS) and {row["provider"] for row in THEIRS} == set(PEERS)
    assert {row["active_fraction"] for row in THEIRS} >= {0.2, 1.0}
    assert {row["device"] for row in LINEAR} == {"NVIDIA H200"}


@pytest.mark.parametrize("row", MINE, **NAME)
def test_our_memory_within_one_percent(row):
    found = planned(row, **OURS[row["provider"]]).estimate.memory
    assert found["total"] / 1e6 == pytest.approx(row["peak_mb"], rel=0.01)
    alone = estimate_memory(
        row["rows"], row["hidden"], row["vocabulary"], device="h200", active_fraction=row["active_fraction"],
        **OURS[row["provider"]],
    )  # fmt: skip
    assert alone["total"] == found["total"] and alone.peak.items() <= found.peak.items()


def test_our_memory_where_every_row_is_multiplied():
    """The plan has no word for compaction="none", which clears hidden states in a copy."""
    (row,) = (row for row in LINEAR if row["provider"] == "ours, every row")
    found = planned({**row, "active_fraction": 1.0}).estimate.memory["total"]
    copied = found + 2 * row["rows"] * row["hidden"]
    assert copied / 1e6 == pytest.approx(row["peak_mb"], rel=0.01)


@pytest.mark.parametrize("row", MINE, **NAME)
def test_our_time(row):
    """Within 6 %; below 15 ms, where launches and the work on N numbers show, no more than measured and within 20 %."""
    found = 1e3 * planned(row, **OURS[row["provider"]]).estimate.seconds
    if row["median_ms"] >= 15:
        assert found == pytest.approx(row["median_ms"], rel=0.06)
    else:
        assert 0.8 * row["median_ms"] <= found <= row["median_ms"]


@pytest.mark.parametrize("row", THEIRS, **NAME)
def test_their_memory_within_a_thousandth(row):
    formula = {one.name: one for one in planned(row).beside}[PEERS[row["provider"]]]
    assert formula.memory / 1e6 == pytest.approx(row["peak_mb"], rel=1e-3)


@pytest.mark.parametrize("row", THEIRS, **NAME)
def test_their_time(row):
    """Within 5 %; with rows of zeros in the products, which take less power and so less time, within 10 %."""
    formula = {one.name: one for one in planned(row).beside}[PEERS[row["provider"]]]
    assert 1e3 * formula.seconds == pytest.approx(row["median_ms"], rel=0.05 if row["active_fraction"] == 1 else 0.1)


def test_the_tolerance_tells_that_trl_forms_its_tiles_again():
    for row in (row for row in THEIRS if row["provider"] == "TRL head"):
        formula = planned(row).beside[-1]
        once = formula.seconds - 2 * row["rows"] * row["vocabulary"] * row["hidden"] / H200.rates.flops
        assert 1e3 * once < 0.9 * row["median_ms"]


def test_trls_memory_with_narrower_tiles(monkeypatch):
    (row,) = (r for r in LINEAR if r["provider"] == "TRL head, 8192 columns" and r["active_fraction"] == 1)
    monkeypatch.setattr(beside, "TRL_COLUMNS", 8192)
    formula = planned(row).beside[-1]
    assert formula.memory / 1e6 == pytest.approx(row["peak_mb"], rel=1e-3)
    assert 1e3 * formula.seconds == pytest.approx(row["median_ms"], rel=0.05)


@pytest.mark.parametrize(
    "row", [row for row in rows_of("cpu", "linear") if row["provider"] in ("eager", "torch.compile")],
    ids=lambda row: f"{row['provider']}, {row['rows']}, {row['dtype']}, {row['active_fraction']}",
)  # fmt: skip
def test_pytorchs_memory_at_other_sizes_and_dtypes(row):
    """On a CPU, of which the process's high-water mark was measured: within 3 %."""
    formula = {one.name: one for one in planned(row).beside}[PEERS[row["provider"]]]
    assert formula.memory / 1e6 == pytest.approx(row["peak_mb"], rel=0.03)


@pytest.mark.parametrize("row", LINEAR, **NAME)
def test_nothing_was_faster_than_the_limit(row):
    statistics = "active" if row["provider"] == "ours, one pass, active statistics" else "all"
    limit = planned(row, statistics=statistics).limit
    assert limit.seconds < row["median_ms"] / 1e3
    if statistics == "all":
        assert (limit.operations, limit.moved) == (row["limit_flops"], row["limit_bytes"])


def test_the_rates_of_the_measured_card():
    """Of its copy, by which the rows' limits were taken, and of the head's three products alone: within 1 %."""
    (products,) = (r for r in LINEAR if r["provider"] == "three GEMMs alone" and r["active_fraction"] == 1)
    flops = products["limit_flops"] / products["median_ms"] * 1e3
    row = rows_of("nvidia-h200", "logits")[0]
    copy = row["limit_bytes"] / row["limit_ms"] * 1e3
    rates = H200.rates
    assert rates.origin == "measured" and (rates.flops, rates.copy) == pytest.approx((flops, copy), rel=0.01)
    for name, card in CARDS.items():
        assert (card.measured is not None) == (name == "h200"), "a card that was measured has rows in bench/results"
        assert card.rates.flops / card.flops == pytest.approx(rates.flops / H200.flops)
        assert card.rates.copy / card.bandwidth == pytest.approx(rates.copy / H200.bandwidth)
