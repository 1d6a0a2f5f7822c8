"""Blocks of code in the Markdown files that people read."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "index.md"]
PAGES += sorted(
    file for folder in ("learn", "do", "understand") for file in (ROOT / "docs" / folder).rglob("*.md")
)
_BLOCK = re.compile(r"^```(?P<kind>\w+)[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, kind: str) -> list[str]:
    """The code of every block of that kind, top to bottom."""
    text = page.read_text(encoding="utf-8")
    return [match["code"] for match in _BLOCK.finditer(text) if match["kind"] == kind]
