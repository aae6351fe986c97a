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
# What is not in the environment of the core package.
OTHERS = re.compile(
    r"^\s*(?:from|import) (?:a3po_kernels\.integrations|transformers|trl|peft|datasets)\b", re.MULTILINE
)

# What is in an environment of its own, beside the other libraries.
VERL = re.compile(r"^\s*from a3po_kernels\.integrations\.verl\b", re.MULTILINE)
TRL = re.compile(r"^\s*from a3po_kernels\.integrations\.trl\b", re.MULTILINE)


def blocks(page: Path) -> list[str]:
    """The page's Python blocks, each under as many lines as stand above it, so that a traceback names its line."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text[: match.start(2)].count("\n") + match[2] for match in BLOCK.finditer(text)]


def pages(others: bool) -> list[Path]:
    """Pages with Python blocks: those that need a library of OTHERS, or those that do not."""
    return [page for page in PAGES if (found := blocks(page)) and bool(OTHERS.search("".join(found))) == others]


def run_blocks(page: Path, folder: Path, without: re.Pattern[str] | None = None) -> subprocess.CompletedProcess[str]:
    """One process for a page; its blocks share their names, and a warning of ours is an error.

    without: what a block that is left out has: another environment's libraries.
    """
    program = f"page, names = {str(page)!r}, {{'__name__': 'page'}}\n" + "".join(
        f"exec(compile({block!r}, page, 'exec'), names)\n"
        for block in blocks(page)
        if without is None or not without.search(block)
    )
    script = folder / "page.py"
    script.write_text(program)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "error::UserWarning:a3po_kernels",
    }  # fmt: skip
    command = [sys.executable, str(script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
