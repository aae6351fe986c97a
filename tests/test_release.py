"""What a release ships: an sdist whose tests run, a wheel of the package alone, metadata, citation, forms, versions."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from base64 import urlsafe_b64encode
from email.message import Message
from email.parser import Parser
from pathlib import Path

import compatibility_page
import pytest
from batches import INTERPRETED
from test_project import project_files

import a3po_kernels

ROOT = Path(__file__).resolve().parents[1]
VERSION = a3po_kernels.__version__
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.stem != "config")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="files, natively")


def python(folder: Path, *command: str) -> str:
    """Runs python there, where it sees nothing of this checkout; its output."""
    ran = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist of what git holds, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "checkout"
    for path in project_files():
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    python(copy, "setup.py", "-q", "sdist", "--dist-dir", str(folder))
    with tarfile.open(folder / f"a3po_kernels-{VERSION}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"a3po_kernels-{VERSION}"


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    """The wheel that the sdist builds."""
    python(sdist, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(sdist.parent))
    return sdist.parent / f"a3po_kernels-{VERSION}-py3-none-any.whl"


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_sdist_holds_what_git_holds(sdist):
    with tarfile.open(sdist.parent / f"{sdist.name}.tar.gz") as archive:
        shipped = {name.split("/", 1)[1] for name in archive.getnames() if archive.getmember(name).isfile()}
    made = {name for name in shipped if name in ("PKG-INFO", "setup.cfg") or name.startswith("a3po_kernels.egg-info/")}
    assert shipped - made == {str(path.relative_to(ROOT)) for path in project_files()}


@pytest.mark.slow
def test_the_tests_of_the_sdist_run(sdist):
    """Every file of tests is collected, and some that read other files pass, on the package that lies there."""
    where = "import a3po_kernels, reference, bench; print(a3po_kernels.__file__)"
    assert Path(python(sdist, "-c", where).strip()) == sdist / "a3po_kernels" / "__init__.py"
    quiet = ("-q", "-p", "no:cacheprovider")
    listed = python(sdist, "-m", "pytest", *quiet, "--collect-only", "--ignore=tests/conformance", "tests")
    collected = {line.split("::")[0] for line in listed.splitlines() if "::" in line}
    assert collected >= {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    files = ("tests/test_project.py", "tests/test_house.py", "tests/test_objectives_page.py")
    assert re.search(r"\d\d+ passed", python(sdist, "-m", "pytest", *quiet, *files))


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"a3po_kernels-{VERSION}.dist-info/METADATA").decode())


def test_the_wheel_holds_the_package_alone(wheel):
    """Each file of the package with its hash, the licence and the type marker; no tests, no benchmarks."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = {name for name in names if name.startswith(f"a3po_kernels-{VERSION}.dist-info/")}
        package = {str(p.relative_to(ROOT)) for p in project_files() if p.relative_to(ROOT).parts[0] == "a3po_kernels"}
        assert names - info == package and "a3po_kernels/py.typed" in package
        assert {name.split("/", 1)[1] for name in info} == {
            "METADATA", "WHEEL", "RECORD", "top_level.txt", "licenses/LICENSE",
        }  # fmt: skip
        record = archive.read(f"a3po_kernels-{VERSION}.dist-info/RECORD").decode().splitlines()
        for line in record:
            name, written, _ = line.rsplit(",", 2)
            if written:
                digest = urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).decode().rstrip("=")
                assert written == f"sha256={digest}", name
        assert {line.rsplit(",", 2)[0] for line in record} == names


def test_the_wheel_installs_and_computes(wheel, tmp_path):
    options = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", "--target", str(tmp_path / "there"))
    python(tmp_path, "-m", "pip", "install", *options, str(wheel))
    script = (
        "import torch, a3po_kernels as a; x = torch.zeros(2, 3, 5, requires_grad=True)\n"
        "out = a.policy_loss(x, torch.ones(2, 3, dtype=torch.long), torch.tensor([1.0, -1.0]), objective=a.grpo())\n"
        "out.loss.backward(); print(a.__version__, a.__file__, bool(x.grad.any()))"
    )
    found = python(tmp_path / "there", "-c", script).split()
    assert found == [VERSION, str(tmp_path / "there" / "a3po_kernels" / "__init__.py"), "True"]


def test_metadata(wheel):
    found = metadata(wheel)
    assert (found["Name"], found["Version"]) == ("a3po_kernels", VERSION)
    assert found["Author"] == "the a3po_kernels founders"
    assert found["License-Expression"] == "Apache-2.0"
    assert found["Requires-Python"] == ">=3.11"
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    needed = [text for text in found.get_all("Requires-Dist") if "extra ==" not in text]
    assert needed == ["torch>=2.8", "triton>=3.6", "numpy"]
    assert {"trl", "verl", "transformers", "test", "dev"} <= set(found.get_all("Provides-Extra"))
    classifiers = found.get_all("Classifier")
    assert len(classifiers) == len(set(classifiers)) >= 10
    # A licence expression replaces the classifier; registries refuse both together.
    assert not [text for text in classifiers if text.startswith("License ::")]
    pythons = [text.rsplit(" ", 1)[1] for text in classifiers if re.search(r":: 3\.\d+$", text)]
    assert pythons[0] == "3.11"


def schema_says(schema: str, path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(path)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("citation-file-format", ROOT / "CITATION.cff"),
        ("github-issue-config", ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml"),
        *(("github-issue-forms", path) for path in FORMS),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_files_match_their_published_schema(schema, path, tmp_path):
    """And the schema refuses another key."""
    pytest.importorskip("check_jsonschema")
    assert schema_says(schema, path).returncode == 0, schema_says(schema, path).stdout
    (tmp_path / path.name).write_text(path.read_text() + "no-such-key: 1\n")
    assert schema_says(schema, tmp_path / path.name).returncode == 1


def test_there_are_issue_forms():
    assert len(FORMS) >= 3


def test_the_version_is_one():
    """In the citation, the newest section of the changelog and the package; the citation's date is the section's."""
    citation = pytest.importorskip("yaml").safe_load((ROOT / "CITATION.cff").read_text())
    sections = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    assert sections[1] == (VERSION, citation["date-released"])
    assert str(citation["version"]) == VERSION


def test_the_compatibility_page_is_what_ci_runs():
    assert compatibility_page.PAGE.read_text() == compatibility_page.page(), "run: python -m tests.compatibility_page"


def test_the_compatibility_page_follows_its_sources(tmp_path):
    """Another pin, another target in CI and another range give another page."""
    for name in ("Makefile", "setup.py", ".ci/run", str(compatibility_page.WORKFLOW)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for path in ROOT.glob("constraints*.txt"):
        shutil.copy(path, tmp_path)
    assert compatibility_page.page(tmp_path) == compatibility_page.page()
    changes = [
        ("constraints-trl.txt", "trl==1.16.0", "trl==1.99.0", "| 1.99.0 |"),
        ("setup.py", '"torch>=2.8"', '"torch>=2.7"', "| >=2.7 |"),
        (".ci/run", "make test-verl", "make test-megatron", "`make test-megatron`"),
    ]
    for name, old, new, shown in changes:
        text = (tmp_path / name).read_text()
        assert old in text and shown not in compatibility_page.page(tmp_path)
        (tmp_path / name).write_text(text.replace(old, new))
        assert shown in compatibility_page.page(tmp_path), name
