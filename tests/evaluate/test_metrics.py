"""Metrics against known values and scikit-learn / SciPy; intervals against theirs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from modicum.evaluate import intervals, metrics

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("n", [5, 200])
def test_classification_equals_scikit_learn(classes, n):
    predicted, labels = RANDOM.integers(0, classes, (2, n))
    average = "binary" if classes == 2 else "macro"
    names = None if classes == 2 else range(classes)
    expected = sk.f1_score(labels, predicted, average=average, labels=names, zero_division=0)
    assert metrics.f1(predicted, labels, classes) == pytest.approx(expected)
    assert metrics.accuracy(predicted, labels) == sk.accuracy_score(labels, predicted)
    assert metrics.matthews(predicted, labels) == pytest.approx(sk.matthews_corrcoef(labels, predicted))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=40))
def test_correlations_equal_scipy(pairs):
    x, y = np.array(pairs, float).T
    if len(set(x)) > 1 and len(set(y)) > 1:
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-9)
    else:
        assert metrics.pearson(x, y) == metrics.spearman(x, y) == 0.0


def test_known_values():
    assert metrics.perplexity(np.log(5)) == pytest.approx(5)
    assert metrics.perplexity(1e4) == np.inf
    assert metrics.matthews(np.ones(4), np.array([0, 1, 0, 1])) == 0.0
    found = metrics.language(np.array([[2.0, 1, 1], [4.0, 3, 0]]))
    assert found == {"loss": 1.5, "perplexity": pytest.approx(np.exp(1.5)), "token_accuracy": 0.25}
    logits = np.array([[1000.0, 0.0], [0.0, 0.0]])
    assert metrics.cross_entropies(logits, [0, 1]) == pytest.approx([0.0, np.log(2)])


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 20), (7, 20), (20, 20), (450, 1000)])
def test_wilson_equals_scipy(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    found = intervals.wilson(hits, n)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
def test_t_quantiles_equal_scipy(probability, freedom):
    assert intervals.t_quantile(probability, freedom) == pytest.approx(
        stats.t.ppf(probability, freedom), rel=1e-9
    )


def test_intervals_over_seeds():
    found = intervals.over_seeds([1.0, 2.0, 4.0])
    expected = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (found.low, found.high) == pytest.approx(expected)
    single = intervals.over_seeds([3.0])
    assert (single.value, single.low, single.high, single.n) == (3.0, None, None, 1)


def test_bootstrap_covers_the_mean_and_pairs_stay_paired():
    covered = 0
    for seed in range(100):
        sample = np.random.default_rng(seed).normal(1.0, 2.0, 60)
        found = intervals.bootstrap(sample, np.mean, resamples=300, seed=seed)
        covered += found.low <= 1.0 <= found.high
    assert 86 <= covered <= 100
    x = np.arange(30.0)
    tied = intervals.bootstrap((x, 2 * x), metrics.pearson, resamples=50)
    assert (tied.low, tied.high) == pytest.approx((1.0, 1.0))
