"""Paired statistics against SciPy and closed forms; coverage, false positives and power by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from modicum.evaluate import statistics as paired

COUNTS = st.integers(0, 60)


def within(hits: int, n: int, share: float) -> bool:
    """Whether so many hits are no surprise at this share: the chance of fewer or more is above 1 in 10,000."""
    return min(stats.binom.cdf(hits, n, share), stats.binom.sf(hits - 1, n, share)) > 1e-4


@settings(max_examples=60, deadline=None)
@given(COUNTS, COUNTS)
def test_mcnemar_equals_scipy(wins, losses):
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert paired.mcnemar(wins, losses) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_with_many_pairs():
    expected = stats.binomtest(50_000, 99_000).pvalue
    assert paired.mcnemar(50_000, 49_000) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [2, 7, 11])
def test_all_permutations_equal_scipy(n):
    random = np.random.default_rng(n)
    a, b = random.normal(0.5, 1, n).round(1), random.normal(0, 1, n).round(1)
    expected = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True
    ).pvalue
    assert paired.permutation(a - b) == pytest.approx(expected)


def test_drawn_permutations_come_near_all_of_them(monkeypatch):
    d = np.random.default_rng(3).normal(0.4, 1, 16)
    exact = paired.permutation(d)
    monkeypatch.setattr(paired, "EXACT", 0)
    monkeypatch.setattr(paired, "_PART", 5_000)  # in several parts
    drawn = paired.permutation(d)
    assert 0.01 < exact < 0.9
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9_999) + 1e-4)
    assert paired.permutation(d, seed=1) == pytest.approx(drawn, abs=0.05)
    assert paired.permutation(d) == drawn


def test_permutations_of_what_does_not_differ():
    assert paired.permutation([]) == paired.permutation([0.0, 0.0]) == 1.0
    # one item cannot show anything, and zeros add no evidence
    assert paired.permutation([5.0, 0.0, 0.0]) == 1.0
    assert paired.permutation([1.0] * 6 + [0.0] * 40) == 2 / 2**6


def test_bootstrap_equals_scipy_for_many_items():
    random = np.random.default_rng(0)
    d, w = random.normal(0.2, 1, 2_000), random.integers(1, 9, 2_000).astype(float)
    ours = paired.paired_bootstrap(d, w, resamples=4_000)
    theirs = stats.bootstrap(
        (d, w),
        lambda x, y, axis: x.sum(axis) / y.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(d.sum() / w.sum())
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_the_percentiles_are_further_out_for_few_items():
    d = np.random.default_rng(0).normal(0, 1, 6)
    means = d[np.random.default_rng(5).integers(0, 6, (2_000, 6))].mean(1)
    t = stats.t.ppf(0.975, 5) * math.sqrt(6 / 5)
    expected = np.quantile(means, stats.norm.cdf([-t, t]))
    found = paired.paired_bootstrap(d, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_a_rising_transform_is_of_the_ends_too():
    d = np.random.default_rng(0).normal(0.1, 1, 40)
    plain, risen = paired.paired_bootstrap(d), paired.paired_bootstrap(d, transform=math.exp)
    assert [risen.value, risen.low, risen.high] == [math.exp(x) for x in (plain.value, plain.low, plain.high)]
    assert paired.paired_bootstrap([0.3]).low is None


@pytest.mark.parametrize("n", [12, 60])
def test_coverage_of_the_bootstrap(n):
    """The means of 400 samples, and the ratios of another 400, lie in their intervals as often as is claimed."""
    random = np.random.default_rng(n)
    mean = ratio = 0
    for seed in range(400):
        found = paired.paired_bootstrap(random.normal(0.3, 1, n), resamples=500, seed=seed)
        mean += found.low <= 0.3 <= found.high
        tokens = random.integers(5, 30, n).astype(float)
        losses = 0.1 * tokens + random.normal(0, 1, n) * np.sqrt(tokens)
        found = paired.paired_bootstrap(losses, tokens, resamples=500, seed=seed)
        ratio += found.low <= 0.1 <= found.high
    assert within(mean, 400, 0.95), mean
    assert within(ratio, 400, 0.95), ratio


@pytest.mark.parametrize(
    ("more", "less", "n"),
    [(0.1, 0.1, 50), (0.2, 0.1, 100), (0.3, 0.02, 30), (0.02, 0.01, 200), (0.4, 0.5, 40)],
)
def test_coverage_of_the_score_interval(more, less, n):
    random = np.random.default_rng(n)
    hits = 0
    for wins, losses, _ in random.multinomial(n, [more, less, 1 - more - less], 1_000):
        found = paired.score_interval(int(wins), int(losses), n)
        hits += found.low <= more - less <= found.high
    # counts are whole, so the share is near 95 % and not on it
    assert 0.925 <= hits / 1_000 <= 0.985


@settings(max_examples=60, deadline=None)
@given(COUNTS, COUNTS, st.integers(1, 50))
def test_the_ends_of_the_score_interval_solve_its_equation(wins, losses, both):
    n = wins + losses + both
    found = paired.score_interval(wins, losses, n)
    assert -1 <= found.low <= found.value <= found.high <= 1
    mirrored = paired.score_interval(losses, wins, n)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=1e-9)
    for delta, z in ((found.low, 1.959964), (found.high, -1.959964)):
        # the likelihood of q losses and q + delta wins, on a fine grid
        q = np.linspace(max(0, -delta), (1 - delta) / 2, 20_001)[1:-1]
        likelihood = losses * np.log(q) + wins * np.log(q + delta) + both * np.log(1 - 2 * q - delta)
        best = q[likelihood.argmax()]
        spread = math.sqrt(n * (2 * best + delta * (1 - delta)))
        assert wins - losses - n * delta == pytest.approx(z * spread, abs=0.02 * spread)


def test_no_disagreement_is_no_certainty():
    found = paired.score_interval(0, 0, 200)
    z = stats.norm.ppf(0.975)
    assert found.high == pytest.approx(z * z / (200 + z * z))
    assert found.low == -found.high


def test_false_positives():
    """Versions that are equally good are told apart in at most 5 % of 400 samples."""
    random = np.random.default_rng(0)
    exact = sum(
        paired.mcnemar(*map(int, found[:2])) <= 0.05
        for found in random.multinomial(150, [0.15, 0.15, 0.7], 400)
    )
    flipped = sum(paired.permutation(random.standard_t(4, 14)) <= 0.05 for _ in range(400))
    drawn = sum(
        paired.permutation(random.laplace(0, 1, 40), draws=499, seed=seed) <= 0.05 for seed in range(400)
    )
    assert stats.binom.sf(exact - 1, 400, 0.05) > 1e-4
    assert exact > 0
    assert within(flipped, 400, 0.05), flipped
    assert within(drawn, 400, 0.05), drawn


def power_of_mcnemar(n, difference, discordance):
    """The chance of p ≤ 0.05, summed over all numbers of discordant pairs."""
    pairs = np.arange(n + 1)
    # the most wins (or losses) of so many pairs that are few enough; -1 where none are
    few = stats.binom.ppf(0.025, pairs, 0.5)
    few -= stats.binom.cdf(few, pairs, 0.5) > 0.025
    share = (1 + difference / discordance) / 2
    shown = stats.binom.cdf(few, pairs, share) + stats.binom.sf(pairs - few - 1, pairs, share)
    return float(stats.binom.pmf(pairs, n, discordance) @ shown)


@pytest.mark.parametrize(("difference", "discordance"), [(0.05, 0.15), (0.02, 0.1), (0.1, 0.3), (0.2, 0.5)])
def test_power_of_the_paired_shares(difference, discordance):
    n = paired.items_needed_paired(difference, discordance)
    assert n == paired.items_needed_paired(-difference, discordance)
    assert 0.795 < power_of_mcnemar(n, difference, discordance) < 0.815
    assert paired.detectable_paired(n, discordance) == pytest.approx(difference, rel=0.01)
    random = np.random.default_rng(n)
    found = random.multinomial(
        n, [(discordance + s * difference) / 2 for s in (1, -1)] + [1 - discordance], 400
    )
    shown = sum(paired.mcnemar(int(wins), int(losses)) <= 0.05 for wins, losses, _ in found)
    assert within(shown, 400, 0.8), shown


def test_power_of_means():
    n = paired.items_needed(0.3, 1.0)
    random = np.random.default_rng(0)
    shown = sum(
        paired.permutation(random.normal(0.3, 1, n), draws=499, seed=seed) <= 0.05 for seed in range(400)
    )
    assert within(shown, 400, 0.8), shown
    assert paired.detectable(n, 1.0) == pytest.approx(0.3, rel=0.01)
    assert paired.items_needed(0.3, 1.0, power=0.9) > n
    assert paired.items_needed(0.3, 1.0, alpha=0.01) > n


def test_what_no_number_of_items_shows():
    assert paired.items_needed(0.0, 1.0) is None
    assert paired.items_needed_paired(0.0, 0.3) is None
    assert paired.detectable(1, 1.0) == paired.detectable_paired(3, 0.2) == math.inf
    # without a discordant pair, differences of a few items could still have shown
    assert 6 / 200 < paired.detectable_paired(200, 0.0) < 16 / 200


def test_effect_sizes():
    assert paired.cohens_h(0.5, 0.5) == 0
    assert paired.cohens_h(1.0, 0.0) == pytest.approx(math.pi)
    assert paired.cohens_h(0.6, 0.5) == pytest.approx(0.2014, abs=1e-4)
    assert paired.cohens_d([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert paired.cohens_d([1.0, 1.0]) is None
    assert (paired.odds(6, 3), paired.odds(1, 0), paired.odds(0, 0)) == (2.0, math.inf, None)


def test_holm():
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.6, 0.5]) == [1.0, 1.0]
    assert paired.holm([0.02]) == [0.02]
    assert paired.holm([]) == []


def test_spread_is_the_standard_error_times_the_root_of_n():
    random = np.random.default_rng(0)
    d = random.normal(0, 2, 300)
    assert paired.spread(d) == pytest.approx(d.std(ddof=1))
    tokens = random.integers(5, 30, 300).astype(float)
    losses = 0.1 * tokens + random.normal(0, 1, 300)
    chosen = random.integers(0, 300, (4_000, 300))
    drawn = (losses[chosen].sum(1) / tokens[chosen].sum(1)).std()
    assert paired.spread(losses, tokens) == pytest.approx(drawn * math.sqrt(300), rel=0.06)
