"""docs/objectives.md as data: the presets' calls, and the names that it gives for a framework."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "objectives.md"


def preset_calls(text: str) -> list[tuple[str, dict]]:
    """(name, keywords) of the call in each row of the presets' table."""
    block = text.split("<!-- presets -->")[1].split("<!-- end -->")[0]
    calls = []
    for row in cells(block)[1:]:
        call = ast.parse(row[3].strip("`"), mode="eval").body
        assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args, row[3]
        keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        calls.append((call.func.id, keywords))
    return calls


def cells(block: str) -> list[list[str]]:
    """The rows of the tables in a text, without the lines under their heads."""
    rows = [line.strip("|").split("|") for line in block.splitlines() if re.match(r"\|(?! ?-)", line)]
    return [[cell.strip() for cell in row] for row in rows]


def spans(text: str, framework: str) -> set[str]:
    """The code spans of a framework's entries ("TRL: `a`, `b`<br>verl: `c`"), and of the columns with its name."""
    found: set[str] = set()
    head: list[str] = []
    for line in text.splitlines():
        row = cells(line)[0] if cells(line) else []
        head = row if row and not head else head if line.startswith("|") else []
        for title, cell in zip(head, row, strict=bool(row)):
            entries = [cell] if title == framework else cell.split("<br>")
            for entry in entries:
                if title == framework or entry.startswith(framework + ": "):
                    found |= set(re.findall(r"`([^`]+)`", entry))
    return found


def options(text: str, framework: str) -> set[tuple[str, str | None]]:
    """(option, value or None) of a framework's code spans; dropped quotes."""
    return {
        (name, value.strip('"') if given else None)
        for name, given, value in (span.partition("=") for span in spans(text, framework))
    }
