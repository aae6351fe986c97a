"""The house: imports run one way, upward only, and no circle anywhere; bench too."""

from __future__ import annotations

import ast
import inspect
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the ground up: a file imports from its own floor and from floors below.
FLOORS = (
    "core", "backends", "parallel", "schedules surrogates objectives named_objectives", "ops", "losses", "planning",
    "integrations",
)  # fmt: skip
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names.split()}


def modules(package: str) -> dict[str, Path]:
    """Dotted names of the modules below a folder; a package is named by its folder."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of `known` that a file imports, anywhere in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            for alias in node.names:
                inner = ".".join([*base, alias.name])
                found.add(inner if inner in known else ".".join(base))
    return {module for module in found if module in known and module != name}


def graph(package: str) -> dict[str, set[str]]:
    known = modules(package)
    return {name: imports(name, path, known) for name, path in known.items()}


@pytest.mark.parametrize("package", ["a3po_kernels", "bench", "reference", "examples"])
def test_no_circle(package):
    edges = graph(package)
    assert any(edges.values())
    list(TopologicalSorter(edges).static_order())


def test_the_circle_finder_finds_one():
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())


def floor(module: str) -> int:
    return FLOOR[module.split(".")[1]]


def test_imports_run_down():
    edges = graph("a3po_kernels")
    inner = {name: targets for name, targets in edges.items() if "." in name}
    assert {name.split(".")[1] for name in inner} == set(FLOOR), "a new room needs its floor"
    up = [(name, target) for name, targets in inner.items() for target in targets if floor(target) > floor(name)]
    assert not up
    # Nothing reaches for the roof, whose __init__ imports everything.
    assert not [name for name, targets in inner.items() if "a3po_kernels" in targets]


def test_operations_know_no_kernel():
    """ops/ and losses/ choose a backend by name; only backends/ names one, or imports Triton."""
    for name, path in modules("a3po_kernels").items():
        if name.split(".")[1:2] in (["ops"], ["losses"]):
            text = path.read_text()
            imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE)
            assert not [module for module in imported if "triton" in module or "backends.torch" in module], name


def test_backends_speak_the_same_functions():
    from a3po_kernels.backends import torch, triton

    assert torch.__all__ == triton.__all__
    for name in torch.__all__:
        ours, theirs = getattr(torch, name), getattr(triton, name)
        if callable(ours):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
