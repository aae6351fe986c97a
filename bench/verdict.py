"""What a table of times, or of peaks, says, in words: who is ahead, by how much, and how far from the limit."""

from __future__ import annotations

from collections.abc import Collection, Mapping

LEVEL = 1.03  # two times nearer than this are not told apart
NOISY = 1.5  # greatest over least ratio of the same two providers


def milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def bound(row: Mapping, known: Mapping[str, float]) -> str:
    """What the limit of a row is the limit of, by the rates that were measured."""
    if row["limit_flops"] and row["limit_flops"] / known[row["dtype"]] >= row["limit_bytes"] / known["copy"]:
        return f"the products at {known[row['dtype']] / 1e12:.3g} TFLOP/s"
    return f"the memory traffic at {known['copy'] / 1e9:.3g} GB/s"


def named(row: Mapping) -> str:
    return row["provider"] + (f" ({row['note']})" if row["note"] else "")


def from_limit(time: float, limit: float | None, what: str) -> str:
    """How far a time is from its limit, both in ms; what: the limit's own name."""
    if limit is None:
        return "How far from the limit: not known, its rate was not measured here."
    if time <= limit:
        return f"It takes no longer than the limit of {milliseconds(limit)} ({what}, as measured here)."
    return f"It takes {time / limit:.2f} times the limit of {milliseconds(limit)} ({what}, as measured here)."


def of_times(rows: Collection[Mapping], contenders: Collection[str], known: Mapping[str, float]) -> str:
    """Sentences on forward + backward of one problem, by the ratios of calls in the same turn, where the baseline ran.

    contenders: the providers that compute the baseline's loss; others are no faster way to it, and are not named.
    """
    ran = [r for r in rows if r["mode"] == "both" and not r["skipped"] and r["provider"] in contenders]
    if not ran:
        return "Fastest: nobody ran."
    key = "ratio" if any(row["provider"] == row["baseline"] for row in ran) else "median_ms"
    order = sorted(ran, key=lambda row: row[key])
    first, best, limit = order[0], order[0][key], order[0]["limit_ms"]
    against = ""
    if key == "ratio" and first["provider"] != first["baseline"]:
        against = f", {1 / best:.2f} times as fast as {first['baseline']}"
    lines = [f"Fastest: {named(first)}, {milliseconds(first['median_ms'])} forward and backward{against}."]
    if level := [row["provider"] for row in order[1:] if row[key] < LEVEL * best]:
        lines.append(f"Level with it, within {100 * (LEVEL - 1):.0f} %: {', '.join(level)}.")
    if behind := order[1 + len(level) :]:
        lines.append(f"Next: {named(behind[0])}, {behind[0][key] / best:.2f} times its time.")
    if first["ratio_high"] > NOISY * first["ratio_low"]:
        span = f"{first['ratio_low']:.2f} to {first['ratio_high']:.2f} times {first['baseline']}'s"
        lines.append(f"Too noisy to rank by: the fastest's calls took {span}. Repeat it on a quieter machine.")
    lines.append(from_limit(first["median_ms"], limit, "" if limit is None else bound(first, known)))
    if peaks := {row["provider"]: row["peak_mb"] for row in ran if row["peak_mb"] is not None}:
        least = min(peaks, key=lambda name: peaks[name])
        lines.append(f"Least memory: {least}, {peaks[least]:.0f} MB above the inputs.")
    return "\n".join(lines)


def of_stages(stages: Mapping[str, float], limit: float | None) -> str:
    """Sentences on a profile: its operations' own times in ms by stage, and the step's limit in ms."""
    total = sum(stages.values())
    most = max(stages, key=lambda name: stages[name])
    first = f"The step's operations take {milliseconds(total)}, most of it {most}: {100 * stages[most] / total:.0f} %."
    return first + "\n" + from_limit(total, limit, "traffic or products")


def of_peaks(rows: Collection[Mapping], operation: str, baseline: str, tokens: int | None) -> str:
    """A sentence on rows of bench_memory of one loss: the least peak at so many tokens, or the most tokens that fit."""
    ran = [row for row in rows if not row["skipped"]]
    if tokens is not None:
        peaks = {row["provider"]: row["peaks"][tokens] for row in ran}
        if not peaks:
            return f"{operation}: nobody ran."
        least = min(peaks, key=lambda name: peaks[name])
        against = f"; {baseline}: {peaks[baseline]:.0f} MB" if baseline in peaks and least != baseline else ""
        told = f"{least}, {peaks[least]:.0f} MB above the inputs{against}"
        return f"{operation}, least memory for {tokens} tokens: {told}."
    most = {row["provider"]: row["largest_rows"] for row in ran if row["largest_rows"]}
    if not most:
        return f"{operation}: nobody kept within the budget."
    best = max(most, key=lambda name: most[name])
    against = f"; {baseline}: {most[baseline]}" if baseline in most and best != baseline else ""
    return f"{operation}, most tokens within the budget: {best}, {most[best]} of those tried{against}."
