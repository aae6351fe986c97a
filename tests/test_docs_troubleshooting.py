"""docs/troubleshooting.md quotes messages as the package gives them; docs/metrics.md lists every metric."""

from __future__ import annotations

import pytest
import torch
from batches import INTERPRETED
from docs_examples import ROOT, has_message, names_in_table, strings_of

from a3po_kernels import rollout_correction
from a3po_kernels.core.forms import METRICS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="natively")


def package_strings() -> list[str]:
    return [text for path in (ROOT / "a3po_kernels").rglob("*.py") for text in strings_of(path)]


def test_every_quoted_message_is_one():
    quoted = names_in_table(ROOT / "docs" / "troubleshooting.md", "Messages")
    assert len(quoted) > 20
    strings = package_strings()
    assert not [message for message in quoted if not any(has_message(text, message) for text in strings)]


def test_a_message_that_is_none_is_noticed():
    strings = package_strings()
    assert any(has_message(text, "kl_coef = … needs ref_logprobs") for text in strings)
    for wrong in ("kl_coef = … wants ref_logprobs", "needs ref_logprobs … kl_coef ="):
        assert not any(has_message(text, wrong) for text in strings)


def test_the_page_of_metrics_has_each_once():
    page = ROOT / "docs" / "metrics.md"
    listed = names_in_table(page, "Of a loss")
    assert sorted(listed) == sorted([*METRICS, "aux_loss"])  # which policy_loss_from_model adds
    correction = rollout_correction(torch.full((1, 2), -1.0), torch.full((1, 2), -1.1))
    assert sorted(names_in_table(page, "Of `rollout_correction`")) == sorted(correction.metrics)
