"""What a comparison may say about its cells: which is best, which are significantly worse, which nothing beats."""

from __future__ import annotations

import dataclasses
import math
from statistics import stdev
from typing import TYPE_CHECKING, Any

from modicum.evaluate.intervals import over_seeds
from modicum.evaluate.statistics import holm, paired_t

if TYPE_CHECKING:
    from collections.abc import Sequence

#: with two, the test stands on a single degree of freedom and rejects by luck
SEEDS = 3
#: what a cell costs, each of which makes a Pareto front with the metric
COSTS = ("trained_values", "stored_bytes")


def measure(values: Sequence[float | None], confidence: float) -> dict[str, Any] | None:
    """Mean over seeds with Student's t interval, standard deviation and the values; None without values.

    A value that is missing or not finite makes the mean None: a run that diverged is not left out.
    """
    if not values:
        return None
    plain = [math.nan if value is None else float(value) for value in values]
    found = over_seeds(plain, confidence)
    if not math.isfinite(found.value):
        shown = [value if math.isfinite(value) else None for value in plain]
        return {**dataclasses.asdict(found), "value": None, "std": None, "values": shown}
    spread = stdev(plain) if found.n > 1 else None
    return {**dataclasses.asdict(found), "std": spread, "values": plain}


def judge(
    cells: Sequence[dict[str, Any]], metric: str, *, larger: bool, confidence: float
) -> list[dict[str, Any]]:
    """The cells, each with `significantly_worse_than_best`, `p_value` and the `difference` from the best cell.

    Differences are taken seed by seed, tested with the paired t-test, and corrected by Holm for the number of cells
    tested. None where nothing can be tested: fewer than `SEEDS` seeds, or differences that are all the same. The best
    cell itself is False.
    """
    none = {"significantly_worse_than_best": None, "p_value": None, "difference": None}
    scored = [index for index, cell in enumerate(cells) if _value(cell, metric) is not None]
    if not scored:
        return [{**cell, **none} for cell in cells]
    sign = 1.0 if larger else -1.0
    best = max(scored, key=lambda index: sign * _number(cells[index], metric))
    top = cells[best]["metrics"][metric]["values"]
    found: dict[int, dict[str, Any]] = {}
    tests: dict[int, float] = {}
    for index in scored:
        if index == best:
            continue
        gaps = [mine - its for mine, its in zip(cells[index]["metrics"][metric]["values"], top, strict=True)]
        found[index] = {**none, "difference": measure(gaps, confidence)}
        p = paired_t(gaps)
        if p is not None and len(gaps) >= SEEDS:
            tests[index] = p
    for index, p in zip(tests, holm(list(tests.values())), strict=True):
        found[index] |= {"p_value": p, "significantly_worse_than_best": p < 1 - confidence}
    found[best] = {**none, "significantly_worse_than_best": False if len(top) >= SEEDS else None}
    return [{**cell, **found.get(index, none)} for index, cell in enumerate(cells)]


def pareto(cells: Sequence[dict[str, Any]], metric: str, *, larger: bool) -> dict[str, list[int]]:
    """For each cost the indices of the cells that no other one beats in it and the metric, cheapest first."""
    sign = 1.0 if larger else -1.0
    fronts = {}
    for cost in COSTS:
        points = [
            (cell[cost], -sign * _number(cell, metric), index)
            for index, cell in enumerate(cells)
            if cell.get(cost) is not None and _value(cell, metric) is not None
        ]
        # beaten: no better in either, and worse in one
        fronts[cost] = [
            index
            for price, loss, index in sorted(points)
            if not any(
                other[0] <= price and other[1] <= loss and other[:2] != (price, loss) for other in points
            )
        ]
    return fronts


def _value(cell: dict[str, Any], metric: str) -> float | None:
    found = (cell.get("metrics") or {}).get(metric) if cell["state"] == "done" else None
    return None if found is None else found["value"]


def _number(cell: dict[str, Any], metric: str) -> float:
    return cell["metrics"][metric]["value"]
