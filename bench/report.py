"""The tables of README.md and docs/bench.md, and the figures, from the rows in bench/results/.

    python -m bench.report            # rewrites the blocks of both pages, docs/images/bench_*.png and summary_*.png
    python -m bench.report --tables   # the blocks alone, without matplotlib

A block lies between `<!-- data:NAME -->` and `<!-- end -->`; tests/test_bench.py fails where the rows give another.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.harness import RESULTS, ROOT, read

PAGES = (ROOT / "README.md", ROOT / "docs" / "bench.md")
IMAGES = ROOT / "docs" / "images"
BLOCK = re.compile(r"<!-- data:([\w-]+) -->\n.*?<!-- end -->", re.DOTALL)
NOT_MEASURED = "**Time on a GPU: not measured yet.**"


def rows_of(name: str, folder: Path = RESULTS / "cpu") -> list[dict]:
    path = folder / f"{name}.jsonl"
    return read(path) if path.exists() else []


def markdown(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def milliseconds(value: float) -> str:
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2f} ms"


def problems(rows: list[dict]) -> list[tuple]:
    """The problems of some rows, in their order; one that was measured twice is two, as their times do not compare."""
    keys = ("rows", "vocabulary", "hidden", "dtype", "active_fraction", "run")
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def title(problem: tuple) -> str:
    rows, vocabulary, hidden, dtype, share, run = problem
    width = f", H = {hidden}" if hidden else ""
    active = "" if share == 1 else f", {100 * share:.0f} % of the rollouts with an advantage"
    again = "" if run == 1 else f"; run {run}, not to be compared with another's times"
    return f"{rows} × {vocabulary}{width}, {dtype}{active}{again}"


def of(rows: list[dict], problem: tuple, mode: str = "both") -> list[dict]:
    return [row for row in rows if problems([row]) == [problem] and row["mode"] == mode]


def origin(rows: list[dict]) -> str:
    """Where some rows were measured, from what they say."""
    row = rows[0]
    versions: dict[str, str] = {}
    for other in rows:
        versions |= {name: version for name, version in other["versions"].items() if version}
    threads = f", {row['threads']} threads" if row["threads"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{row['device']}{threads}; {packages}; commit {row['commit']}"


def comparison(rows: list[dict]) -> str:
    """A table for each problem: time, ratio to eager, share of the limit, peak memory."""
    parts = []
    for problem in problems(rows):
        body = []
        for row in of(rows, problem):
            name = row["provider"] + (f" ({row['note']})" if row["note"] else "")
            if row["skipped"]:
                continue
            ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f}..{row['ratio_high']:.2f})"
            forward = next(r for r in of(rows, problem, "forward") if r["provider"] == row["provider"])
            cells = (milliseconds(row["median_ms"]), milliseconds(forward["median_ms"]), ratio)
            body.append((name, *cells, number(row["percent_of_limit"]) + " %", number(row["peak_mb"]) + " MB"))
        limit = next(row["limit_ms"] for row in of(rows, problem) if row["limit_ms"] is not None)
        header = (title(problem), "time", "of it forward", "× eager (min..max)",
                  f"of the limit, {milliseconds(limit)}", "peak above the inputs")  # fmt: skip
        parts.append(markdown(header, body))
    ran = {(problems([row])[0][:-1], row["provider"]) for row in rows if not row["skipped"]}  # in any run
    missing = (row for row in rows if row["skipped"] and (problems([row])[0][:-1], row["provider"]) not in ran)
    skipped = dict.fromkeys(f"{row['provider']}: {row['skipped']}" for row in missing)
    tail = f"\n\nNot run here: {'; '.join(skipped)}." if skipped else ""
    return "\n\n".join(parts) + tail + f"\n\n{origin(rows)}."


def memory(rows: list[dict]) -> str:
    parts = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        of_it = [row for row in rows if row["operation"] == operation and not row["skipped"]]
        first = of_it[0]
        width = f", H = {first['hidden']}" if first["hidden"] else ""
        body = []
        for row in of_it:
            peaks = {int(n): peak for n, peak in row["peaks"].items()}
            largest = row["largest_rows"]
            fits = (
                f"{largest} ({peaks[largest]:.0f} MB)"
                if largest
                else f"none tried; {min(peaks)}: {peaks[min(peaks)]:.0f} MB"
            )
            body.append((row["provider"], fits))
        header = (f"{operation}, V = {first['vocabulary']}{width}, {first['dtype']}",
                  f"most tokens within {first['budget_mb']:.0f} MB above the inputs, of those tried")  # fmt: skip
        parts.append(markdown(header, body))
    return "\n\n".join(parts)


def selection(rows: list[dict]) -> str:
    kinds = list(dict.fromkeys(row["objective"] for row in rows))
    body = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        cells = []
        for kind in kinds:
            row = next(row for row in rows if row["provider"] == provider and row["objective"] == kind)
            cells.append(f"{milliseconds(row['median_ms'])} ({row['ratio']:.2f})")
        body.append((provider, *cells))
    return markdown(("time (× sort)", *(kind.removeprefix("least 20 % of ") for kind in kinds)), body)


def scaling(rows: list[dict]) -> str:
    fits = [row for row in rows if row["point"] is None]
    body = []
    for operation, provider in dict.fromkeys((row["operation"], row["provider"]) for row in fits):
        exponents = {
            row["axis"]: row["exponent"] for row in fits if (row["operation"], row["provider"]) == (operation, provider)
        }
        body.append((f"{operation}, {provider}", *(number(exponents.get(axis), 2) for axis in "NVH")))
    return markdown(("exponent of the time in", "N", "V", "H"), body)


def machine_code(rows: list[dict]) -> str:
    """Kernels over the logits on sm_90, ours and the peers', with both limits on an H200."""
    chosen = [row for row in rows if row["target"] == "sm_90" and row["limits_ms"] and row["dtype"] == "bf16"]
    body = []
    for row in chosen:
        limits = row["limits_ms"]["H200"]
        source = "" if row["source"] == "ours" else f" ({row['source']})"
        figures = [str(row["registers"]), f"{row['spills']} / {row['spills_in_loop']}"]
        figures += [str(row[key]) for key in ("narrowest_load", "barriers_in_loop", "warps_resident")]
        figures.append(f"{row['bytes_in_flight'] / 1024:.0f} KB")
        times = (f"{limits[key]:.2f} ms" for key in ("instructions", "bytes"))
        body.append((row["kernel"] + source, number(row["per_element"], 2), *figures, *times))
    first = chosen[0]
    header = ("kernel, sm_90", "instructions an element", "registers", "bytes spilled / spills in the loops",
              "narrowest load in the loops, bits", "barriers in the loops",
              "warps an SM holds", "their loads in flight", "H200, to issue them", "to move the bytes")  # fmt: skip
    return (
        markdown(header, body)
        + f"\n\nBy arithmetic for {first['rows']} × {first['vocabulary']}; Triton {first['triton']}."
    )


