"""What mkdocs cannot do by itself: links from a page to files of the repository that are no pages of the manual."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Names the file in the link's place; PluginError if it is not there."""

    def named(match: re.Match[str]) -> str:
        text, file = match[1], ((DOCS / page.file.src_path).parent / match[2]).resolve()
        if file.is_relative_to(DOCS):
            return match[0]
        path = file.relative_to(ROOT)
        if not file.exists():
            raise PluginError(f"{page.file.src_path}: {path} is not a file of the repository")
        return f"`{path}`" if text.strip("`") == str(path) else f"{text} (`{path}`)"

    return LINK.sub(named, markdown)
