"""The plots of a comparison: quality over size, learning curves, and the sweeps of the learning rate."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from modicum.compare import svg
from modicum.compare.columns import compressions, count, metric_of, size, value_of, with_interval
from modicum.compare.words import untrained_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Cell = dict[str, Any]
_MARKERS = "os^DvPX"
_LINES = ("-", "--", ":", "-.")
_FRONT = {"color": svg.FAINT, "linewidth": 4, "alpha": 0.35, "solid_capstyle": "round"}
_FILLS = ("full", "none", "left", "bottom")


def _total(cell: Cell) -> float | None:
    stored, shared = cell.get("stored_bytes"), cell.get("shared_bytes")
    return None if stored is None or shared is None else stored + shared


#: key of the Pareto front, name, and what a cell has of it
_SIZES: tuple[tuple[str, str, Callable[[Cell], float | None]], ...] = (
    ("trained_values", "trained values", lambda cell: cell.get("trained_values")),
    ("stored_bytes", "bytes stored for one adapter", lambda cell: cell.get("stored_bytes")),
    ("total_bytes", "bytes stored and shared", _total),
)


@dataclass(frozen=True)
class Plot:
    """One plot: its name, which is the id of its `<svg>`, a title, the drawing, and what it does not show."""

    name: str
    title: str
    svg: str
    remark: str = ""


@dataclass(frozen=True)
class _Look:
    """How cells are told apart: colour and marker say the method, line and filling the compression.

    A method is an entry of the specification, by its label: the same one with other options is another.
    """

    methods: tuple[str, ...]
    bases: tuple[str, ...]

    def method(self, name: str) -> dict[str, Any]:
        index = self.methods.index(name)
        # past seven, the same colours return with other markers
        marker = _MARKERS[(index + index // len(svg.SERIES)) % len(_MARKERS)]
        return {"color": svg.SERIES[index % len(svg.SERIES)], "marker": marker}

    def base(self, name: str) -> dict[str, Any]:
        index = self.bases.index(name)
        return {"linestyle": _LINES[index % len(_LINES)], "fillstyle": _FILLS[index % len(_FILLS)]}

    def of(self, cell: Cell) -> dict[str, Any]:
        look = {**self.method(_method(cell)), **self.base(str(cell["compression"]))}
        return {**look, "markerfacecoloralt": svg.PAPER, "markersize": 5.5, "markeredgewidth": 1.1}


def plots(comparison: dict[str, Any]) -> dict[str, list[Plot]]:
    """The plots of a comparison by the part of the report they belong to: `quality`, `curves`, `rates`.

    A part is empty where no cell has anything for it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    cells = comparison["cells"]
    look = _Look(tuple(dict.fromkeys(_method(cell) for cell in cells)), tuple(compressions(comparison)))
    with svg.settings():
        return {
            "quality": list(_quality(comparison, look)),
            "curves": list(_per_method(comparison, look, "curves", "learning curves", _curves)),
            "rates": list(_per_method(comparison, look, "rates", "learning rates", _rates)),
        }


def _quality(comparison: dict[str, Any], look: _Look) -> Iterator[Plot]:
    """The metric over each of three sizes; sizes that no cell has are left out."""
    cells, metric = comparison["cells"], comparison["metric"]
    for key, what, across in _SIZES:
        drawn = [i for i, cell in enumerate(cells) if metric_of(comparison, cell) and (across(cell) or 0) > 0]
        if not drawn:
            continue
        figure, axes = svg.figure_of(3.9)
        shown = size if "bytes" in what else _short
        _untrained(axes, comparison, look)
        _front(axes, comparison, key, across)
        titles = _marks(axes, comparison, look, drawn, across)
        axes.set_xscale("log")
        svg.log_ticks(axes, shown, base=2 if "bytes" in what else 10)
        axes.set(xlabel=what, ylabel=metric)
        _legend(figure, axes, look, {_method(cells[index]) for index in drawn})
        left = [_name(cell, look) for index, cell in enumerate(cells) if index not in drawn]
        remark = f"Not drawn, for want of a value: {', '.join(left)}." if left else ""
        title = f"{metric} over {what}"
        summary = f"{len(drawn)} cells, {what} on a logarithmic axis. The table has the same numbers."
        name = f"plot-{key.replace('_', '-')}"
        yield Plot(name, title, svg.inline(figure, name, title, summary, titles), remark)