def gpu(folders: Iterable[Path]) -> str:
    """The benches' tables of each GPU that was measured, under its name and the commit."""
    parts = []
    for folder in sorted(folders):
        found = [rows for name in ("logits", "linear") if (rows := rows_of(name, folder))]
        if found:
            commits = ", ".join(dict.fromkeys(row["commit"] for rows in found for row in rows))
            parts.append(f"**{found[0][0]['device']}**, the kernels of commit {commits}; later ones: not measured.")
        parts += map(comparison, found)
    return "\n\n".join(parts) or NOT_MEASURED


# Lines of the README's table: the label, and the provider from logits and from hidden states.
SUMMARY = (
    ("**a3po_kernels**", "ours", "ours, one pass"),
    ("**a3po_kernels**, least memory", "ours, in place", "ours, recompute"),
    ("TRL", "TRL logits kernel", "TRL head"),
    ("Liger, GRPO", "Liger Triton GRPO", "Liger chunked GRPO"),
    ("Liger, scaled cross entropy", None, "Liger scaled cross entropy, fallback"),
    ("verl, `linear_cross_entropy`", None, "verl linear_cross_entropy"),
    ("cut-cross-entropy", None, "CCE"),
    ("`torch.compile`", "torch.compile", "torch.compile"),
    ("PyTorch, eager", "eager", "eager"),
)


