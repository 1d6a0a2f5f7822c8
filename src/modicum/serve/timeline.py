"""The last hour of a server in a fixed amount of memory: spreads of durations, and frames of a second or ten."""

from __future__ import annotations

import math
import threading
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

#: cells of a spread per factor of ten: neighbours are 10 % apart, so a quantile is off by 5 % at most
_CELLS = 24
#: seconds below which nothing is told apart
_LEAST = 1e-5
#: how long a coarse frame is, in fine ones
_COARSE = 10


@final
class Spread:
    """How durations are spread: counts in cells that are 10 % wide, so that spreads add up and take no room."""

    def __init__(self) -> None:
        self._cells: Counter[int] = Counter()
        self.count = 0
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Returns when a duration is counted."""
        self.extend((seconds,))

    def extend(self, all_seconds: Sequence[float]) -> None:
        """Returns when all these durations are counted."""
        log, floor, cells = math.log10, math.floor, self._cells
        for seconds in all_seconds:
            cells[floor(_CELLS * log(max(seconds, _LEAST)))] += 1
        self.count += len(all_seconds)
        self.sum += math.fsum(all_seconds)

    def merge(self, other: Spread) -> None:
        """Returns when everything in `other` is counted here too."""
        self._cells.update(other._cells)
        self.count += other.count
        self.sum += other.sum

    def quantile(self, share: float) -> float | None:
        """The duration that `share` of all are no longer than, the middle of its cell; None of nothing."""
        left = share * self.count
        for cell, times in sorted(self._cells.items()):
            left -= times
            if left <= 0:
                return 10 ** ((cell + 0.5) / _CELLS)
        return None

    def below(self, cell: int) -> int:
        """How many are shorter than 10^(`cell` / 24) seconds."""
        return sum(times for one, times in self._cells.items() if one < cell)


def bounds(low: int, high: int) -> list[tuple[str, int]]:
    """The bounds of a Prometheus histogram, three per factor of ten from 10^low to 10^high seconds, and their cells.

    Words of three digits stand for them, which is 0.2 % from where the cells end.
    """
    step = _CELLS // 3
    return [
        (str(float(f"{10 ** (cell / _CELLS):.3g}")), cell)
        for cell in range(low * _CELLS, high * _CELLS + 1, step)
    ]


@dataclass(frozen=True)
class Gauges:
    """What stands at one moment."""

    running: int = 0
    waiting: int = 0
    cache_used: float = 0.0
    slots_used: int = 0
    #: bytes of the process
    memory: int = 0


@dataclass
class Work:
    """What was done within a stretch of time, and adds up."""

    requests: int = 0
    #: of these, what ended with an error or a timeout, and what was not taken on
    errors: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    #: summed over the steps
    sequences: int = 0
    first_token: Spread = field(default_factory=Spread)
    per_token: Spread = field(default_factory=Spread)

    def merge(self, other: Work) -> None:
        """Returns when everything in `other` is counted here too."""
        for name in (
            "requests",
            "errors",
            "refused",
            "prompt_tokens",
            "generated_tokens",
            "steps",
            "sequences",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.first_token.merge(other.first_token)
        self.per_token.merge(other.per_token)


@dataclass(frozen=True)
class Frame:
    """One stretch of time as the page draws it: rates per second, durations in seconds, None where there were none."""

    #: its end, seconds since 1970; the first field: frames are found by it
    at: float
    requests: float
    errors: float
    refused: float
    prompt_tokens: float
    generated_tokens: float
    first_token_p50: float | None
    first_token_p95: float | None
    per_token_p50: float | None
    per_token_p95: float | None
    #: mean sequences of a step
    batch: float
    running: int
    waiting: int
    cache_used: float
    slots_used: int
    memory: int


@final
class Timeline:
    """Frames of one second for ten minutes, and of ten seconds for an hour."""

    def __init__(self) -> None:
        self._fine, self._coarse = _Ring(600), _Ring(360)
        self._gathered, self._parts, self._seconds = Work(), 0, 0.0

    def add(self, at: float, seconds: float, work: Work, gauges: Gauges) -> None:
        """Returns when what was done in the `seconds` before `at` is in; a coarse frame has the gauges of its end."""
        self._fine.add(_frame(at, seconds, work, gauges))
        self._gathered.merge(work)
        self._parts, self._seconds = self._parts + 1, self._seconds + seconds
        if self._parts == _COARSE:
            self._coarse.add(_frame(at, self._seconds, self._gathered, gauges))
            self._gathered, self._parts, self._seconds = Work(), 0, 0.0

    def since(self, moment: float = 0.0, *, coarse: bool = False) -> dict[str, list[Any]]:
        """The frames that ended later, oldest first, as one list for each of their fields."""
        return (self._coarse if coarse else self._fine).since(moment)


class _Ring:
    """The last frames, in memory that is taken once: what a server holds must not grow for its first hour."""

    def __init__(self, most: int) -> None:
        self._rows, self._count = np.full((most, len(fields(Frame))), np.nan), 0
        self._lock = threading.Lock()

    def add(self, frame: Frame) -> None:
        told = [getattr(frame, one.name) for one in fields(Frame)]
        with self._lock:
            self._rows[self._count % len(self._rows)] = [np.nan if value is None else value for value in told]
            self._count += 1

    def since(self, moment: float) -> dict[str, list[Any]]:
        with self._lock:
            rows = np.roll(self._rows, -self._count, axis=0)
        # a row without a frame is later than nothing
        columns = rows[rows[:, 0] > moment].T.tolist()
        return {one.name: _told(one.type, column) for one, column in zip(fields(Frame), columns, strict=True)}


def _told(kind: Any, column: list[float]) -> list[Any]:
    if kind == "int":
        return [int(value) for value in column]
    return [None if math.isnan(value) else value for value in column]


def _frame(at: float, seconds: float, work: Work, gauges: Gauges) -> Frame:
    def rate(count: int) -> float:
        return round(count / seconds, 3)

    def quantile(spread: Spread, share: float) -> float | None:
        found = spread.quantile(share)
        return None if found is None else float(f"{found:.3g}")

    return Frame(
        at=round(at, 3),
        requests=rate(work.requests),
        errors=rate(work.errors),
        refused=rate(work.refused),
        prompt_tokens=rate(work.prompt_tokens),
        generated_tokens=rate(work.generated_tokens),
        first_token_p50=quantile(work.first_token, 0.5),
        first_token_p95=quantile(work.first_token, 0.95),
        per_token_p50=quantile(work.per_token, 0.5),
        per_token_p95=quantile(work.per_token, 0.95),
        batch=round(work.sequences / work.steps, 2) if work.steps else 0.0,
        running=gauges.running,
        waiting=gauges.waiting,
        cache_used=round(gauges.cache_used, 4),
        slots_used=gauges.slots_used,
        memory=gauges.memory,
    )
