"""A comparison in Markdown, and as the table that generated documentation pages show."""

from __future__ import annotations

import re
from typing import Any

from modicum.compare.columns import columns
from modicum.compare.words import conditions, found, reading, unfinished

#: what the run took: in the HTML report, too much for the short table
_LONG = {"processor time", "GPU time", "peak memory", "peak GPU memory", "energy", "cost"}


def table(comparison: dict[str, Any]) -> dict[str, Any]:
    """The short table of a comparison, {"columns", "rows", "note"}: texts as they are shown, one row per cell.

    Cells that failed or are missing have a row like all others. Under the key `table` of a committed result it is what
    the generated documentation pages show.
    """
    shown = [column for column in columns(comparison) if column.title not in _LONG]
    return {
        "columns": [column.title for column in shown],
        "rows": [[column.text(cell) for column in shown] for cell in comparison["cells"]],
        "note": " ".join(reading(comparison)),
    }


def markdown_table(comparison: dict[str, Any]) -> str:
    """The short table of a comparison in Markdown, numbers flush right; nothing in it is read as markup."""
    shown = [column for column in columns(comparison) if column.title not in _LONG]
    lines = [
        [_plain(column.title) for column in shown],
        ["---:" if column.number else "---" for column in shown],
        *([_plain(column.text(cell)) for column in shown] for cell in comparison["cells"]),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(comparison: dict[str, Any]) -> str:
    """The Markdown report of a comparison: what was found, the table, what did not finish, the conditions."""
    parts = [
        f"# {_plain(comparison['name'])}",
        "\n".join(f"- {_plain(sentence)}" for sentence in found(comparison)),
        markdown_table(comparison),
        "\n".join(f"- {_plain(sentence)}" for sentence in reading(comparison)),
    ]
    if rest := unfinished(comparison):
        parts += ["## Without results", "\n".join(f"- {_plain(name)}: {_plain(why)}" for name, why in rest)]
    shown = "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in conditions(comparison))
    return "\n\n".join(part for part in [*parts, "## Conditions", shown] if part) + "\n"


def _plain(text: str) -> str:
    """`text` on one line, with everything that Markdown would read as markup or as a column escaped."""
    return (
        re.sub(r"([\\`*\[\]|~#])", r"\\\1", " ".join(str(text).split()))
        .replace("&", "&amp;")
        .replace("<", "&lt;")
    )