def summary_columns(folder: Path, dtype: str = "bf16") -> list[tuple[str, list[dict], int]]:
    """(title, rows of one problem, which of SUMMARY's providers) of each column of the README's table, of a GPU."""
    columns: list[tuple[str, list[dict], int]] = []
    for at, name, text in ((1, "logits", "from logits"), (2, "linear", "from hidden states")):
        rows = [row for row in rows_of(name, folder) if row["dtype"] == dtype]
        if not rows:
            continue
        newest = max(row["run"] for row in rows)
        first = problems([row for row in rows if row["run"] == newest])[0]
        for share in dict.fromkeys((1.0, 0.2) if name == "linear" else (1.0,)):
            found = of(rows, (*first[:4], share, *first[5:]))
            active = "" if share == 1 else f", {100 * share:.0f} % of the rollouts with an advantage"
            if found:
                columns.append((text + active, found, at))
    return columns


def saving(columns: list[tuple[str, list[dict], int]]) -> str:
    """The table in a sentence: ours from hidden states beside TRL's head, and what the first column leaves out."""
    said, beside = [], (SUMMARY[0], next(line for line in SUMMARY if line[0] == "TRL"))
    for text, rows, at in columns:
        if not text.startswith("from hidden states"):
            continue
        ran = {row["provider"]: row for row in rows if not row["skipped"]}
        if all(line[at] in ran for line in beside):
            share = text.removeprefix("from hidden states, ")
            found = [ran[line[at]] for line in beside]
            taken = [f"{milliseconds(row['median_ms'])} and {row['peak_mb'] / 1000:.1f} GB" for row in found]
            said.append((f"with {share}, " if share != text else "") + f"{taken[0]} where TRL's head takes {taken[1]}")
    first = columns[0][1][0]
    held = first["rows"] * first["vocabulary"] * (4 if first["dtype"] == "fp32" else 2) / 1e6
    rest = f"The logits, {number(held)} MB, are an input of the first column; in the others they count, where formed."
    return (f"From hidden states: {'; '.join(said)}. " if said else "") + rest


def summary(folders: Iterable[Path]) -> str:
    """One table a GPU: time and peak memory of forward and backward, ours, the peers' and the limit, in bf16."""
    parts = []
    for folder in sorted(folders):
        columns = summary_columns(folder)
        if not columns:
            continue
        body: list[tuple[str, ...]] = []
        notes: dict[str, list[str]] = {}
        for line in SUMMARY:
            cells: list[str] = []
            for _, rows, at in columns:
                row = next((row for row in rows if row["provider"] == line[at]), None)
                if row is None or row["skipped"]:
                    cells += ("–", "–")
                else:
                    cells += (milliseconds(row["median_ms"]), number(row["peak_mb"]) + " MB")
                said = row and (f"not run, {row['skipped']}" if row["skipped"] else row["note"])
                if said and not line[0].startswith("**"):
                    notes.setdefault(line[0], []).extend(said.split("; "))
            if set(cells) != {"–"}:
                body.append((line[0], *cells))
        limits = [next(row["limit_ms"] for row in rows if row["limit_ms"] is not None) for _, rows, _ in columns]
        body.append(("the limit", *(cell for limit in limits for cell in (milliseconds(limit), ""))))
        header = ["forward and backward", *(cell for title, _, _ in columns for cell in (title, "peak above inputs"))]
        every = [row for _, rows, _ in columns for row in rows]
        sizes = every[0]
        width = next((f", H = {row['hidden']}" for row in every if row["hidden"]), "")
        remarks = "; ".join(f"{name}: {', '.join(dict.fromkeys(texts))}" for name, texts in notes.items())
        parts.append(
            f"{sizes['rows']} tokens, V = {sizes['vocabulary']}{width}, {sizes['dtype']}. {saving(columns)}\n\n"
            + markdown(header, body)
            + (f"\n\n{remarks}." if remarks else "")
            + f"\n\n{origin(every)}; later kernels: not measured."
        )
    return "\n\n".join(parts) or NOT_MEASURED


def blocks() -> dict[str, str]:
    """Name -> text of every block, from the rows that are there."""
    folders = [path for path in RESULTS.iterdir() if path.is_dir() and path.name != "cpu"]
    makers: dict[str, Callable[[list[dict]], str]] = {
        "logits": comparison, "linear": comparison, "memory": memory, "selection": selection, "scaling": scaling,
    }  # fmt: skip
    found = {name: make(rows) for name, make in makers.items() if (rows := rows_of(name))}
    found["machine-code"] = machine_code(rows_of("machine_code", RESULTS))
    return {**found, "gpu": gpu(folders), "gpu-summary": summary(folders)}


