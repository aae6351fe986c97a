"""The tables of docs/scaling.md: the estimates, one GPU's beside what was measured, and the fits of gloo's times.

    python -m bench.scaling_page    # rewrites the page's blocks; tests/test_scaling_page.py fails where they differ
"""

from __future__ import annotations

import torch

from a3po_kernels.planning import HeadStep, estimate_step, tables, wire_bytes
from bench import report
from bench.bench_collectives import fit
from bench.harness import RESULTS, ROOT

PAGE = ROOT / "docs" / "scaling.md"
# What the providers of bench_linear call, as the model's arguments.
OURS: dict[str, dict] = {
    "ours, one pass": {"route": "one-pass"}, "ours, recompute": {"route": "recompute"},
    "ours, every row": {"route": "one-pass", "active_fraction": 1.0},
    "ours, one pass, active statistics": {"route": "one-pass", "statistics": "active"},
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def one_gpu(rows: list[dict]) -> str:
    """Time and peak memory of the linear head, measured and estimated, on the card whose rates are the defaults."""
    chosen = [row for row in rows if row["provider"] in OURS and row["mode"] == "both" and not row["skipped"]]
    chosen = [row for row in chosen if row["run"] == max(row["run"] for row in chosen)]
    body = []
    for row in chosen:
        said = {"active_fraction": row["active_fraction"], **OURS[row["provider"]]}
        sizes = (row["rows"], row["vocabulary"], row["hidden"], DTYPES[row["dtype"]])
        found = estimate_step(HeadStep(*sizes, **said))
        time, peak = 1e3 * found.seconds, found.memory["total"] / 1e6
        body.append((
            row["provider"].removeprefix("ours, "), f"{row['rows']} × {row['vocabulary']} × {row['hidden']}",
            f"{100 * row['active_fraction']:.0f} %", f"{row['median_ms']:.1f} ms", f"{time:.1f} ms",
            f"{100 * (time / row['median_ms'] - 1):+.0f} %", f"{row['peak_mb']:.0f} MB", f"{peak:.0f} MB",
        ))  # fmt: skip
    header = ("route", "N × V × H", "active", "measured", "estimated", "error", "peak measured", "peak estimated")
    return report.markdown(header, body) + f"\n\n{report.origin(chosen)}."


def last_run(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["run"] == max(row["run"] for row in rows)]


def slopes(rows: list[dict], key: str) -> dict[tuple[str, int], tuple[float, float, float]]:
    """(operation, ranks) -> fit() of the rows' times by their bytes."""
    found = {}
    for operation, ranks in dict.fromkeys((row["operation"], row["ranks"]) for row in rows):
        mine = [row for row in rows if (row["operation"], row["ranks"]) == (operation, ranks)]
        found[operation, ranks] = fit([row["bytes"] for row in mine], [row[key] for row in mine])
    return found


def points(rows: list[dict]) -> str:
    rows = last_run(rows)
    ranks = list(dict.fromkeys(row["ranks"] for row in rows))
    body = []
    for operation, size in dict.fromkeys((row["operation"], row["bytes"]) for row in rows):
        mine = {row["ranks"]: row for row in rows if (row["operation"], row["bytes"]) == (operation, size)}
        cells = (f"{mine[n]['median_ms']:.3f} ({mine[n]['low_ms']:.3f}..{mine[n]['high_ms']:.3f})" for n in ranks)
        body.append((f"{operation}, {mine[ranks[0]]['kind']}", f"{size / 1e3:.0f}", *cells))
    header = ("collective", "kB of each rank", *(f"{n} rank{'s' if n > 1 else ''}, ms" for n in ranks))
    loads = ", ".join(f"{load:.1f}" for load in {row["ranks"]: row["load"] for row in rows}.values())
    where = f"{rows[0]['cores']} cores, load before the ranks started {loads}"
    spread = f"Median (10 %..90 %) of {rows[0]['repeats']} calls"
    return report.markdown(header, body) + f"\n\n{spread}; {where}; {report.origin(rows)}."


def growth(rows: list[dict]) -> str:
    """The fitted a + b bytes of each number of ranks, and how b grows beside the model's wire bytes."""
    rows = last_run(rows)
    cores, kinds = rows[0]["cores"], {row["operation"]: row["kind"] for row in rows}
    middle, low = slopes(rows, "median_ms"), slopes(rows, "low_ms")
    body = []
    for (operation, ranks), (a, b, error) in middle.items():
        kind, size = kinds[operation], 1 << 30
        wire = wire_bytes(kind, size, ranks) / wire_bytes(kind, size, 2)
        # All ranks' bytes go through the cores that there are.
        shared = wire * (ranks / min(ranks, cores)) / (2 / min(2, cores))
        measured = (b / middle[operation, 2][1], low[operation, ranks][1] / low[operation, 2][1])
        ratios = ("–",) * 4 if ranks == 1 else tuple(f"{x:.2f}" for x in (*measured, wire, shared))
        body.append((
            f"{operation}, {kind}", str(ranks), f"{a:.3f}", f"{1e6 * b:.3f}", f"{100 * error:.0f} %", *ratios,
        ))  # fmt: skip
    header = ("collective", "ranks", "a, ms", "b, ms a MB", "error of the fit", "b / b of 2 ranks",
              "the same of the 10 % quantiles", "model", f"model, {cores} cores shared")  # fmt: skip
    return report.markdown(header, body)


def blocks() -> dict[str, str]:
    """Name -> text of every block of the page."""
    measured = report.rows_of("collectives")
    return {
        "one-gpu": one_gpu(report.rows_of("linear", RESULTS / "nvidia-h200")), "growing-batch": tables.growing_batch(),
        "fixed-batch": tables.fixed_batch(), "by-link": tables.by_link(), "gloo": points(measured),
        "gloo-fit": growth(measured),
    }  # fmt: skip


def main() -> None:
    PAGE.write_text(report.render(PAGE.read_text(), blocks()))


if __name__ == "__main__":
    main()
