"""When an arm is surely worse for its users than the control: more errors, or slow answers."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from modicum.serve.experiments.sequential import weighted_mean

if TYPE_CHECKING:
    import sqlite3

    from modicum.serve.experiments.design import Design
    from modicum.serve.experiments.tables import Totals

#: the chance of a false alarm over the whole experiment, for each arm and guardrail
ALPHA = 0.01
#: the share of the control's requests that take longer than its p95
SLOW = 0.05
#: users who must have met with it, so that one alone cannot end an experiment
USERS = 3
#: answers of the control from which its p95 is known, and the most of them that count
_LEAST, _MOST = 40, 500


class Pace:
    """The control's p95 over its newest answers, by experiment; belongs to the thread that writes."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}

    def limit(self, db: sqlite3.Connection, experiment: int, design: Design) -> float | None:
        """The seconds above which an answer is slow, by what was known before it; None if too little was.

        Only the past counts, so that under equal arms each answer is slow with the chance `SLOW` at most.
        """
        if experiment not in self._seconds:
            query = (
                "SELECT seconds FROM exposures WHERE experiment = ? AND arm = ? AND outcome != 'error' "
                "ORDER BY id DESC LIMIT ?"
            )
            rows = db.execute(query, (experiment, design.control.label, _MOST)).fetchall()
            self._seconds[experiment] = deque((seconds for (seconds,) in reversed(rows)), _MOST)
        known = self._seconds[experiment]
        return design.latency_factor * float(np.quantile(known, 1 - SLOW)) if len(known) >= _LEAST else None

    def add(self, experiment: int, seconds: float) -> None:
        """Returns when one more answer of the control counts."""
        self._seconds[experiment].append(seconds)


def errors(control: Totals, arm: Totals, margin: float) -> bool:
    """Whether the arm surely fails more often than the control, by more than `margin`."""
    if not arm.errors:
        return False
    low = weighted_mean([0.0, 1.0], [arm.requests - arm.errors, arm.errors], ALPHA).low
    high = weighted_mean([0.0, 1.0], [control.requests - control.errors, control.errors], ALPHA).high
    return low is not None and high is not None and low - high > margin


def slowness(arm: Totals) -> bool:
    """Whether surely more than `SLOW` of the arm's requests are slow."""
    low = weighted_mean([0.0, 1.0], [arm.timed - arm.slow, arm.slow], 2 * ALPHA).low
    return bool(arm.slow) and low is not None and low > SLOW
