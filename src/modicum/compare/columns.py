"""What the tables of a comparison show: one column each, as text and as the number it is sorted by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

Cell = dict[str, Any]
#: what a table shows where there is nothing to show
NOTHING = "–"
_EDGES = {"low": "best at the lowest rate", "high": "best at the highest rate"}


@dataclass(frozen=True)
class Column:
    """One column: its title, what a cell shows there, and its number (None: sorted by the text, or nothing there)."""

    title: str
    text: Callable[[Cell], str]
    number: Callable[[Cell], float | None] | None = None


def columns(comparison: dict[str, Any]) -> list[Column]:
    """The columns of a comparison's table; those that no cell has anything for are left out."""
    metric, cells = comparison["metric"], comparison["cells"]
    others = [name for cell in cells for name in cell.get("metrics") or {} if name != metric]
    quantities = [
        _measured(metric, lambda cell: (cell.get("metrics") or {}).get(metric)),
        _quantity("trained values", lambda cell: cell.get("trained_values"), count),
        _quantity("without head", _without_head, count),
        _quantity("stored", lambda cell: cell.get("stored_bytes"), size),
        _quantity("shared", lambda cell: cell.get("shared_bytes"), size),
        _quantity("learning rate", lambda cell: cell.get("learning_rate"), lambda value: f"{value:g}"),
        _quantity("training", lambda cell: value_of(cell.get("train_seconds")), seconds),
        _quantity("processor time", lambda cell: value_of(cell.get("cpu_seconds")), seconds),
        _quantity("GPU time", lambda cell: value_of(cell.get("gpu_seconds")), seconds),
        _quantity("peak memory", lambda cell: cell.get("peak_memory_bytes"), size),
        _quantity("peak GPU memory", lambda cell: cell.get("peak_gpu_memory_bytes"), size),
        _quantity("energy", lambda cell: cell.get("energy_joules"), lambda value: f"{value:,.3g} J"),
        Column("cost", _cost, lambda cell: (cell.get("cost") or {}).get("amount")),
        *(
            _measured(name, lambda cell, name=name: (cell.get("metrics") or {}).get(name))
            for name in dict.fromkeys(others)
        ),
    ]
    told = [column for column in quantities if any(column.text(cell) != NOTHING for cell in cells)]
    notes = Column("notes", lambda cell: "; ".join(notes_on(cell)) or NOTHING)
    return [
        Column("cell", lambda cell: str(cell["label"])),
        *(
            [Column("compression", lambda cell: str(cell["compression"]))]
            if len(compressions(comparison)) > 1
            else []
        ),
        *told[:1],
        # beside the metric, since they qualify it
        *([notes] if any(notes.text(cell) != NOTHING for cell in cells) else []),
        *told[1:],
    ]


def compressions(comparison: dict[str, Any]) -> list[str]:
    """The compressions of the base model that the cells have, in their order."""
    return list(dict.fromkeys(str(cell["compression"]) for cell in comparison["cells"]))


def notes_on(cell: Cell) -> list[str]:
    """What has to be known of a cell beside its numbers: not finished, best at the edge of its sweep, beaten."""
    if cell["state"] != "done":
        return [str(cell["state"])]
    notes = [_EDGES[cell["at_edge"]]] if cell.get("at_edge") in _EDGES else []
    if cell.get("significantly_worse_than_best"):
        notes.append("worse than the best")
    return notes


def metric_of(comparison: dict[str, Any], cell: Cell) -> dict[str, Any] | None:
    """The measure by which a cell is compared; None where it was not measured or is not a number."""
    measure = (cell.get("metrics") or {}).get(comparison["metric"])
    return measure if value_of(measure) is not None else None


def value_of(measure: dict[str, Any] | None) -> float | None:
    """The mean of a measure; None where there is none, or no finite one."""
    value = (measure or {}).get("value")
    return float(value) if value is not None and math.isfinite(value) else None


def best_cell(comparison: dict[str, Any]) -> Cell | None:
    """The finished cell with the best mean; None where no cell has one."""
    sign = 1.0 if comparison["larger_is_better"] else -1.0
    done = [cell for cell in comparison["cells"] if metric_of(comparison, cell)]
    return max(done, key=lambda cell: sign * cell["metrics"][comparison["metric"]]["value"], default=None)


def with_interval(measure: dict[str, Any]) -> str:
    """The mean ± half its interval, both with as many digits as suit the mean: `0.861 ± 0.012`."""
    value, low, high = measure["value"], measure.get("low"), measure.get("high")
    if value is None or not math.isfinite(value):
        return "diverged"
    digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    half = f" ± {(high - low) / 2:,.{digits}f}" if low is not None and high is not None else ""
    return f"{value:,.{digits}f}{half}"


def count(value: float) -> str:
    """A whole number with its thousands set apart."""
    return f"{value:,.0f}"


def size(value: float) -> str:
    """A number of bytes in the largest unit that leaves at least one, with three digits: `144 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"


def seconds(value: float) -> str:
    """A duration in seconds, minutes or hours."""
    if value < 120:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 7200 else f"{value / 3600:.3g} h"


def _measured(title: str, get: Callable[[Cell], dict[str, Any] | None]) -> Column:
    def text(cell: Cell) -> str:
        measure = get(cell)
        return with_interval(measure) if measure else NOTHING

    return Column(title, text, lambda cell: value_of(get(cell)))


def _quantity(title: str, get: Callable[[Cell], float | None], shown: Callable[[float], str]) -> Column:
    def text(cell: Cell) -> str:
        value = get(cell)
        return NOTHING if value is None else shown(value)

    return Column(title, text, get)


def _without_head(cell: Cell) -> int | None:
    """None for a cell without a head of its own: the column before says it."""
    values = cell.get("trained_values_without_head")
    return None if values == cell.get("trained_values") else values


def _cost(cell: Cell) -> str:
    cost = cell.get("cost")
    # what has a price but was not measured is not in the sum
    return (
        f"{'≥ ' if cost.get('missing') else ''}{cost['amount']:.3g} {cost['currency']}" if cost else NOTHING
    )
