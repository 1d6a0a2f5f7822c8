"""Telling two versions apart on the same items: intervals, tests, effect sizes, and how many items it takes.

Everything is paired: the difference of one item to the next, which both versions share, cancels out. `wins` and
`losses` count the items of 0/1 outcomes that only the one or only the other version gets right (discordant pairs).
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.evaluate.intervals import CONFIDENCE, Measure, t_cdf, t_quantile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

ALPHA, POWER = 0.05, 0.8
#: with so many differences or fewer, all 2^n sign flips are gone through
EXACT = 18
_DRAWS = 9_999
#: numbers drawn at a time
_PART = 1 << 22
_NORMAL = NormalDist()


def score_interval(wins: int, losses: int, n: int, confidence: float = CONFIDENCE) -> Measure:
    """The difference of two paired proportions, (wins − losses) / n, with Tango's score interval.

    The ends are those Δ at which (w − l − nΔ) / √(n (2q + Δ(1 − Δ))) is ±z, with q the most likely share of losses
    given Δ. Unlike a bootstrap it does not shrink to nothing where the versions disagree on few items or none.
    Source: T. Tango, Statistics in Medicine 17 (1998) 891.
    """
    z = _NORMAL.inv_cdf((1 + confidence) / 2)
    value = (wins - losses) / n
    low = -_score_end(losses, wins, n, z)
    return Measure(value, low, _score_end(wins, losses, n, z), n, "score")


def _score_end(wins: int, losses: int, n: int, z: float) -> float:
    """The upper end, by bisection: the statistic falls as Δ grows."""

    def beyond(delta: float) -> bool:
        b = (2 * n - wins + losses) * delta - wins - losses
        root = math.sqrt(max(0.0, b * b + 8 * n * losses * delta * (1 - delta)))
        share = max(0.0, (root - b) / (4 * n))
        spread = math.sqrt(max(0.0, n * (2 * share + delta * (1 - delta))))
        return wins - losses - n * delta < -z * spread

    low, high = (wins - losses) / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if beyond(middle) else (middle, high)
    return high


def paired_bootstrap(
    differences: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resamples: int = 2000,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    transform: Callable[[float], float] = float,
) -> Measure:
    """Σ differences / Σ weights (without weights: the mean) with a bootstrap interval over items.

    With summed losses as differences and tokens as weights this is the difference in nats per token, and with `exp` as
    the (rising) `transform` the ratio of the perplexities. The percentiles are taken further out than (1 ± confidence)
    / 2, so that few items do not give too narrow an interval.
    Source: T. Hesterberg, The American Statistician 69 (2015) 371, "expanded percentile".
    """
    d = np.asarray(differences, float)
    w = np.ones_like(d) if weights is None else np.asarray(weights, float)
    n, random = len(d), np.random.default_rng(seed)
    if n < 2:
        return Measure(transform(float(d.sum() / w.sum())), None, None, n, "bootstrap")
    parts = []
    step = max(1, _PART // n)
    for at in range(0, resamples, step):
        chosen = random.integers(0, n, (min(step, resamples - at), n))
        parts.append(d[chosen].sum(1) / w[chosen].sum(1))
    t = t_quantile((1 + confidence) / 2, n - 1) * math.sqrt(n / (n - 1))
    low, high = np.quantile(np.concatenate(parts), [_NORMAL.cdf(-t), _NORMAL.cdf(t)])
    return Measure(
        transform(float(d.sum() / w.sum())), transform(float(low)), transform(float(high)), n, "bootstrap"
    )


def mcnemar(wins: int, losses: int) -> float:
    """The p value of McNemar's exact test: two-sided, wins of wins + losses fair coin flips. 1 without any."""
    flips = wins + losses
    if wins == losses:
        return 1.0
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, flips + 1)))])
    few = np.arange(min(wins, losses) + 1)
    terms = logs[flips] - logs[few] - logs[flips - few] - flips * math.log(2)
    return min(1.0, 2 * float(np.exp(terms).sum()))


