"""docs/troubleshooting.md quotes messages as the package gives them; docs/metrics.md lists every metric."""

from __future__ import annotations

import ast

import pytest
import torch
from batches import INTERPRETED
from docs_examples import ROOT, names_in_table

from a3po_kernels import rollout_correction
from a3po_kernels.core.forms import METRICS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="natively")


def spelled(node: ast.expr) -> str | None:
    """A literal string with "…" in the place of what is formatted into it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def package_strings() -> list[str]:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "a3po_kernels").rglob("*.py")]
    return [text for tree in trees for node in ast.walk(tree) if isinstance(node, ast.expr) and (text := spelled(node))]


def matches(quoted: str, text: str) -> bool:
    """Whether the text has the pieces of a quoted message in their order."""
    at = 0
    for piece in filter(None, (part.strip() for part in quoted.split("…"))):
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def test_every_quoted_message_is_one():
    quoted = names_in_table(ROOT / "docs" / "troubleshooting.md", "Messages")
    assert len(quoted) > 20
    strings = package_strings()
    assert not [message for message in quoted if not any(matches(message, text) for text in strings)]


def test_a_message_that_is_none_is_noticed():
    strings = package_strings()
    assert any(matches("kl_coef = … needs ref_logprobs", text) for text in strings)
    for wrong in ("kl_coef = … wants ref_logprobs", "needs ref_logprobs … kl_coef ="):
        assert not any(matches(wrong, text) for text in strings)


def test_the_page_of_metrics_has_each_once():
    page = ROOT / "docs" / "metrics.md"
    listed = names_in_table(page, "Of a loss")
    assert sorted(listed) == sorted([*METRICS, "aux_loss"])  # which policy_loss_from_model adds
    correction = rollout_correction(torch.full((1, 2), -1.0), torch.full((1, 2), -1.1))
    assert sorted(names_in_table(page, "Of `rollout_correction`")) == sorted(correction.metrics)
