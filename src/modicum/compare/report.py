"""The report of a comparison: one HTML page that loads nothing from elsewhere, and the same in Markdown."""

from __future__ import annotations

import base64
import hashlib
import html
from importlib import resources
from typing import TYPE_CHECKING, Any

from modicum.compare import markdown
from modicum.compare.columns import NOTHING, best_cell, columns, compressions
from modicum.compare.plots import Plot, plots
from modicum.compare.words import conditions, found, reading, unfinished
from modicum.store import atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from modicum.compare.columns import Cell, Column

HTML, MARKDOWN = "report.html", "report.md"


def write_report(folder: Path, comparison: dict[str, Any]) -> None:
    """Write `report.html` and `report.md` into `folder`, each whole or not at all; same comparison, same bytes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    # both are made before either is written
    pages = {HTML: page(comparison), MARKDOWN: markdown.page(comparison)}
    for name, text in pages.items():
        atomic.write_text(folder / name, text)


def page(comparison: dict[str, Any]) -> str:
    """The comparison as one HTML page: what was found, the table, the plots, how to read them, the conditions.

    Everything that comes from the comparison is escaped, and the page's policy lets no script run but its own and
    nothing be loaded.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    script, style = _own("page.js"), _own("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    drawn = plots(comparison)
    what = f"{len(comparison['cells'])} cells by {comparison['split']} {comparison['metric']}"
    title = f'<p class="kicker">Comparison of {_text(what)}</p><h1>{_text(comparison["name"])}</h1>'
    parts = [
        f"<header>{title}{_list(found(comparison), 'found')}</header>",
        _filter(comparison),
        _section("results", "Results", _table(comparison)),
        _section("quality", "Quality and size", _grid(drawn["quality"])),
        _section("curves", "Learning curves", _grid(drawn["curves"], _BAND)),
        _section("rates", "Learning rates", _grid(drawn["rates"], _RING)),
        _section("unfinished", "Without results", _unfinished(comparison)),
        _section("reading", "How to read this", _list(reading(comparison))),
        _section("conditions", "Conditions", _conditions(comparison)),
    ]
    return _PAGE.format(
        title=_text(comparison["name"]),
        digest=digest,
        style=style,
        script=script,
        body="\n".join(part for part in parts if part),
    )


def _own(name: str) -> str:
    return resources.files("modicum.compare").joinpath(name).read_text(encoding="utf-8")


def _text(value: Any) -> str:
    return html.escape(str(value))


def _section(name: str, title: str, content: str) -> str:
    """A section with its title; none where it has no content."""
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>' if content else ""


def _list(sentences: Sequence[str], kind: str = "") -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{kind}">{items}</ul>' if items else ""


def _filter(comparison: dict[str, Any]) -> str:
    bases = compressions(comparison)
    if len(bases) < 2:
        return ""
    choices = [("", "all"), *((str(index), name) for index, name in enumerate(bases))]
    inputs = "".join(
        f'<label><input type="radio" name="base" value="{value}" autocomplete="off"{"" if value else " checked"}>'
        f"{_text(name)}</label>"
        for value, name in choices
    )
    return f"<fieldset><legend>Compression</legend>{inputs}</fieldset>"


def _table(comparison: dict[str, Any]) -> str:
    shown, bases, best = columns(comparison), compressions(comparison), best_cell(comparison)
    head = "".join(
        f'<th scope="col" aria-sort="none"{_kind(column)}><button type="button">{_text(column.title)}</button></th>'
        for column in shown
    )
    rows = []
    for index, cell in enumerate(comparison["cells"]):
        kind = "best" if cell is best else "" if cell["state"] == "done" else "open"
        first, *others = shown
        name = _text(first.text(cell))
        rows.append(
            f'<tr data-cell="{index}" data-base="{bases.index(str(cell["compression"]))}" class="{kind}">'
            f'<th scope="row" data-value="{name}" title="{name}">{name}</th>'
            + "".join(_entry(column, cell) for column in others)
            + "</tr>"
        )
    caption = f"Results of {_text(comparison['name'])}"
    body = "\n".join(rows)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _kind(column: Column) -> str:
    return ' class="number"' if column.number else ""


def _entry(column: Column, cell: Cell) -> str:
    text = _text(column.text(cell))
    if column.number is None:
        alert = " alert" if cell["state"] != "done" or cell.get("at_edge") else ""
        kind = f' class="notes{alert}"' if column.title == "notes" and text != NOTHING else ""
        return f'<td data-value="{text}"{kind}>{text}</td>'
    number = column.number(cell)
    return f'<td class="number" data-value="{"" if number is None else repr(number)}">{text}</td>'


def _grid(drawn: Sequence[Plot], remark: str = "") -> str:
    figures = "\n".join(
        f"<figure><figcaption>{_text(plot.title)}</figcaption>{plot.svg}"
        + (f'<p class="small">{_text(plot.remark)}</p>' if plot.remark else "")
        + "</figure>"
        for plot in drawn
    )
    said = f'<p class="small">{remark}</p>' if remark else ""
    return f'{said}<div class="grid">\n{figures}\n</div>' if drawn else ""


def _unfinished(comparison: dict[str, Any]) -> str:
    return "".join(
        f"<p>{_text(name)}</p><pre>{_text(reason)}</pre>" for name, reason in unfinished(comparison)
    )


def _conditions(comparison: dict[str, Any]) -> str:
    entries = "".join(
        f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in conditions(comparison)
    )
    return f"<dl>{entries}</dl>"


_BAND = (
    "Mean over seeds; the band spans from the lowest to the highest seed. The lines of a method go from faint to full "
    "with the number of trained values."
)
_RING = (
    "Mean on validation rows at each rate tried. A ring marks the chosen rate; a square says that it is the lowest or "
    "the highest one tried."
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""