def _marks(
    axes: Any,
    comparison: dict[str, Any],
    look: _Look,
    drawn: Sequence[int],
    across: Callable[[Cell], float | None],
) -> dict[str, str]:
    """Draws the cells with their intervals, and lines through the ranks of one method; returns the tooltips."""
    cells, titles = comparison["cells"], {}
    families: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for index in drawn:
        cell = cells[index]
        measure, x = cell["metrics"][comparison["metric"]], across(cell) or 0.0
        y, low, high = measure["value"], measure.get("low"), measure.get("high")
        style = look.of(cell)
        if low is not None and high is not None and math.isfinite(high - low):
            (bar,) = axes.plot([x, x], [low, high], color=style["color"], linewidth=1, zorder=3)
            bar.set_gid(f"bar:{index}")
        (mark,) = axes.plot([x], [y], **{**style, "linestyle": "none"}, zorder=4)
        mark.set_gid(f"mark:{index}")
        titles[f"mark:{index}"] = f"{_name(cell, look)}: {with_interval(measure)}"
        if cell.get("rank") is not None:
            families[_method(cell), str(cell["compression"])].append((x, y))
    for (method, base), points in families.items():
        xs, ys = zip(*sorted(points), strict=True)
        style = {"color": look.method(method)["color"], "linestyle": look.base(base)["linestyle"]}
        (line,) = axes.plot(xs, ys, **style, linewidth=1.2, alpha=0.75, zorder=2)
        line.set_gid(f"link:c{look.bases.index(base)}")
    return titles


def _untrained(axes: Any, comparison: dict[str, Any], look: _Look) -> None:
    for base, value in untrained_values(comparison).items():
        if base in look.bases:
            style = look.base(base)["linestyle"]
            line = axes.axhline(value, color=svg.FAINT, linewidth=0.9, linestyle=style, zorder=1)
            line.set_gid(f"untrained:c{look.bases.index(base)}")


def _front(axes: Any, comparison: dict[str, Any], name: str, across: Callable[[Cell], float | None]) -> None:
    """The best metric to be had up to each size, as stairs through the cells of the Pareto front."""
    chosen = [comparison["cells"][index] for index in (comparison.get("pareto") or {}).get(name) or []]
    points = sorted(
        (across(cell), cell["metrics"][comparison["metric"]]["value"])
        for cell in chosen
        if metric_of(comparison, cell) and (across(cell) or 0) > 0
    )
    if points:
        xs, ys = zip(*points, strict=True)
        (line,) = axes.plot(xs, ys, drawstyle="steps-post", **_FRONT, zorder=1.5)
        line.set_gid("front:")


def _per_method(
    comparison: dict[str, Any], look: _Look, part: str, what: str, draw: Callable[..., Any]
) -> Iterator[Plot]:
    """One plot for each method that has anything to draw, all on the same scales, so that many cells stay readable."""
    drawn = {}
    for method in look.methods:
        chosen = [(i, c) for i, c in enumerate(comparison["cells"]) if _method(c) == method]
        figure, panels, titles = draw(comparison, look, chosen, _shades([cell for _, cell in chosen]))
        if titles:
            drawn[method] = figure, panels, titles
    for panels in zip(*(panels for _, panels, _ in drawn.values()), strict=True):
        svg.same_scale(panels)
    for number, (method, (figure, _, titles)) in enumerate(drawn.items()):
        title, summary = f"{method}: {what}", f"{len(titles)} cells of {method}, one line each."
        name = f"plot-{part}-{number}"
        yield Plot(name, title, svg.inline(figure, name, title, summary, titles))


def _curves(
    comparison: dict[str, Any], look: _Look, chosen: list[tuple[int, Cell]], shades: dict[str, float]
) -> tuple[Any, list[Any], dict[str, str]]:
    """Training loss above, the metric on validation rows below; the band spans the seeds."""
    figure, upper, lower = svg.figure_of(4.3, rows=2)
    titles = {}
    for index, cell in chosen:
        style, shade = look.of(cell), shades[cell["label"]]
        for axes, kind in ((upper, "train"), (lower, "validation")):
            points = _over_steps([curve.get(kind) or [] for curve in cell.get("curves") or []])
            if not points:
                continue
            steps, means, lows, highs = zip(*points, strict=True)
            lonely = {"marker": style["marker"], "markersize": 3} if len(steps) < 2 else {}
            (line,) = axes.plot(
                steps,
                means,
                color=style["color"],
                linestyle=style["linestyle"],
                linewidth=1.4,
                alpha=shade,
                label=svg.brief(_name(cell, look)),
                **lonely,
            )
            band = axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.12, linewidth=0)
            line.set_gid(f"curve:{index}")
            band.set_gid(f"band:{index}")
            titles[f"curve:{index}"] = _name(cell, look)
    lower.xaxis.get_major_locator().set_params(integer=True)
    upper.set(ylabel="training loss")
    lower.set(xlabel="step", ylabel=f"validation {comparison['metric']}")
    _names(figure, [upper, lower])
    return figure, [upper, lower], titles


