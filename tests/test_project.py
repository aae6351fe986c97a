"""The project around the code: workflow, make targets, constraints, licence of words and paths, public names."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import summary

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
CONSTRAINTS = sorted(ROOT.glob("constraints*.txt"))

NAMES = """
    token_logprobs select_tokens policy_loss min_p_token_logprobs grpo dr_grpo dapo psr nsr w_reinforce fork_tokens
    lp_reg a3po gspo cispo sapo Objective TokenRule PolarityWeights LinearDecay ExponentialDecay CosineDecay Constant
    PolicyLoss PolicyLossOutput TokenStats group_advantages
""".split()
PARAMETERS = {
    "token_logprobs": "logits targets temperature softcap logit_scale ignore_index inplace_backward backend",
    "select_tokens": "metric mask cu_seqlens ratio side scope rounding",
    "policy_loss": """logits targets advantages objective old_logprobs ref_logprobs mask cu_seqlens polarity old_entropy
        min_p_logprobs importance_weights step denominator max_length temperature softcap logit_scale ignore_index
        inplace_backward validate backend""",
}
POSITIONAL = {"token_logprobs": 2, "select_tokens": 2, "policy_loss": 3}
DEFAULTS = {
    "old_logprobs": None, "ref_logprobs": None, "mask": None, "cu_seqlens": None, "polarity": None, "old_entropy": None,
    "min_p_logprobs": None, "importance_weights": None, "step": 0, "denominator": None, "max_length": None,
    "temperature": 1.0, "softcap": None, "logit_scale": 1.0, "ignore_index": -100, "inplace_backward": False,
    "validate": False, "backend": "auto",
}  # fmt: skip

# Joined here, so that this file does not hold what it looks for.
HOSTS = [("pypi", "org"), ("pythonhosted", "org"), ("download.pytorch", "org"), ("registry.npmjs", "org")]
FOLDERS = ["work", "opt", "tmp", "root", "home", "etc/xdg"]
HOST = "|".join(re.escape(".".join(host)) for host in HOSTS)
FORBIDDEN = re.compile(HOST + r"|(?<![\w.~})-])/(?:" + "|".join(FOLDERS) + r")(?=/\w)")


def project_files() -> list[Path]:
    """Every file that is in git or would be added to it."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in sorted(listing.split("\0")) if name and (ROOT / name).is_file()]


def python_files() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_workflow(path: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    return subprocess.run(command, capture_output=True, text=True)


def test_workflow_matches_the_published_schema():
    pytest.importorskip("check_jsonschema")
    result = check_workflow(WORKFLOW)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_schema_refuses_a_wrong_workflow(tmp_path):
    pytest.importorskip("check_jsonschema")
    broken = tmp_path / "ci.yml"
    broken.write_text(WORKFLOW.read_text().replace("runs-on:", "runs-at:"))
    assert check_workflow(broken).returncode == 1


def test_workflow_jobs():
    workflow = pytest.importorskip("yaml").safe_load(WORKFLOW.read_text())
    jobs = workflow["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["cpu"] == ["make test"]
    assert commands["gpu"][1].endswith("pytest -m cuda")
    assert "bench.on_gpu --quick --check" in commands["gpu"][2]
    assert jobs["gpu"]["runs-on"] == ["self-hosted", "linux", "x64", "gpu"]
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as a boolean
    assert all("timeout-minutes" in job for job in jobs.values())
    assert set(jobs["conformance"]["strategy"]["matrix"]["target"]) <= make_targets()


def test_ci_calls_the_same_commands():
    script = ROOT / ".ci" / "run"
    called = re.findall(r"^make ([\w-]+)$", script.read_text(), re.MULTILINE)
    assert called[0] == "test"
    assert {"test-trl", "test-verl", "test-triton36", "docs"} <= set(called) <= make_targets()
    assert script.stat().st_mode & 0o111


def test_readme_names_the_test_command():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md")
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme.read_text(), re.DOTALL))
    named = set(re.findall(r"(?:^|[`$;&]) *make ([a-z][\w-]*)", code, re.MULTILINE))
    assert "test" in named
    assert named <= make_targets()


