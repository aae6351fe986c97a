"""docs/objectives.md beside the presets: a row each, its keywords those of the signature, its defaults the defaults."""

from __future__ import annotations

import inspect
import re

import objectives_page
import pytest

from a3po_kernels import Clip, presets
from a3po_kernels.named_objectives import CLIP_OVERRIDES, OVERRIDES

TEXT = objectives_page.PAGE.read_text(encoding="utf-8")
CALLS = objectives_page.preset_calls(TEXT)


def defaults(name: str) -> dict:
    """Of its own parameters, short of those that the text over the table names once."""
    parameters = inspect.signature(presets[name]).parameters
    shared = set(OVERRIDES) | (set(CLIP_OVERRIDES) if "dual_clip" in parameters else set())
    return {p.name: p.default for p in parameters.values() if p.name not in shared}


def wrong(name: str, printed: dict) -> str | None:
    """What is wrong with a row, or None."""
    if name not in presets:
        return f"{name} is no preset"
    own, made = defaults(name), presets[name]()
    # What a preset fixes for its surrogate, level and aggregation is printed as well.
    shared = {"aggregation"} | ({"epsilon_low", "epsilon_high"} if isinstance(made.surrogate, Clip) else set())
    shared |= {"ratio_level"} if made.ratio_level != "token" else set()
    if set(printed) != set(own) | shared:
        return f"{name} prints {sorted(printed)} and takes {sorted(set(own) | shared)}"
    for key, default in own.items():
        if printed[key] != default or type(printed[key]) is not type(default):
            return f"{name} prints {key}={printed[key]!r} and has {default!r}"
    return None if presets[name](**printed) == made else f"{name} is not what its row says"


def test_what_every_preset_takes_is_named_over_the_table():
    text = TEXT.partition("## Presets")[2].partition("<!-- presets -->")[0]
    assert re.findall(r"`(\w+)`", text) == [*OVERRIDES, *CLIP_OVERRIDES]


def test_every_preset_has_one_row():
    assert sorted(name for name, _ in CALLS) == sorted(presets)


@pytest.mark.parametrize("name, printed", CALLS, ids=[name for name, _ in CALLS])
def test_the_printed_defaults_are_the_presets(name, printed):
    assert wrong(name, printed) is None


@pytest.mark.parametrize(
    "row, words",
    [
        ('dppo(divergence="tv", delta_low=0.2, delta_high=0.2, ratio_cap=3.0, aggregation="token-mean")', "ratio_cap"),
        ('dppo(divergence="tv", delta_low=0.2, delta_high=0.2, aggregation="token-mean")', "prints"),
        ('dapo(epsilon_low=0.2, epsilon_high=0.2, aggregation="token-mean")', "not what its row says"),
        ('dapo(epsilon_low=0.2, epsilon_high=0.28, aggregation="seq-mean-token-mean")', "not what its row says"),
        ('gspo(epsilon_low=0.2, epsilon_high=0.2, aggregation="seq-mean-token-mean")', "prints"),
        ('topr(level="sequence", extra=1, aggregation="seq-mean-token-sum")', "prints"),
        ('ppo(aggregation="token-mean")', "no preset"),
    ],
)
def test_a_wrong_row_is_noticed(row, words):
    page = f"<!-- presets -->\n| a | b | c | d | e |\n|---|---|---|---|---|\n| a | b | c | `{row}` | e |\n<!-- end -->"
    ((name, printed),) = objectives_page.preset_calls(page)
    assert words in (wrong(name, printed) or "")


def test_the_names_of_a_framework():
    """As the conformance tests read them: of its entries and columns, and not of another framework's."""
    page = "| a | TRL |\n|---|---|\n| verl: `x=\"1\"`<br>TRL: `y`, `z=0.2` | `w` |\n\n| `no` | TRL: `q` |\n|---|---|\n"
    assert objectives_page.options(page, "TRL") == {("y", None), ("z", "0.2"), ("w", None), ("q", None)}
    assert objectives_page.options(page, "verl") == {("x", "1")}
    assert ("loss_type", "vespo") in objectives_page.options(TEXT, "TRL")
    assert ("loss_mode", "geo_mean") in objectives_page.options(TEXT, "verl")
    assert ("loss_type", "fipo") not in objectives_page.options(TEXT, "TRL")


def test_the_page_is_linked():
    for page, link in (("README.md", "](docs/objectives.md)"), ("CONTRIBUTING.md", "](docs/objectives.md)")):
        assert link in (objectives_page.PAGE.parents[1] / page).read_text(encoding="utf-8")
