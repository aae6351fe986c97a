"""The Python blocks of the pages in docs/ that need transformers or TRL; those of verl run in its environment."""

from __future__ import annotations

import docs_examples
import pytest

pytest.importorskip("trl")

pytestmark = pytest.mark.trl


def test_there_is_such_a_page():
    assert "trainers.md" in [page.name for page in docs_examples.pages(others=True)]


@pytest.mark.parametrize("page", docs_examples.pages(others=True), ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, tmp_path):
    result = docs_examples.run_blocks(page, tmp_path, without=docs_examples.VERL)
    assert result.returncode == 0, result.stderr
