"""docs/plain-loop.md: every number that its blocks print is explained, and the model learns."""

from __future__ import annotations

import re

import docs_examples
import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.trl
PAGE = docs_examples.ROOT / "docs" / "plain-loop.md"


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    result = docs_examples.run_blocks(PAGE, tmp_path_factory.mktemp("page"), "trl")
    assert result.returncode == 0, result.stderr
    return result.stdout


def explained() -> set[str]:
    """Names in the first column of the page's table; "`_negative`" after another is the rest of its name."""
    rows = re.findall(r"^\| (`[^|]*) \|", PAGE.read_text(), re.MULTILINE)
    found = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    return {name if name != "_negative" else "selected_fraction_negative" for name in found}


def test_every_metric_that_is_printed_is_explained(printed):
    names = set(re.findall(r"^(\w+) {2,}-?[\d.]+$", printed, re.MULTILINE))
    assert len(names) >= 14
    assert names | {"loss", "gradient norm"} == explained()


def test_the_model_learns(printed):
    first, last = map(float, re.search(r"reward ([\d.]+) -> ([\d.]+)", printed).groups())
    assert last > first + 0.2
