"""The Pareto front of evaluated sub-networks, as rows and as a picture."""

from __future__ import annotations

import base64
import html
import io
from typing import TYPE_CHECKING, Any

from modicum.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modicum.search.study import Point


def front(points: Sequence[Point], maximized: Mapping[str, bool]) -> list[Point]:
    """The points within all budgets that no other one beats, by the first objective from its best.

    A point is beaten by one that is at least as good in every objective of `maximized` and better in one.
    """
    feasible = [point for point in points if not point.violations]
    signs = {name: 1.0 if larger else -1.0 for name, larger in maximized.items()}

    def scores(point: Point) -> tuple[float, ...]:
        return tuple(sign * point.values[name] for name, sign in signs.items())

    found: list[Point] = []
    # best first, so that whoever beats a point has been kept before it
    for point in sorted(feasible, key=lambda one: (scores(one), -one.number), reverse=True):
        mine = scores(point)
        if not any(all(a >= b for a, b in zip(scores(kept), mine, strict=True)) for kept in found):
            found.append(point)
    return found


def blank(title: str = "", panels: int = 1) -> Any:
    """An empty matplotlib figure with room for so many panels.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "pictures of the Pareto front need matplotlib: pip install 'modicum[search]'"
        ) from error
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    figure.suptitle(title)
    return figure


def draw(points: Sequence[Point], best: Sequence[Point], maximized: Mapping[str, bool], title: str) -> Any:
    """A matplotlib figure: the first objective over each other one, the front in colour.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = blank(title, max(1, len(maximized) - 1))
    first, *others = list(maximized)
    others = others or ["number"]
    chosen = {point.number for point in best}
    kinds = (
        ("over a budget", "x", "#999999", lambda p: bool(p.violations)),
        ("evaluated", "o", "#7799bb", lambda p: not p.violations and p.number not in chosen),
        ("Pareto front", "o", "#cc3311", lambda p: p.number in chosen),
    )
    for index, other in enumerate(others, 1):
        axes = figure.add_subplot(1, len(others), index)
        for label, marker, colour, belongs in kinds:
            group = [point for point in points if belongs(point)]
            if group:
                across = [point.number if other == "number" else point.values[other] for point in group]
                axes.scatter(
                    across, [p.values[first] for p in group], marker=marker, color=colour, label=label
                )
        axes.set_xlabel("trial" if other == "number" else other.replace("_", " "))
        axes.set_ylabel(first.replace("_", " "))
        axes.legend()
    return figure


def page(figure: Any, points: Sequence[Point], best: Sequence[Point], title: str) -> str:
    """One HTML file with the picture and a table of all points; it loads nothing from elsewhere."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    image = base64.b64encode(buffer.getvalue()).decode()
    names = list(dict.fromkeys(name for point in points for name in point.values))
    chosen = {point.number for point in best}
    rows = []
    for point in sorted(points, key=lambda one: (one.number not in chosen, one.number)):
        kind = "front" if point.number in chosen else ("over" if point.violations else "")
        cells = [str(point.number), *(f"{point.values.get(name, float('nan')):.6g}" for name in names)]
        choices = html.escape(", ".join(f"{group}={choice}" for group, choice in point.choices.items()))
        cells.append(f"<details><summary>{len(point.choices)} groups</summary>{choices}</details>")
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("trial", *names, "choices"))
    return _PAGE.format(title=html.escape(title), image=image, head=head, rows="\n".join(rows))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem; }} img {{ max-width: 100%; }}
table {{ border-collapse: collapse; }}
td, th {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }}
.front {{ background: #fdecea; }} .over {{ color: #999; }}
</style></head><body><h1>{title}</h1><img alt="Pareto front" src="data:image/png;base64,{image}">
<table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table></body></html>
"""
