"""The Python blocks of the README and of docs/, run as a reader would: a page's in order, in one process."""

from __future__ import annotations

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


def blocks(page: Path) -> list[str]:
    """The page's Python blocks, each under as many lines as stand above it, so that a traceback names its line."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text[: match.start(2)].count("\n") + match[2] for match in BLOCK.finditer(text)]


def names_in_table(page: Path, heading: str) -> list[str]:
    """What the first column of the tables under a heading of the second level names in `code`."""
    section = page.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]+) \|", section, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]


def environment(page: Path) -> str | None:
    """Where the page's blocks run: "core", or a key of ENVIRONMENTS; None without blocks."""
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
