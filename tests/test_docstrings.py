"""help() of each public function stands alone: every parameter described there, and what is raised."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import a3po_kernels as ak

ROOT = Path(__file__).resolve().parents[1]
# An entry whose description is another's help: "a, b: as in g", "see g", "as the loss gets it", "The rest: as in g".
AWAY = re.compile(
    r"^(?: *[\w, ]*\w|.*\b[Tt]he rest): (?:see\b|as (?:in|there|for)\b|as (?:the )?\w+ (?:does|do|gets?|takes?)\b).*",
    re.MULTILINE,
)
# These check nothing: records that the package fills, and what takes no value that could be wrong.
CHECKS_NOTHING = {
    "Nothing", "Reinforce", "PolicyLossOutput", "RolloutCorrection", "RowPlan", "TokenStats", "HeadOutput",
    "LossOutputs", "training_step", "install_head",
}  # fmt: skip


def faults(name: str, parameters: list[str], text: str | None) -> list[str]:
    """What help() leaves to another page."""
    if not text:
        return ["has no docstring"]
    found = [f"does not say what {key} is" for key in parameters if not re.search(rf"\b{key}\b", text)]
    found += [f"points away: {match[0].strip()!r}" for match in AWAY.finditer(text)]
    if name not in CHECKS_NOTHING and not re.search(r"\b[Rr]aise", text):
        found.append("does not say what it raises")
    return found


def of_the_package() -> dict[str, tuple[list[str], str | None]]:
    public = {name: getattr(ak, name) for name in ak.__all__ if name != "presets"}
    return {name: (list(inspect.signature(x).parameters), inspect.getdoc(x)) for name, x in public.items()}


def definitions(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def described(node: ast.FunctionDef | ast.ClassDef) -> tuple[list[str], str]:
    """The parameters of a function or a constructor, and what help() says."""
    text, call = ast.get_docstring(node) or "", node
    if isinstance(node, ast.ClassDef):
        made = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
        text = "\n".join([text, *(ast.get_docstring(x) or "" for x in made)])
        if not made:
            return [], text  # of a dataclass: its fields carry their help
        call = made[0]
    given = call.args
    more = [x for x in (given.vararg, given.kwarg) if x is not None]
    return [x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs, *more) if x.arg != "self"], text


def of_the_integrations() -> dict[str, tuple[list[str], str | None]]:
    """Read, not imported: each needs its own library."""
    paths = sorted((ROOT / "a3po_kernels" / "integrations").glob("*.py"))
    anywhere = {name: node for path in paths for name, node in definitions(path).items()}
    found = {}
    for path in paths:
        listed = re.search(r"^__all__ = (\[[^\]]*\])", path.read_text(encoding="utf-8"), re.MULTILINE)
        for name in ast.literal_eval(listed[1]) if listed else ():
            found[f"{path.stem}.{name}"] = described(definitions(path).get(name, anywhere[name]))
    return found


EVERY = {**of_the_package(), **of_the_integrations()}


def test_all_are_looked_at():
    assert {name for name in ak.__all__ if name != "presets"} <= set(EVERY)
    wanted = {"trl.A3POTrainer", "verl.register_objective", "megatron.output_processor", "transformers.swap_head"}
    assert wanted <= set(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_help_stands_alone(name):
    assert not faults(name.rpartition(".")[2], *EVERY[name])


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("f.\n\nArgs:\n    a: [N].\n\nRaises:\n    ValueError: no.", "what b is"),
        ("f.\n\nArgs:\n    a: [N].\n    b: as in g.\n\nRaises:\n    ValueError: no.", "points away: 'b: as in g.'"),
        ("f.\n\nArgs:\n    a, b: see g.\n\nRaises:\n    ValueError: no.", "points away"),
        ("f.\n\nArgs:\n    a: [N].\n    b: as the loss gets it.\n\nRaises:\n    ValueError: no.", "points away"),
        ("f.\n\nArgs:\n    a, b: [N].\n    The rest: as in g.\n\nRaises:\n    ValueError: no.", "points away"),
        ("f.\n\nArgs:\n    a, b: [N].\n\nRaises:\n    ValueError, TypeError: as g does.", "points away"),
        ("f.\n\nArgs:\n    a, b: [N].", "raises"),
        (None, "no docstring"),
    ],
)
def test_a_docstring_that_leans_on_another_is_noticed(text, fault):
    assert any(fault in found for found in faults("f", ["a", "b"], text)), faults("f", ["a", "b"], text)


def test_a_docstring_that_stands_alone_passes():
    assert not faults("f", ["a", "b"], "f of a.\n\nArgs:\n    a: [N].\n    b: bool, as in TRL.\n\nRaises ValueError.")
