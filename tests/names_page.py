"""What docs/names.md says, for the tests that look its names up."""

from __future__ import annotations

import re

from objectives_page import PAGE as OBJECTIVES
from objectives_page import cells

PAGE = OBJECTIVES.with_name("names.md")


def rows(table: str) -> list[list[list[str]]]:
    """The code spans of each cell of a table between "<!-- its name -->" and "<!-- end -->", without its head."""
    text = PAGE.read_text(encoding="utf-8")
    block = text.split(f"<!-- {table} -->")[1].split("<!-- end -->")[0]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in cells(block)[1:]]


def tables() -> list[str]:
    return [name for name in re.findall(r"<!-- (.+?) -->", PAGE.read_text(encoding="utf-8")) if name != "end"]


def column(table: str, number: int) -> list[str]:
    return [span for row in rows(table) for span in row[number]]


def renamed(table: str, theirs: int, ours: int) -> dict[str, str]:
    """Their name -> ours, where a row has as many of the one as of the other."""
    pairs = [(row[theirs], row[ours]) for row in rows(table) if len(row[theirs]) == len(row[ours])]
    return {a: b for one, other in pairs for a, b in zip(one, other, strict=True)}
