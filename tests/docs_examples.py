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
# What is not in the environment of the core package: the page's blocks run in the first whose pattern they have.
IMPORT = r"^\s*(?:from|import) "
ENVIRONMENTS = {
    "verl": re.compile(IMPORT + r"(?:a3po_kernels\.integrations\.)?verl\b", re.MULTILINE),
    "trl": re.compile(IMPORT + r"(?:a3po_kernels\.integrations|transformers|trl|peft|datasets)\b", re.MULTILINE),
}
# Of frameworks that no environment here has: tests/test_trainer_pages.py runs them.
ELSEWHERE = [ROOT / "docs" / "trainers" / f"{name}.md" for name in ("megatron", "nemo-rl", "prime-rl", "slime")]


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


def environment(page: Path) -> str | None:
    """Where the page's blocks run: "core", "stand-ins", or a key of ENVIRONMENTS; None without blocks."""
    if page in ELSEWHERE:
        return "stand-ins"
    found = "".join(blocks(page))
    return next((name for name, pattern in ENVIRONMENTS.items() if pattern.search(found)), "core" if found else None)


def pages(where: str) -> list[Path]:
    """The pages whose Python blocks run in this environment."""
    return [page for page in PAGES if environment(page) == where]


def run_blocks(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """One process for a page; its blocks share their names, and a warning of ours is an error."""
    program = f"page, names = {str(page)!r}, {{'__name__': 'page'}}\n" + "".join(
        f"exec(compile({block!r}, page, 'exec'), names)\n" for block in blocks(page)
    )
    script = folder / "page.py"
    script.write_text(program)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "error::UserWarning:a3po_kernels",
    }  # fmt: skip
    command = [sys.executable, str(script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
