"""The edits that docs/extending.md shows, made on a copy of the repository."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"
BLOCK = re.compile(r"^```diff\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^--- (\S+)\n(.*?)(?=^--- |\Z)", re.MULTILINE | re.DOTALL)
FOLDERS = ("a3po_kernels", "reference", "tests", "bench", "docs", "examples")


def edits(text: str) -> list[tuple[str, str, str]]:
    """(file, what is there, what takes its place) of each hunk: lines after "@@", of "-" and " ", of "+" and " "."""
    found = []
    for name, body in FILE.findall("".join(BLOCK.findall(text))):
        for hunk in body.split("@@\n")[1:]:
            lines = hunk.splitlines(keepends=True)
            assert all(line[0] in " +-\n" for line in lines), hunk
            before = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            after = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            found.append((name, before, after))
    return found


def copied(folder: Path) -> Path:
    """A copy of what an edit may touch and the tests read."""
    for name in FOLDERS:
        leave = shutil.ignore_patterns("__pycache__", "results", "images")
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def extended(folder: Path) -> Path:
    """The copy with the page's edits; what a hunk replaces must be there exactly once."""
    copied(folder)
    for name, before, after in edits(PAGE.read_text(encoding="utf-8")):
        path = folder / name
        text = path.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{name} has {text.count(before)} times:\n{before}"
        path.write_text(text.replace(before, after), encoding="utf-8")
    return folder
