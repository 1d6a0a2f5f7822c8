"""matplotlib figures as SVG that lives inside an HTML page: its colours are the page's, its marks can be found.

Colours are drawn as fixed stand-ins and become the page's CSS variables: one drawing suits light, dark and paper. A gid
`mark:3` becomes `class="mark" data-cell="3"`, `link:c1` `class="link" data-base="1"`, `front:` `class="front"`; all
other ids, which only matplotlib needs, are dropped, since several figures share one page.
"""

from __future__ import annotations

import contextlib
import html
import io
import math
import re
import warnings
from typing import TYPE_CHECKING, Any

from modicum.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

INK, FAINT, RULE, PAPER, ALERT = "#010203", "#010204", "#010205", "#010206", "#010207"
#: Okabe and Ito's colours without their yellow, which is too light for lines
SERIES = tuple(f"#0102{10 + index}" for index in range(7))
_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    ALERT: "var(--alert)",
    **{colour: f"var(--c{index})" for index, colour in enumerate(SERIES)},
}
_SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


#: letters that a name in a legend has room for
_ROOM = 36


@contextlib.contextmanager
def settings() -> Iterator[None]:
    """In its context matplotlib draws as the report needs it, whatever the user has configured.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise MissingExtraError(
            "the plots of a comparison need matplotlib: pip install 'modicum[compare]'"
        ) from error
    with style.context(["default", _SETTINGS]):
        yield


def figure_of(height: float, rows: int = 1) -> tuple[Any, ...]:
    """A figure for half the page, and its axes, which share the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    return (figure, *axes)


def same_scale(panels: Sequence[Any]) -> None:
    """Gives all panels the same limits; logarithmic where a run that diverged would flatten all others."""
    values = [y for axes in panels for line in axes.get_lines() for y in line.get_ydata()]
    if values and min(values) > 0 and max(values) > 50 * min(values):
        for axes in panels:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lows, highs = zip(*(axes.get_ylim() for axes in panels), strict=True)
    for axes in panels:
        axes.set_ylim(min(lows), max(highs))


def log_ticks(axes: Any, shown: Callable[[float], str], base: int) -> None:
    """Three to seven ticks in words on a logarithmic axis.

    At whole powers of `base`, or 1, 2 and 5 times powers of ten; where the axis spans less, at equal distances.
    """
    from matplotlib.ticker import MaxNLocator

    low, high = axes.get_xlim()
    powers = range(math.floor(math.log(low, base)), math.ceil(math.log(high, base)) + 1)
    finest = [float(base) ** power * step for power in powers for step in ((1, 2, 5) if base == 10 else (1,))]
    inside = [value for value in finest if low <= value <= high]
    if base == 10 and len(inside) > 7:
        inside = [value for value in inside if math.log10(value).is_integer()]
    if len(inside) < 3:
        unit = 1024 ** math.floor(math.log(high, 1024)) if base == 2 else 1
        even = [
            unit * value
            for value in MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low / unit, high / unit)
        ]
        inside = [value for value in even if low <= value <= high]
    inside = inside[:: max(1, math.ceil(len(inside) / 7))]
    axes.set_xticks(inside, [shown(value) for value in inside])
    axes.minorticks_off()


def legend_below(figure: Any, handles: Sequence[Any], columns: int) -> None:
    """A legend below the axes; the figure grows by its height."""
    if handles:
        figure.set_figheight(figure.get_figheight() + 0.17 * math.ceil(len(handles) / columns))
        labels = [handle.get_label() for handle in handles]
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def brief(name: str) -> str:
    """`name` on one line, cut where it would not leave room for the axes."""
    name = " ".join(name.split())
    return name if len(name) <= _ROOM else f"{name[: _ROOM - 1]}…"


def inline(figure: Any, name: str, title: str, summary: str, titles: Mapping[str, str]) -> str:
    """The figure as one `<svg>` element named `name`, the same bytes for the same figure.

    `summary` is read aloud after `title`; `titles` are the tooltips of the elements with these gids. matplotlib itself
    escapes what is drawn as text.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    # the salt sets the ids of clip paths apart from those of the page's other figures
    with mpl.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # the browser has more characters than the font that lays out the figure
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"), None)
        )
    text = buffer.getvalue()
    # its style sheet would apply to the whole page
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)

    def tag(match: re.Match[str]) -> str:
        gid = match.group(1)
        kind, mine, place = gid.partition(":")
        if not mine:
            return "<g>"
        data = f' data-{"base" if place[0] == "c" else "cell"}="{place.lstrip("c")}"' if place else ""
        told = f"<title>{html.escape(titles[gid])}</title>" if gid in titles else ""
        return f'<g class="{kind}"{data}>{told}'

    text = re.sub(r'<g id="([^"]*)">', tag, text)
    size = re.search(r'viewBox="([^"]*)"', text)
    assert size is not None
    head = (
        f'<svg id="{name}" class="plot" viewBox="{size.group(1)}" role="img"'
        f' aria-labelledby="{name}-title {name}-summary"'
        f' xmlns:xlink="http://www.w3.org/1999/xlink"><title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-summary">{html.escape(summary)}</desc>'
    )
    return head + text[text.index(">") + 1 :].strip()