def permutation(differences: ArrayLike, *, draws: int = _DRAWS, seed: int = 0) -> float:
    """The p value of the paired permutation test: how often random signs give as large a sum, either way.

    With at most `EXACT` items that differ all signs are gone through, else `draws` of them are drawn.
    """
    d = np.asarray(differences, float)
    d = d[d != 0]
    if not len(d):
        return 1.0
    # sums of the same numbers in another order differ in the last digits
    least = abs(d.sum()) - 1e-9 * np.abs(d).sum()
    if len(d) <= EXACT:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        return float(np.mean(np.abs(sums) >= least))
    random, hits, step = np.random.default_rng(seed), 0, max(1, _PART // len(d))
    for at in range(0, draws, step):
        flips = random.integers(0, 2, (min(step, draws - at), len(d)), np.int8)
        hits += int(np.sum(np.abs(2 * (flips @ d) - d.sum()) >= least))
    return (hits + 1) / (draws + 1)


def paired_t(differences: ArrayLike) -> float | None:
    """The p value of the paired t-test, two-sided: mean over standard error against Student's t, n − 1 degrees.

    For a few runs that differ in their seed, where a sign-flip test could never reject: it takes their differences as
    normally distributed. 1 where all are 0; None where there are fewer than two, or all are the same and not 0, which
    leaves no spread to judge by.
    """
    d = np.asarray(differences, float)
    if len(d) < 2:
        return None
    if not d.any():
        return 1.0
    error = float(d.std(ddof=1)) / math.sqrt(len(d))
    # equal differences have a spread of rounding errors
    if error <= 1e-9 * float(np.abs(d).max()):
        return None
    return 2 * t_cdf(-abs(float(d.mean())) / error, len(d) - 1)


def cohens_h(share: float, other: float) -> float:
    """2 asin √share − 2 asin √other: a difference of proportions on a scale where 0.2 is small anywhere."""
    return 2 * math.asin(math.sqrt(share)) - 2 * math.asin(math.sqrt(other))


def cohens_d(differences: ArrayLike) -> float | None:
    """Mean over standard deviation of paired differences (d_z); None where they are all the same."""
    d = np.asarray(differences, float)
    spread = float(d.std(ddof=1)) if len(d) > 1 else 0.0
    return float(d.mean()) / spread if spread > 0 else None


def odds(wins: int, losses: int) -> float | None:
    """The odds ratio of the discordant pairs, wins / losses: infinite without losses, None without either."""
    if not losses:
        return math.inf if wins else None
    return wins / losses


def items_needed(
    difference: float, spread: float, *, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Items at which `difference`, with this standard deviation over items, is told from 0 with this power.

    n = (z_{1−α/2} + z_power)² (spread / difference)² + z²_{1−α/2} / 2; None where the difference is 0.
    Source of the last term: W. Guenther, The American Statistician 35 (1981) 243.
    """
    if not difference:
        return None
    z, more = _quantiles(alpha, power)
    return math.ceil(((z + more) * spread / difference) ** 2 + z * z / 2)


def detectable(n: int, spread: float, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest difference that n items tell from 0: `items_needed` solved for it; inf where n is too small."""
    z, more = _quantiles(alpha, power)
    rest = n - z * z / 2
    return (z + more) * spread / math.sqrt(rest) if rest > 0 else math.inf


def items_needed_paired(
    difference: float, discordance: float, *, alpha: float = ALPHA, power: float = POWER
) -> int | None:
    """Items at which McNemar's exact test tells this difference of shares from 0; None where it is 0.

    With d the difference and p the share of discordant pairs, at least |d|: n = (z_{1−α/2} √p + z_power √(p − d²))² /
    d², and the correction for whole counts n/4 (1 + √(1 + 4 / (n |d|)))².
    Source: R. Connor, Biometrics 43 (1987) 207.
    """
    if not difference:
        return None
    return math.ceil(_connor(abs(difference), discordance, alpha, power))


def detectable_paired(n: int, discordance: float, *, alpha: float = ALPHA, power: float = POWER) -> float:
    """The smallest difference of shares that n items tell from 0: `items_needed_paired` solved for it.

    inf where even a version that is right wherever the other is wrong could not be told apart.
    """
    if _connor(1.0, discordance, alpha, power) > n:
        return math.inf
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _connor(middle, discordance, alpha, power) > n else (low, middle)
    return high


def _connor(difference: float, discordance: float, alpha: float, power: float) -> float:
    z, more = _quantiles(alpha, power)
    share = max(discordance, difference)
    n = (z * math.sqrt(share) + more * math.sqrt(share - difference**2)) ** 2 / difference**2
    return n / 4 * (1 + math.sqrt(1 + 4 / (n * difference))) ** 2


def _quantiles(alpha: float, power: float) -> tuple[float, float]:
    return _NORMAL.inv_cdf(1 - alpha / 2), _NORMAL.inv_cdf(power)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several tests, made larger so that one error in all of them has the chance of one in one.

    The k-th smallest of m times m − k + 1, never below one before it. Source: S. Holm, Scand. J. Statist. 6 (1979) 65.
    """
    m, result, last = len(p_values), [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(m), key=p_values.__getitem__)):
        last = max(last, min(1.0, (m - rank) * p_values[index]))
        result[index] = last
    return result


def spread(values: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The standard deviation over items of Σ values / Σ weights, √n times its standard error.

    For a ratio of sums it is that of (value − ratio · weight) / mean weight (the delta method).
    """
    d: NDArray[Any] = np.asarray(values, float)
    w = np.ones_like(d) if weights is None else np.asarray(weights, float)
    rest = (d - d.sum() / w.sum() * w) / w.mean()
    return float(math.sqrt((rest @ rest) / (len(d) - 1))) if len(d) > 1 else 0.0
