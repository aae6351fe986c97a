"""docs/scaling.md shows what the model and the rows give, and the fits recover what was planted."""

from __future__ import annotations

import re

import pytest
import torch
from batches import INTERPRETED

from bench import bench_collectives, harness, report, scaling_page
from bench.bench_collectives import bytes_of, fit

pytestmark = pytest.mark.skipif(INTERPRETED, reason="arithmetic, natively")
ROWS = harness.RESULTS / "cpu" / "collectives.jsonl"


def test_every_table_of_the_page_is_what_the_code_makes():
    page, made = scaling_page.PAGE.read_text(), scaling_page.blocks()
    assert set(report.BLOCK.findall(page)) == made.keys()
    assert report.render(page, made) == page, "run: python -m bench.scaling_page"
    # No other table of the page holds a measure.
    cells = re.findall(r"^\|.*\|$", report.BLOCK.sub("", page), re.MULTILINE)
    assert cells and not [cell for cell in cells if re.search(r"\d (ms|MB|%|GB/s)\b", cell)]


def test_a_changed_number_of_the_page_is_found():
    page, made = scaling_page.PAGE.read_text(), scaling_page.blocks()
    for name, text in made.items():
        figure = re.search(r"\d+\.\d+", text)
        assert figure, name
        changed = page.replace(text, text.replace(figure[0], "12345.6", 1))
        assert changed != page and report.render(changed, made) == page


def test_the_tables_reach_from_a_node_to_1024_gpus():
    for name in ("growing-batch", "fixed-batch"):
        gpus = {int(line.split("|")[1]) for line in scaling_page.blocks()[name].splitlines()[2:]}
        assert gpus == {8, 16, 32, 64, 128, 256, 512, 1024}


def test_the_estimate_of_one_gpu_is_near_what_was_measured():
    """Within 6 % where the products take over 15 ms, and the peak within 5 %."""
    lines = [line.split("|")[1:-1] for line in scaling_page.blocks()["one-gpu"].split("\n\n")[0].splitlines()[2:]]
    assert len(lines) == 6
    for cells in lines:
        values = [float(re.sub(r"[^\d.+-]", "", cell)) for cell in cells[3:]]
        measured, _, error, peak, estimated = values
        assert measured < 15 or abs(error) <= 6, cells
        assert estimated == pytest.approx(peak, rel=0.05), cells


def test_fit_recovers_what_was_planted():
    sizes = [1e3, 1e4, 1e5, 1e6]
    a, b, error = fit(sizes, [0.2 + 3e-6 * size for size in sizes])
    assert (a, b) == pytest.approx((0.2, 3e-6), rel=1e-9) and error < 1e-9
    # Every size counts alike: twice the smallest time moves a, which its absolute error would not.
    a, _, error = fit(sizes, [0.406, *(0.2 + 3e-6 * size for size in sizes[1:])])
    assert a > 0.23 and error > 0.1


def test_growth_beside_the_model():
    """Planted rows whose cost a byte is the model's on two shared cores give its ratios back."""
    rows = []
    for operation, ratio in (("statistics", 6.0), ("dHidden", 3.0)):
        for ranks, slope in ((1, 0.0), (2, 1e-6), (4, ratio * 1e-6)):
            for size in (1e3, 1e5, 1e6):
                time = 0.1 + slope * size
                rows.append({"operation": operation, "kind": bench_collectives.KINDS[operation], "ranks": ranks,
                             "bytes": size, "median_ms": time, "low_ms": time, "cores": 2, "run": 3})  # fmt: skip
    rows += [{**row, "run": 2, "median_ms": 7.0, "low_ms": 7.0} for row in rows]  # an earlier run is not in it
    made = scaling_page.growth(rows).splitlines()
    cells = {tuple(line.split(" | ")[:2]): line.removesuffix(" |").split(" | ")[5:] for line in made[2:]}
    assert cells["| statistics, all_gather", "4"] == ["6.00", "6.00", "3.00", "6.00"]
    assert cells["| dHidden, all_reduce", "4"] == ["3.00", "3.00", "1.50", "3.00"]
    assert cells["| dHidden, all_reduce", "1"] == ["–"] * 4


def test_rows_of_the_collectives():
    rows = harness.read(ROWS)
    last = scaling_page.last_run(rows)
    assert {(row["operation"], row["ranks"]) for row in last} == {
        (operation, ranks) for operation in bench_collectives.ROWS for ranks in bench_collectives.RANKS
    }
    for row in rows:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["repeats"] >= 5
        assert row["bytes"] == bytes_of(row["operation"], row["rows"], row["hidden"] or 0)
        assert row["commit"] and row["versions"]["torch"] and row["cores"] and row["load"] >= 0


@pytest.mark.slow
def test_two_ranks_are_measured():
    points = [("statistics", 8), ("dHidden", 2)]
    measured = bench_collectives.times(2, points, 3)
    assert [len(values) for values in measured] == [3, 3] and all(t > 0 for values in measured for t in values)
    rows = bench_collectives.make_rows(2, points, measured, 0.5, 4)
    known = harness.read(ROWS)[0].keys()
    assert all(row.keys() == known and row["run"] == 4 for row in rows)
    assert [row["bytes"] for row in rows] == [128, 2 * 4 * bench_collectives.HIDDEN]


def test_a_fit_of_numbers_that_no_line_fits_says_so():
    assert fit([1.0, 2.0, 3.0], torch.tensor([1.0, 10.0, 1.0]).tolist())[2] > 0.4
