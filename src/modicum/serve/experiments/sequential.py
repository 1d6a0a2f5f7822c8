"""Means of bounded numbers, with intervals that hold however often one looks; see docs/understand/sequential-tests.md.

Against the claim that the mean is m one bets: a fraction f of what one has on numbers above m. After x it is
multiplied by 1 + f (x / m − 1), which is 1 on average if the claim is true, so that by Ville's inequality it ever
reaches 1 / α with a chance of at most α. All m against which it did not are the interval. What one has is the mean over
fixed fractions, so that no variance has to be known, and it depends only on which numbers came, not in which order.
Sources: I. Waudby-Smith, A. Ramdas, "Estimating means of bounded random variables by betting", J. R. Statist. Soc. B
86 (2024) 1; H. Robbins, Ann. Math. Statist. 41 (1970) 1397, on mixtures; J. Ville, Étude critique de la notion de
collectif (1939).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from modicum.evaluate.intervals import Measure

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

#: fractions that are bet; small ones tell small differences, which takes many numbers
FRACTIONS = np.geomspace(0.002, 0.98, 24)
_METHOD = "betting"
#: the interval's ends are found up to 2^-this
_HALVINGS = 30


def mean(values: ArrayLike, alpha: float) -> Measure:
    """The mean of numbers in 0 … 1 with an interval that holds it at all times together, with chance 1 − α."""
    kept, counts = np.unique(np.asarray(values, float), return_counts=True)
    return weighted_mean(kept, counts, alpha)


def weighted_mean(values: ArrayLike, counts: ArrayLike, alpha: float) -> Measure:
    """The same of `values` that came so often as `counts` says."""
    x, n = np.asarray(values, float), np.asarray(counts, float)
    total = int(n.sum())
    if not total:
        return Measure(math.nan, 0.0, 1.0, 0, _METHOD)
    center = float(x @ n) / total
    high = 1 - _lowest(1 - x, n, 1 - center, alpha / 2)
    return Measure(center, _lowest(x, n, center, alpha / 2), high, total, _METHOD)


def difference(control: ArrayLike, treatment: ArrayLike, sizes: tuple[int, int], alpha: float) -> Measure:
    """The mean of the treatment's numbers in 0 … 1 less the control's, with an interval as in `mean`.

    In order of arrival each `sizes[0]` numbers of the control and `sizes[1]` of the treatment make one difference of
    means; `n` counts these. What both share, such as the time of day, cancels out.
    """
    d, n = np.unique(_differences(control, treatment, sizes), return_counts=True)
    found = weighted_mean((1 + d) / 2, n, alpha)
    assert found.low is not None
    assert found.high is not None
    return Measure(2 * found.value - 1, 2 * found.low - 1, 2 * found.high - 1, found.n, _METHOD)


def p_value(control: ArrayLike, treatment: ArrayLike, sizes: tuple[int, int]) -> float:
    """The least α at which the interval of `difference` leaves out 0; stays valid if one stops because of it."""
    d, n = np.unique(_differences(control, treatment, sizes), return_counts=True)
    if not len(d):
        return 1.0
    best = max(log_wealth((1 + sign * d) / 2, n.astype(float), 0.5) for sign in (1, -1))
    return min(1.0, 2 * math.exp(-max(0.0, best)))


def block_sizes(control: float, treatment: float) -> tuple[int, int]:
    """How many of the control's and of the treatment's numbers make one difference, for arms of these weights."""
    if control <= 0 or treatment <= 0:
        return 1, 1
    return (
        (max(1, round(control / treatment)), 1) if control >= treatment else (1, round(treatment / control))
    )


def log_wealth(values: NDArray[np.float64], counts: NDArray[np.float64], claim: float) -> float:
    """The logarithm of what betting on numbers above `claim` (0 < claim < 1) has made of 1."""
    logs = np.log1p(FRACTIONS[:, None] * (values / claim - 1)) @ counts
    top = float(logs.max())
    return top + math.log(float(np.exp(logs - top).mean()))


def _lowest(values: NDArray[np.float64], counts: NDArray[np.float64], center: float, alpha: float) -> float:
    """The lower end: wealth falls as the claim grows, and is at most 1 at the mean of the numbers."""
    low, high = 0.0, center
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if middle <= 0:
            break
        if log_wealth(values, counts, middle) >= -math.log(alpha):
            low = middle
        else:
            high = middle
    return low


def _differences(control: ArrayLike, treatment: ArrayLike, sizes: tuple[int, int]) -> NDArray[np.float64]:
    of_control, of_treatment = (
        x[: len(x) // size * size].reshape(-1, size).mean(1)
        for x, size in ((np.asarray(control, float), sizes[0]), (np.asarray(treatment, float), sizes[1]))
    )
    pairs = min(len(of_control), len(of_treatment))
    return np.round(of_treatment[:pairs] - of_control[:pairs], 12)