def render(text: str, made: dict[str, str]) -> str:
    """A page with its blocks as the rows give them; KeyError for a block that nothing makes."""
    return BLOCK.sub(lambda match: f"<!-- data:{match[1]} -->\n{made[match[1]]}\n<!-- end -->", text)


def draw(rows: list[dict], path: Path) -> None:
    """A panel for each problem: a bar for each provider, and beside it the limit of the problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    listed = problems(rows)
    columns = 2
    lines = -(-len(listed) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(15, 3.6 * lines), layout="constrained", squeeze=False)
    for axis in axes.flatten()[len(listed) :]:
        axis.set_visible(False)
    for axis, problem in zip(axes.flatten(), listed, strict=False):
        shown = [row for row in of(rows, problem) if not row["skipped"]]
        names = [row["provider"] for row in shown]
        colours = ["C0" if name.startswith("ours") else "0.6" for name in names]
        spread = [
            [row["median_ms"] - row["low_ms"] for row in shown],
            [row["high_ms"] - row["median_ms"] for row in shown],
        ]
        places = range(len(shown))
        axis.barh(places, [row["median_ms"] for row in shown], 0.55, xerr=spread, color=colours, ecolor="0.3")
        axis.barh([p + 0.4 for p in places], [row["limit_ms"] for row in shown], 0.2, color="C3", label="limit")
        for place, row in zip(places, shown, strict=True):
            text = milliseconds(row["median_ms"]).removesuffix(" ms")
            axis.text(row["high_ms"], place, f" {text}", va="center", fontsize=8)
        axis.set_yticks(places, names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_title(textwrap.fill(title(problem), 60), fontsize=10)
        axis.set(xlabel="forward + backward, ms (median, 10 % and 90 % quantiles)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", fontsize=9)
    figure.suptitle(
        f"{rows[0]['device']}: the limit is the memory traffic or the products at this machine's measured rates"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_summary(folder: Path, path: Path) -> None:
    """The README's table as bars: a column of panels for each of its columns, time above memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = summary_columns(folder)
    figure, axes = plt.subplots(2, len(columns), figsize=(4.6 * len(columns), 6), layout="constrained", squeeze=False)
    for column, (text, rows, at) in zip(axes.T, columns, strict=True):
        shown = [(line[0].replace("*", "").replace("`", ""), row) for line in SUMMARY for row in rows
                 if row["provider"] == line[at] and not row["skipped"]]  # fmt: skip
        names = [name for name, _ in shown]
        colours = ["C0" if name.startswith("a3po") else "0.6" for name in names]
        for axis, key, unit in zip(column, ("median_ms", "peak_mb"), ("ms", "MB above the inputs"), strict=True):
            values = [row[key] for _, row in shown]
            axis.barh(range(len(shown)), values, 0.7, color=colours)
            for place, value in enumerate(values):
                label = milliseconds(value).removesuffix(" ms") if unit == "ms" else number(value)
                axis.text(value, place, f" {label}", va="center", fontsize=8)
            axis.set_yticks(range(len(shown)), names, fontsize=8)
            axis.invert_yaxis()
            axis.margins(x=0.2)
            axis.set_xlabel(unit)
        limit = next(row["limit_ms"] for row in rows if row["limit_ms"] is not None)
        column[0].axvline(limit, color="C3", label=f"limit, {milliseconds(limit)}")
        column[0].legend(loc="center right", fontsize=8)
        column[0].set_title(textwrap.fill(text, 40), fontsize=10)
    first = columns[0][1][0]
    figure.suptitle(f"{first['device']}, {first['dtype']}: forward and backward, commit {first['commit']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="no figures")
    args = parser.parse_args()
    made = blocks()
    for page in PAGES:
        page.write_text(render(page.read_text(), made))
    if not args.tables:
        for folder in (path for path in RESULTS.iterdir() if path.is_dir()):
            for name in ("logits", "linear"):
                if rows := rows_of(name, folder):
                    draw(rows, IMAGES / f"bench_{folder.name}_{name}.png")
            if folder.name != "cpu" and summary_columns(folder):
                draw_summary(folder, IMAGES / f"summary_{folder.name}.png")


if __name__ == "__main__":
    main()
