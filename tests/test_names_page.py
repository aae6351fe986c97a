"""docs/names.md: what it says is ours is ours. The peers' names are looked up in conformance/test_peer_names.py."""

from __future__ import annotations

import inspect
import re

import names_page
import pytest

import a3po_kernels as ak
from a3po_kernels.core.forms import METRICS

CALLS = [getattr(ak, name) for name in ak.__all__ if name != "presets"]
PARAMETERS = {key for call in CALLS for key in inspect.signature(call).parameters}
# rollout_correction names its metrics in its help.
CORRECTION = set(re.findall(r"\b\w+\b", (ak.rollout_correction.__doc__ or "").partition("Metrics;")[2]))


def unknown(span: str, where: str) -> bool:
    name, _, value = span.partition("=")
    if value:
        return getattr(ak.Objective(**{name: value.strip('"')}), name) != value.strip('"')
    if "metrics" in where:
        return name not in METRICS and name not in CORRECTION
    return name not in PARAMETERS and name not in ak.__all__


@pytest.mark.parametrize("table", names_page.tables())
def test_our_names_are_ours(table):
    spans = names_page.column(table, -2)
    assert spans and not [span for span in spans if unknown(span, table)]


def test_a_wrong_name_is_noticed():
    assert unknown("old_log_probs", "trl inputs") and unknown("ratio_levels", "trl config")
    assert unknown("clip_fraction", "trl metrics") and not unknown("weight_mean", "trl metrics")
    with pytest.raises(ValueError, match="kl_estimator"):
        unknown('kl_estimator="k4"', "liger")


@pytest.mark.parametrize("table", [name for name in names_page.tables() if name != "liger"])
def test_every_row_has_both(table):
    assert all(row[0] and row[1] for row in names_page.rows(table))


def test_a_word_of_the_notes_is_a_function():
    """ "of `group_advantages`": what the argument belongs to has it."""
    page = names_page.PAGE.read_text(encoding="utf-8")
    noted = re.findall(r"^\|[^|]*\| ([^|]*) \| of `(\w+)`", page, re.MULTILINE)
    assert len(noted) > 12
    for cell, function in noted:
        takes = {*inspect.signature(getattr(ak, function)).parameters}
        takes |= CORRECTION if function == "rollout_correction" else set()
        assert set(re.findall(r"`(\w+)`", cell)) <= takes, (cell, function)