def _rates(
    comparison: dict[str, Any], look: _Look, chosen: list[tuple[int, Cell]], shades: dict[str, float]
) -> tuple[Any, list[Any], dict[str, str]]:
    """The metric on validation rows over the learning rates of a sweep; the chosen one has a ring."""
    metric = comparison["metric"]
    figure, axes = svg.figure_of(3.2)
    titles, ticks = {}, set()
    for index, cell in chosen:
        measured = [
            (rate["learning_rate"], (rate.get("validation") or {}).get(metric))
            for rate in cell.get("rates") or []
        ]
        points = sorted((rate, value_of(one)) for rate, one in measured if value_of(one) is not None)
        if not points or len(measured) < 2:
            continue
        ticks.update(rate for rate, _ in points)
        style, shade = look.of(cell), shades[cell["label"]]
        (line,) = axes.plot(
            *zip(*points, strict=True),
            **{**style, "markersize": 3.5},
            linewidth=1.2,
            alpha=shade,
            label=svg.brief(_name(cell, look)),
        )
        line.set_gid(f"sweep:{index}")
        titles[f"sweep:{index}"] = _name(cell, look)
        value = dict(points).get(cell.get("learning_rate"))
        if value is not None:
            edge = cell.get("at_edge")
            (ring,) = axes.plot(
                [cell["learning_rate"]],
                [value],
                marker="s" if edge else "o",
                markersize=10,
                markerfacecolor="none",
                markeredgecolor=svg.ALERT if edge else svg.INK,
                markeredgewidth=1.2 if edge else 0.8,
                linestyle="none",
            )
            ring.set_gid(f"{'edge' if edge else 'chosen'}:{index}")
    if not titles:
        return figure, [axes], titles
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(sorted(ticks), [f"{rate:g}" for rate in sorted(ticks)])
    axes.tick_params("x", rotation=40 if len(ticks) > 5 else 0)
    axes.set(xlabel="learning rate", ylabel=f"validation {metric}")
    _names(figure, [axes])
    return figure, [axes], titles


def _over_steps(seeds: list[list[list[float]]]) -> list[tuple[float, float, float, float]]:
    """Step, mean, lowest and highest over the seeds that have the step, without what is not finite."""
    values: dict[float, list[float]] = defaultdict(list)
    for points in seeds:
        for step, value in points:
            if value is not None and math.isfinite(value):
                values[step].append(value)
    return [(step, fmean(found), min(found), max(found)) for step, found in sorted(values.items())]


def _shades(cells: list[Cell]) -> dict[str, float]:
    """How opaque the line of each cell is: the cells of a method go from light to full in their order of size."""
    sizes: dict[str, int] = defaultdict(int)
    for cell in cells:
        sizes[cell["label"]] = max(sizes[cell["label"]], cell.get("trained_values") or 0)
    labels = sorted(sizes, key=lambda label: sizes[label])
    return {label: 0.4 + 0.6 * (i + 1) / len(labels) for i, label in enumerate(labels)}


def _method(cell: Cell) -> str:
    """The label of a cell without its rank."""
    return str(cell["label"]).removesuffix(f" r={cell.get('rank')}")


def _name(cell: Cell, look: _Look) -> str:
    return f"{cell['label']} ({cell['compression']})" if len(look.bases) > 1 else str(cell["label"])


def _short(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return count(value)


def _legend(figure: Any, axes: Any, look: _Look, methods: set[str]) -> None:
    """What colours, lines and fillings mean, below the axes."""
    from matplotlib.lines import Line2D

    def line(label: str, **style: Any) -> Any:
        return Line2D([], [], label=svg.brief(label), **{"color": svg.FAINT, "linewidth": 1.2, **style})

    handles = [line(name, **look.method(name), markersize=5.5) for name in look.methods if name in methods]
    if len(look.bases) > 1:
        filled = {"marker": "o", "markerfacecoloralt": svg.PAPER}
        handles += [line(f"compression {name}", **look.base(name), **filled) for name in look.bases]
    gids = {str(line.get_gid()) for line in axes.get_lines()}
    if "front:" in gids:
        handles.append(line("Pareto front", **_FRONT))
    if any(gid.startswith("untrained") for gid in gids):
        handles.append(line("base, untrained", linewidth=0.9))
    svg.legend_below(figure, handles, 3)


def _names(figure: Any, panels: Sequence[Any]) -> None:
    """The names of the cells' lines below the axes, each once."""
    # matplotlib's own search for them passes over labels that start with an underscore
    lines = {line.get_gid(): line for axes in panels for line in axes.get_lines()}
    svg.legend_below(
        figure, [line for gid, line in lines.items() if str(gid).startswith(("curve:", "sweep:"))], 2
    )
