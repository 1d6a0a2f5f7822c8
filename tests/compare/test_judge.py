"""Which cells are best, which significantly worse, which nothing beats."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from modicum.compare.judge import judge, measure, pareto
from modicum.evaluate.statistics import paired_t


def cell(values, state="done", **extra):
    return {"state": state, "metrics": {"loss": measure(values, 0.95)} if values else {}, **extra}


def test_the_paired_t_test_is_that_of_scipy():
    random = np.random.default_rng(0)
    for n in (2, 3, 5, 9):
        first, second = random.normal(size=(2, n))
        assert paired_t(first - second) == pytest.approx(stats.ttest_rel(first, second).pvalue)
    assert paired_t([0.0, 0.0, 0.0]) == 1.0
    assert paired_t([0.3]) is None
    # the same difference with every seed: no spread to judge by, whatever rounding leaves
    assert paired_t([0.1 + 0.2, 0.3, 0.3]) is None


def test_a_measure_has_the_interval_of_student_and_keeps_what_diverged():
    values = [0.5, 0.7, 0.9]
    found = measure(values, 0.9)
    low, high = stats.t.interval(0.9, 2, loc=0.7, scale=stats.sem(values))
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["values"] == values
    broken = measure([1.0, math.nan, None], 0.95)
    assert broken["value"] is broken["low"] is None
    assert broken["values"] == [1.0, None, None]
    assert broken["n"] == 3


def test_cells_are_tested_seed_by_seed_and_corrected_for_their_number():
    shift = np.array([0.0, 1.0, -1.0, 2.0])  # seeds differ far more than cells do
    noise = np.array([0.01, -0.01, 0.0, 0.005])
    best, worse, same = list(shift), list(shift + 0.1 + noise), list(shift + 5 * noise)
    cells = judge(
        [cell(worse), cell(best), cell(same), cell([], "failed"), cell([1.0, None, 1.0, 1.0])],
        "loss",
        larger=False,
        confidence=0.95,
    )
    p = [stats.ttest_rel(values, best).pvalue for values in (worse, same)]
    ordered = sorted(p)
    holm = {ordered[0]: 2 * ordered[0], ordered[1]: max(2 * ordered[0], ordered[1])}
    assert [cells[0]["p_value"], cells[2]["p_value"]] == pytest.approx([holm[value] for value in p])
    verdicts = [one["significantly_worse_than_best"] for one in cells]
    assert verdicts == [True, False, False, None, None]
    assert cells[0]["difference"]["value"] == pytest.approx(0.1 + noise.mean())
    # the other way round the worst is the best
    turned = judge(cells[:3], "loss", larger=True, confidence=0.95)
    assert turned[0]["p_value"] is None
    assert turned[1]["significantly_worse_than_best"]


def test_two_seeds_decide_nothing():
    found = judge([cell([1.0, 2.0]), cell([1.1, 2.10001])], "loss", larger=False, confidence=0.95)
    assert [one["significantly_worse_than_best"] for one in found] == [None, None]
    assert found[1]["difference"]["n"] == 2


def test_the_front_holds_what_nothing_beats():
    cells = [
        cell([3.0], trained_values=10, stored_bytes=5),
        cell([2.0], trained_values=20, stored_bytes=5),
        cell([2.0], trained_values=30, stored_bytes=9),
        cell([1.0], trained_values=40, stored_bytes=9),
        cell([1.0], trained_values=40, stored_bytes=9),
        cell([], "missing"),
    ]
    assert pareto(cells, "loss", larger=False) == {"trained_values": [0, 1, 3, 4], "stored_bytes": [1, 3, 4]}
    assert pareto(cells, "loss", larger=True) == {"trained_values": [0], "stored_bytes": [0]}