@pytest.mark.parametrize("repository", ["", "https://host.example/owner/name"])
def test_a_package_index_shows_the_readme(repository):
    """Its links and images lead into the repository that a release names, and are as they stand without one."""
    command = [sys.executable, "setup.py", "--long-description"]
    environment = {**os.environ, "A3PO_REPOSITORY": repository}
    text = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    targets = re.findall(r"(!?)\[[^\[\]]*\]\(([^)]+)\)|\]\]\(([^)]+)\)", text)
    images = [target for image, target, _ in targets if image]
    links = [target or outer for image, target, outer in targets if not image]
    assert len(images) >= 5 and len(links) >= 15
    if not repository:
        assert "docs/images/summary_nvidia-h200.png" in images and "docs/trainers.md" in links
        return
    assert all(target.startswith("https://") for target in images)
    assert all(target.startswith(("https://", "#")) for target in links)
    assert f"{repository}/raw/main/docs/images/summary_nvidia-h200.png" in images
    assert f"{repository}/actions/workflows/ci.yml/badge.svg" in images
    assert f"{repository}/blob/main/docs/trainers/trl.md#refused-with-a-reason" in links


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_are_exact(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert ("torch==2.13.0" in lines) == (path.stem != "constraints-docs")  # the manual is made from the sources
    names = [re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in lines]
    assert len(names) == len(set(names))


def test_constraints_cover_both_ends_of_triton():
    texts = "".join(path.read_text() for path in CONSTRAINTS)
    assert set(re.findall(r"^triton==(.+)$", texts, re.MULTILINE)) == {"3.6.0", "3.9.0"}


def test_no_registry_host_and_no_path_of_a_machine():
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FORBIDDEN.finditer(text)]
    assert not found


def test_the_forbidden_pattern_finds_what_it_should():
    work, opt, tmp = FOLDERS[:3]
    hosts = [".".join(HOSTS[0]), "https://files." + ".".join(HOSTS[1])]
    for text in [*hosts, f"'/{work}/main'", f"=/{tmp}/x", f"({opt}) /{opt}/x"]:
        assert FORBIDDEN.search(text), text
    for text in ["#!/usr/bin/env bash", "a3po_kernels/ops/sapo.py", f"./{work}/x", f"$HOME/{opt}/x"]:
        assert not FORBIDDEN.search(text), text


def test_files_are_small():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert lengths
    assert not {name: length for name, length in lengths.items() if length > 400}


@pytest.mark.parametrize(("folder", "other"), [("reference", "a3po_kernels"), ("a3po_kernels", "reference")])
def test_reference_and_package_are_apart(folder, other):
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
            elif isinstance(node, ast.ImportFrom):
                depth = len(path.relative_to(ROOT).parts) - 1
                assert node.level <= depth, f"{path}: a relative import leaves {folder}"
            elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                constants = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                imported |= {str(constant).split(".")[0] for constant in constants}
        assert other not in imported, path


def test_public_names():
    import a3po_kernels

    assert set(NAMES) <= set(a3po_kernels.__all__)
    assert all(hasattr(a3po_kernels, name) for name in a3po_kernels.__all__)
    assert len(a3po_kernels.__all__) == len(set(a3po_kernels.__all__))


@pytest.mark.parametrize("name", PARAMETERS)
def test_public_parameters(name):
    import a3po_kernels

    actual = inspect.signature(getattr(a3po_kernels, name)).parameters
    expected = PARAMETERS[name].split()
    assert set(expected) <= set(actual)
    assert list(actual)[: POSITIONAL[name]] == expected[: POSITIONAL[name]]
    if name == "policy_loss":
        assert {key: actual[key].default for key in DEFAULTS} == DEFAULTS


def test_version_is_read_without_an_import():
    import a3po_kernels

    command = [sys.executable, "setup.py", "--version"]
    version = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()[-1]
    assert version == a3po_kernels.__version__
    assert f"[{version}]" in (ROOT / "CHANGELOG.md").read_text()


def junit(path: Path, **counts: int) -> str:
    attributes = " ".join(f'{name}="{value}"' for name, value in counts.items())
    path.write_text(f"<testsuites><testsuite {attributes}/></testsuites>")
    return str(path)


def test_summary_adds_up_and_judges(tmp_path, capsys):
    good = junit(tmp_path / "a.xml", tests=10, failures=0, errors=0, skipped=3)
    bad = junit(tmp_path / "b.xml", tests=4, failures=1, errors=1, skipped=0)
    none = junit(tmp_path / "c.xml", tests=2, failures=0, errors=0, skipped=2)
    cases = [
        ((good, none), "7 passed, 0 failed, 5 skipped", 0),
        ((good, bad), "9 passed, 2 failed, 3 skipped", 1),
        ((none,), "0 passed, 0 failed, 2 skipped", 1),
        ((good, str(tmp_path / "missing.xml")), "7 passed, 1 failed, 3 skipped", 1),
    ]
    for files, line, status in cases:
        assert summary.main("TOTAL", *files) == status
        assert capsys.readouterr().out == f"TOTAL: {line}\n"
