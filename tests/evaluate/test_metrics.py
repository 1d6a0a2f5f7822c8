"""Metrics against known values and scikit-learn / SciPy; intervals against theirs."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import special, stats
from sklearn import exceptions as sk_exceptions
from sklearn import metrics as sk
from tests.evaluate.test_statistics import within

from modicum.evaluate import intervals, metrics

FEW = {"max_examples": 60, "deadline": None}
PAIRS = st.integers(2, 4).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        st.lists(st.tuples(*2 * [st.integers(0, classes - 1)]), min_size=1, max_size=30),
    )
)
NUMBERS = st.floats(-1e6, 1e6).map(lambda x: round(x, 3)) | st.sampled_from([0.1, -3.0, 1e-9, 1e12])


@settings(**FEW)
@given(PAIRS)
@example((2, [(0, 0)]))
@example((2, [(1, 0), (1, 1)]))
@example((3, [(0, 0), (2, 2)]))
def test_classification_equals_scikit_learn(drawn):
    classes, pairs = drawn
    predicted, labels = np.array(pairs).T
    average = "binary" if classes == 2 else "macro"
    names = None if classes == 2 else range(classes)
    expected = sk.f1_score(labels, predicted, average=average, labels=names, zero_division=0)
    assert metrics.f1(predicted, labels, classes) == pytest.approx(expected)
    assert metrics.accuracy(predicted, labels) == pytest.approx(sk.accuracy_score(labels, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sk_exceptions.UndefinedMetricWarning)
        warnings.filterwarnings("ignore", "A single label was found")
        expected = sk.matthews_corrcoef(labels, predicted)
    assert metrics.matthews(predicted, labels) == pytest.approx(expected, abs=1e-12)


@settings(**FEW)
@given(PAIRS, st.integers(0, 1000))
def test_classification_from_logits_equals_scikit_learn(drawn, seed):
    classes, pairs = drawn
    labels = np.array(pairs)[:, 1]
    logits = np.random.default_rng(seed).normal(0, 5, (len(labels), classes))
    found = metrics.classification(logits, labels)
    chances = special.softmax(logits, axis=1)
    assert found["loss"] == pytest.approx(sk.log_loss(labels, chances, labels=range(classes)))
    each = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    assert metrics.cross_entropies(logits, labels) == pytest.approx(each.numpy())
    predicted = logits.argmax(1)
    assert found["accuracy"] == sk.accuracy_score(labels, predicted)
    assert found["f1"] == metrics.f1(predicted, labels, classes)
    assert found["matthews"] == metrics.matthews(predicted, labels)


@settings(**FEW)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=2, max_size=40))
@example([(0.1, 1.0), (0.1, 2.0), (0.1, 4.0)])
@example([(1e200, 1.0), (-1e200, 2.0), (3e200, 5.0)])
@example([(1e-200, 1.0), (-1e-200, 2.0), (3e-200, 5.0)])
def test_regression_equals_scipy_and_scikit_learn(pairs):
    x, y = np.array(pairs).T
    assert metrics.ranks(x) == pytest.approx(stats.rankdata(x))
    if len(set(x)) > 1 and len(set(y)) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.NearConstantInputWarning)
            expected = stats.pearsonr(x, y)[0]
        # where nothing but rounding varies there is no correlation to agree on
        if min(np.ptp(x) / np.abs(x).max(), np.ptp(y) / np.abs(y).max()) > 1e-9:
            assert metrics.pearson(x, y) == pytest.approx(expected, abs=1e-6)
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-9)
    else:
        assert metrics.pearson(x, y) == metrics.spearman(x, y) == 0.0
    if np.abs([x, y]).max() < 1e100:
        found = metrics.regression(x, y)
        assert found["mse"] == found["loss"] == pytest.approx(sk.mean_squared_error(y, x))
        assert (found["pearson"], found["spearman"]) == (metrics.pearson(x, y), metrics.spearman(x, y))


def test_known_values():
    assert metrics.perplexity(np.log(5)) == pytest.approx(5)
    assert metrics.perplexity(1e4) == np.inf
    assert metrics.pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == 1.0
    assert np.isnan(metrics.language(np.zeros((1, 3)))["loss"])
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


def test_coverage_of_the_bootstrap_of_metrics():
    """The true F1, Matthews and linear correlation of 400 samples lie in their intervals as often as is claimed."""
    # a share of 0.4 is of class 1; 0.8 of these are found, and 0.9 of the others left alone
    hit, missed, false, left = 0.4 * 0.8, 0.4 * 0.2, 0.6 * 0.1, 0.6 * 0.9
    f1 = 2 * hit / (2 * hit + missed + false)
    matthews = (hit * left - missed * false) / math.sqrt(
        (hit + missed) * (hit + false) * (left + missed) * (left + false)
    )
    random = np.random.default_rng(0)
    covered = np.zeros(3, int)
    for seed in range(400):
        labels = random.random(200) < 0.4
        predicted = np.where(labels, random.random(200) < 0.8, random.random(200) < 0.1)
        x = random.normal(size=200)
        y = 0.6 * x + 0.8 * random.normal(size=200)
        for place, (rows, statistic, true) in enumerate((
            ((predicted.astype(int), labels.astype(int)), metrics.f1, f1),
            ((predicted.astype(int), labels.astype(int)), metrics.matthews, matthews),
            ((x, y), metrics.pearson, 0.6),
        )):  # fmt: skip
            found = intervals.bootstrap(rows, statistic, resamples=200, seed=seed)
            covered[place] += found.low <= true <= found.high
    for count in covered:
        assert within(int(count), 400, 0.95), covered


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
