"""Confidence intervals: Wilson for proportions, bootstrap for anything, Student's t over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measure:
    """A value with its interval: `method` says which kind, `n` over how many rows, tokens or seeds."""

    value: float
    low: float | None
    high: float | None
    n: int
    method: str

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4f} (n = {self.n})"
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}] (n = {self.n})"


def wilson(hits: float, n: int, confidence: float = CONFIDENCE) -> Measure:
    """The share hits / n with the Wilson score interval, which stays within 0..1 and works for few rows."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = hits / n
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Measure(share, max(0.0, center - half), min(1.0, center + half), n, "wilson")


def bootstrap(
    rows: Any,
    statistic: Callable[..., float],
    *,
    resamples: int = 1000,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Measure:
    """`statistic` of `rows` with a percentile interval over resampled rows.

    `rows` is an array, or a tuple of arrays that are resampled together and passed one by one.
    """
    columns = tuple(np.asarray(part) for part in (rows if isinstance(rows, tuple) else (rows,)))
    n = len(columns[0])
    random = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        chosen = random.integers(0, n, n)
        draws.append(statistic(*(column[chosen] for column in columns)))
    edges = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(np.asarray(draws), edges)
    return Measure(float(statistic(*columns)), float(low), float(high), n, "bootstrap")


def over_seeds(values: Sequence[float], confidence: float = CONFIDENCE) -> Measure:
    """Mean over runs that differ in their seed, with Student's t interval; no interval for a single run."""
    n, mean = len(values), fmean(values)
    # a run that diverged has no number
    if n < 2 or not math.isfinite(mean):
        return Measure(mean, None, None, n, "t")
    half = t_quantile((1 + confidence) / 2, n - 1) * stdev(values) / math.sqrt(n)
    return Measure(mean, mean - half, mean + half, n, "t")


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t distribution with `freedom` degrees of freedom (probability ≥ 0.5)."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, freedom: int) -> float:
    """The chance that Student's t with `freedom` degrees of freedom is at most `t`."""
    # the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4, exact for whole degrees of freedom
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle) ** 2
    if freedom % 2:
        total, term = 0.0, math.cos(angle)
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine * (k + 1) / (k + 2)
        inner = 2 / math.pi * (angle + math.sin(angle) * total)
    else:
        total, term = 0.0, 1.0
        for k in range(0, freedom, 2):
            total += term
            term *= cosine * (k + 1) / (k + 2)
        inner = math.sin(angle) * total
    return (1 + inner) / 2
