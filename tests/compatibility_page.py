"""docs/compatibility.md: the versions in each environment that CI runs, from its own files, and what setup.py accepts.

    python -m tests.compatibility_page    # writes the page
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
PACKAGES = ("torch", "triton", "numpy", "transformers", "trl", "liger-kernel", "peft", "verl")
WORKFLOW = Path(".github") / "workflows" / "ci.yml"

HEAD = """# Compatibility

Made by `python -m tests.compatibility_page` from `.ci/run`, the Makefile, the constraints files and setup.py; a
test fails where it is out of date.

## What CI runs

Python {python} in the workflow, Linux, no GPU. A dash: not in that environment.
"""
TAIL = """
## What an installation accepts

Python {python}. Of these ranges only the versions above are run.
"""


def normal(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def targets(root: Path) -> list[str]:
    """The make targets of .ci/run that run tests, in its order."""
    return re.findall(r"^make (test[\w-]*)$", (root / ".ci" / "run").read_text(), re.MULTILINE)


def constraints_of(target: str, makefile: str) -> str:
    """The constraints file of the one environment that a make target needs, by way of other targets or not."""
    rules = {
        name: needs.split("##")[0].split()
        for name, needs in re.findall(r"^([\w.$()/-]+):(?!=)([^\n]*)", makefile, re.MULTILINE)
    }
    environments = dict(re.findall(r"^\$\(eval \$\(call environment,([^,]+),([^,]+),", makefile, re.MULTILINE))
    found, waiting = set(), [target]
    while waiting:
        name = waiting.pop()
        if name.endswith("/.stamp"):
            found.add(environments[name.removesuffix("/.stamp")])
        else:
            waiting += rules[name]
    if len(found) != 1:
        raise ValueError(f"make {target} must need one environment; it needs {sorted(found)}")
    return found.pop()


def versions(constraints: Path) -> dict[str, str]:
    """Package -> version of a constraints file."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", constraints.read_text(), re.MULTILINE)
    return {normal(name): version for name, version in lines}


def keywords(setup: Path) -> dict[str, ast.expr]:
    """The keywords of setup(), unevaluated."""
    for node in ast.walk(ast.parse(setup.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup":
            return {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
    raise ValueError(f"{setup} does not call setup()")


def accepted(setup: Path) -> list[tuple[str, str, str]]:
    """(package, range, extra or "") of the packages of the table."""
    given = keywords(setup)
    extras = given["extras_require"]
    assert isinstance(extras, ast.Dict)
    asked = [("", ast.literal_eval(given["install_requires"]))]
    for key, value in zip(extras.keys, extras.values, strict=True):
        if key is not None and ast.literal_eval(key) in PACKAGES:  # an extra that is named as its library
            asked.append((ast.literal_eval(key), ast.literal_eval(value)))
    found = []
    for extra, requirements in asked:
        for text in requirements:
            name = re.split(r"[^\w.-]", text)[0]
            if normal(name) in PACKAGES:
                found.append((name, text[len(name) :] or "any", extra))
    return found


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def page(root: Path = ROOT) -> str:
    """The whole text of docs/compatibility.md."""
    makefile = (root / "Makefile").read_text()
    pythons = set(re.findall(r'python-version: "([\d.]+)"', (root / WORKFLOW).read_text()))
    lines = [HEAD.format(python=", ".join(sorted(pythons))), row(("", *PACKAGES)), "|---" * (len(PACKAGES) + 1) + "|"]
    for target in targets(root):
        known = versions(root / constraints_of(target, makefile))
        lines.append(row((f"`make {target}`", *(known.get(name, "–") for name in PACKAGES))))
    python = ast.literal_eval(keywords(root / "setup.py")["python_requires"])
    lines += [TAIL.format(python=python), row(("package", "versions", "needed by")), "|---|---|---|"]
    for name, bounds, extra in accepted(root / "setup.py"):
        lines.append(row((name, bounds, f"the extra `{extra}`" if extra else "the package")))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
