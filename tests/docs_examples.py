"""The Python blocks of the README and of docs/, run as a reader would: a page's in order, in one process."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
# Where a block runs: in the first environment whose libraries it imports, else in that of the core package.
IMPORT = r"^\s*(?:from|import) "
ENVIRONMENTS = {
    "verl": re.compile(IMPORT + r"(?:a3po_kernels\.integrations\.)?verl\b", re.MULTILINE),
    "trl": re.compile(IMPORT + r"(?:a3po_kernels\.integrations|transformers|trl|peft|datasets)\b", re.MULTILINE),
}
# Of frameworks that no environment here has: tests/test_trainer_pages.py runs them.
ELSEWHERE = [ROOT / "docs" / "trainers" / f"{name}.md" for name in ("megatron", "nemo-rl", "prime-rl", "slime")]

# What is in an environment of its own, beside the other libraries.
VERL = re.compile(r"^\s*from a3po_kernels\.integrations\.verl\b", re.MULTILINE)
TRL = re.compile(r"^\s*from a3po_kernels\.integrations\.trl\b", re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """The page's Python blocks, each under as many lines as stand above it, so that a traceback names its line."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text[: match.start(2)].count("\n") + match[2] for match in BLOCK.finditer(text)]


def names_in_table(page: Path, heading: str) -> list[str]:
    """What the first column of the tables under a heading of the second level names in `code`."""
    section = page.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]


def strings_of(source: Path) -> list[str]:
    """The literal strings of a Python file, "…" in the place of what is formatted into them."""
    found = []
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
    return found


def has_message(text: str, quoted: str) -> bool:
    """Whether a string has the pieces of a message, quoted with "…" or "..." between them, in their order."""
    at = 0
    for piece in filter(None, (part.strip() for part in re.split(r"…|\.\.\.", quoted))):
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def environment(block: str) -> str:
    """Where a block runs: "core", or a key of ENVIRONMENTS."""
    return next((name for name, pattern in ENVIRONMENTS.items() if pattern.search(block)), "core")


def pages(where: str) -> list[Path]:
    """The pages with blocks that run in this environment; "core": those without others; "stand-ins": ELSEWHERE."""
    if where == "stand-ins":
        return ELSEWHERE
    found = {page: {environment(block) for block in blocks(page)} for page in PAGES if page not in ELSEWHERE}
    return [page for page, kinds in found.items() if (kinds == {"core"} if where == "core" else where in kinds)]


def run_blocks(page: Path, folder: Path, where: str) -> subprocess.CompletedProcess[str]:
    """One process for a page's blocks of this environment and of the core; they share their names.

    A warning of ours is an error.
    """
    program = f"page, names = {str(page)!r}, {{'__name__': 'page'}}\n" + "".join(
        f"exec(compile({block!r}, page, 'exec'), names)\n"
        for block in blocks(page)
        if environment(block) in ("core", where)
    )
    script = folder / "page.py"
    script.write_text(program)
    variables = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "error::UserWarning:a3po_kernels",
    }  # fmt: skip
    command = [sys.executable, str(script)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=240)
