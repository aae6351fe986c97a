"""docs/extending.md does what it says: its blocks run, and its edits make a built-in surrogate of a copy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import docs_examples
import edits
import pytest
from batches import INTERPRETED

pytestmark = pytest.mark.slow
# Loss and gradient of the new surrogate beside its formula, on one rollout of each sign; prints the backend's name.
CHECK = """
import sys
import torch
import a3po_kernels as ak

backend = sys.argv[1]
assert "logarithm" in ak.presets and ak.logarithm().surrogate == ak.Logarithm(1.0)
generator = torch.Generator().manual_seed(0)
logits = torch.randn(2, 6, 23, generator=generator, dtype=torch.float64).requires_grad_()
targets = torch.randint(0, 23, (2, 6), generator=generator)
advantages = torch.tensor([1.3, -0.7], dtype=torch.float64)
logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
old = logprobs.detach() + 0.8 * torch.randn(2, 6, generator=generator, dtype=torch.float64)
for scale in (0.3, 1.0, 50.0):
    out = ak.policy_loss(logits, targets, advantages, objective=ak.logarithm(scale), old_logprobs=old, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    want = (-advantages[:, None] * scale * torch.log(1 + (logprobs - old).exp() / scale)).mean()
    (truth,) = torch.autograd.grad(want, logits, retain_graph=True)
    assert truth.abs().max() > 1e-3
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-14)
print(ak.__file__)
"""


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return edits.extended(tmp_path_factory.mktemp("extended"))


@pytest.mark.skipif(INTERPRETED, reason="natively")
def test_what_needs_no_file_runs(tmp_path):
    """The blocks that need neither TRL nor verl; those run in conformance/."""
    result = docs_examples.run_blocks(edits.PAGE, tmp_path, "core")
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(INTERPRETED, reason="natively")
def test_the_new_surrogate_is_its_formula(copy):
    assert str(copy) in run(copy, "-c", CHECK, "torch")


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="the Triton kernels, in the interpreter")
def test_the_new_surrogate_is_its_formula_in_the_kernels(copy):
    assert str(copy) in run(copy, "-c", CHECK, "triton")


@pytest.mark.skipif(INTERPRETED, reason="natively")
def test_the_copys_own_tests_know_it(copy):
    """Against the reference on every route; signature, help, docstrings; the page of objectives; compiled kernels."""
    files = ("tests/test_new_objectives.py", "tests/test_signatures.py", "tests/test_docstrings.py")
    said = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "ogarithm", *files)
    assert int(said.rsplit(" passed", 1)[0].split()[-1]) > 40, said
    pages = ("tests/test_objectives_page.py", "tests/test_house.py", "tests/test_docs_examples.py")
    names = "every_preset or printed_defaults or named_over or imports or circle or every_public_name"
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, *pages)
    drawn = "import random; from tests.fuzz.objectives import draw_objective as draw\n"
    drawn += "print(sum('ogarithm' in repr(draw(random.Random(i))) for i in range(400)))"
    assert int(run(copy, "-c", drawn)) > 10
    said = run(copy, "-m", "tests.fuzz", "--cases", "300", "--interpreted", "0", "--workers", "1")
    assert "300 cases" in said and " 0 wrong" in said, said
    said = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "logarithm", "tests/test_machine_code.py")
    assert " passed" in said and "skipped" not in said, said


def test_a_hunk_that_is_out_of_date_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    text = edits.PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace(' if isinstance(surrogate, Ratio):', ' if isinstance(surrogate, Quotient):', 1))
    monkeypatch.setattr(edits, "PAGE", page)
    with pytest.raises(AssertionError, match=r"losses/stages\.py has 0 times"):
        edits.extended(tmp_path / "copy")


def test_the_page_names_the_files_that_the_package_needs():
    """Where the neighbouring surrogate of a number is spelled, a new one is: no file is left out of the list."""
    named = {name for name, _, _ in edits.edits(edits.PAGE.read_text(encoding="utf-8"))}
    sources = [path for part in ("a3po_kernels", "reference") for path in (edits.ROOT / part).rglob("*.py")]
    spelled = {
        str(path.relative_to(edits.ROOT)) for path in sources
        if any(word in path.read_text(encoding="utf-8") for word in ("Ratio,", "Ratio)", '"ratio"', "class Ratio"))
    }  # fmt: skip
    # It hands the names on; of presets, a keyword among them; of a term that moves without an advantage, which it says.
    presets = {"named_objectives/chosen.py", "named_objectives/keywords.py", "core/checks.py"}
    more = {"objectives.py", *presets, "losses/rows.py"}
    assert spelled - named == {f"a3po_kernels/{name}" for name in more}
    assert all(name in edits.PAGE.read_text(encoding="utf-8") for name in more - presets)
