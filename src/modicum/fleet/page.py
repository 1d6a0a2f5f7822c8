"""The report of a fleet as one HTML page that loads nothing."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1d2733; }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #d8dee6;
text-align: left; vertical-align: top } rect { fill: #00897b } .muted, text { color: #5b6773; fill: #5b6773 }
text { font-size: 11px } .scroll { overflow-x: auto; max-height: 30rem }
@media (prefers-color-scheme: dark) { body { background: #12181f; color: #dde4ec } td, th { border-color: #2c3642 } }
"""
_WIDTH, _HEIGHT, _FOOT = 640, 160, 20


def page(report: Mapping[str, Any], tables: Sequence[tuple[str, list[str], list[list[str]]]]) -> str:
    """The page of a report and its tables."""
    spec = report["spec"]
    title = escape(f"Fleet on {spec['model']['name_or_path']}")
    about = f"{spec['method']['name']}, digest {report['digest']}, seed {spec['train']['seed']}, {report['device']}"
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head><body>',
        f'<h1>{title}</h1><p class="muted">{escape(about)}</p>',
    ]
    kept = report["gains"]["kept"]
    for heading, columns, rows in tables:
        parts.append(f"<h2>{escape(heading)}</h2>")
        if kept is not None and heading.startswith("Gain"):
            parts.append(_bars(kept["histogram"]["edges"], kept["histogram"]["counts"]))
        parts.append(_table(columns, rows))
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _bars(edges: Sequence[float], counts: Sequence[int]) -> str:
    """A histogram as SVG."""
    wide, most = _WIDTH / len(counts), max(counts)
    bars = []
    for at, count in enumerate(counts):
        tall = (_HEIGHT - _FOOT) * count / most
        said = f"<title>{edges[at]:.4f} to {edges[at + 1]:.4f}: {count}</title>"
        box = (
            f'x="{at * wide:.1f}" y="{_HEIGHT - _FOOT - tall:.1f}" width="{wide - 2:.1f}" height="{tall:.1f}"'
        )
        bars.append(f"<rect {box}>{said}</rect>")
    ends = (
        f'<text x="0" y="{_HEIGHT - 4}">{edges[0]:.4f}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 4}" text-anchor="end">{edges[-1]:.4f}</text>'
    )
    label = "how many adapters have which gain"
    box = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    return f'<svg {box} role="img" aria-label="{label}">{"".join(bars)}{ends}</svg>'
