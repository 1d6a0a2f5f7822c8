"""Intervals that hold however often one looks: their shape, what they hold, and what is told."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.serve.experiments import sequential

ALPHA = 0.05


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.sampled_from([0.01, 0.05, 0.3]))
def test_an_interval_holds_its_value_and_shrinks_with_alpha(values, alpha):
    found, wider = sequential.mean(values, alpha), sequential.mean(values, alpha / 2)
    assert 0 <= wider.low <= found.low <= found.value + 1e-9
    assert found.value - 1e-9 <= found.high <= wider.high <= 1
    assert found.value == pytest.approx(float(np.mean(values)))
    # what is good for one is bad for the other
    turned = sequential.mean([1 - x for x in values], alpha)
    assert (turned.low, turned.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-6)


def test_betting_is_fair_exactly():
    """On average over all sequences of coins, what one has is 1, whatever the claim, if the claim is true."""
    for claim, length in ((0.5, 6), (0.2, 5), (0.9, 4)):
        total = 0.0
        for coins in itertools.product((0.0, 1.0), repeat=length):
            chance = math.prod(claim if coin else 1 - claim for coin in coins)
            total += chance * math.exp(sequential.log_wealth(np.array(coins), np.ones(length), claim))
        assert total == pytest.approx(1, abs=1e-12)


def test_the_ends_are_where_the_wealth_reaches_its_limit():
    values, counts = np.array([0.0, 0.25, 1.0]), np.array([40.0, 25.0, 35.0])
    found = sequential.weighted_mean(values, counts, ALPHA)
    limit = math.log(2 / ALPHA)
    assert sequential.log_wealth(values, counts, found.low) == pytest.approx(limit, abs=1e-6)
    assert sequential.log_wealth(1 - values, counts, 1 - found.high) == pytest.approx(limit, abs=1e-6)
    # counting is the same as listing, in any order
    listed = np.random.default_rng(0).permutation(np.repeat(values, counts.astype(int)))
    assert sequential.mean(listed, ALPHA) == found


def test_nothing_is_known_of_nothing():
    found = sequential.mean([], ALPHA)
    assert (found.low, found.high, found.n) == (0, 1, 0)
    assert math.isnan(found.value)
    assert sequential.p_value([], [1.0], (1, 1)) == 1
    empty = sequential.difference([1.0], [], (1, 1), ALPHA)
    assert (empty.low, empty.high) == (-1, 1)


def test_one_sided_numbers_give_ends_at_the_edge():
    ones = sequential.mean([1.0] * 50, ALPHA)
    assert ones.high == 1
    assert 0.85 < ones.low < 1
    zeros = sequential.mean([0.0] * 50, ALPHA)
    assert zeros.low == 0
    assert zeros.high == pytest.approx(1 - ones.low)


def test_differences_are_of_blocks_in_order_of_arrival():
    control, treatment = [1, 0, 1, 1, 0, 0, 1], [0.5, 1.0, 0.0]
    found = sequential.difference(control, treatment, (3, 1), ALPHA)
    assert found.n == 2
    assert found.value == pytest.approx(((0.5 - 2 / 3) + (1.0 - 1 / 3)) / 2)
    turned = sequential.difference(treatment, control, (1, 3), ALPHA)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-6)


def test_p_is_the_alpha_at_which_nought_leaves_the_interval():
    rng = np.random.default_rng(3)
    control, treatment = rng.random(400) < 0.4, rng.random(400) < 0.55
    p = sequential.p_value(control, treatment, (1, 1))
    assert 1e-6 < p < 0.05
    assert sequential.difference(control, treatment, (1, 1), p * 1.001).low > 0
    assert sequential.difference(control, treatment, (1, 1), p * 0.999).low < 0


@pytest.mark.parametrize(
    ("weights", "sizes"),
    [((1, 1), (1, 1)), ((9, 1), (9, 1)), ((1, 4), (1, 4)), ((3, 2), (2, 1)), ((0, 1), (1, 1))],
)
def test_blocks_have_the_shape_of_the_weights(weights, sizes):
    assert sequential.block_sizes(*weights) == sizes


def _ever_wrong(draw, truth: float, runs: int, steps: int, seed: int) -> float:
    """In how many runs the interval left out the truth at any of all steps."""
    rng, wrong = np.random.default_rng(seed), 0
    for _ in range(runs):
        x = draw(rng, steps)
        for values, claim in ((x, truth), (1 - x, 1 - truth)):
            paths = np.cumsum(np.log1p(sequential.FRACTIONS[:, None] * (values / claim - 1)), axis=1)
            wealth = np.exp(paths).mean(0)
            if wealth.max() >= 2 / ALPHA:
                wrong += 1
                break
    return wrong / runs


@pytest.mark.parametrize(
    ("name", "draw", "truth"),
    [
        ("coins", lambda rng, n: (rng.random(n) < 0.5).astype(float), 0.5),
        ("rare", lambda rng, n: (rng.random(n) < 0.02).astype(float), 0.02),
        ("skewed", lambda rng, n: rng.beta(0.3, 1.2, n), 0.2),
    ],
)
def test_looking_at_every_step_is_wrong_no_more_often_than_alpha(name, draw, truth):
    # 400 runs: with a chance of 0.05 more than 32 is a matter of 3 standard deviations
    assert _ever_wrong(draw, truth, 400, 1500, seed=11) <= 0.08


def test_a_true_difference_is_found_with_little_more_than_a_fixed_test_needs():
    """0.5 against 0.6 takes 388 users per arm where the number is fixed before and the power is 80 %."""
    rng, needed = np.random.default_rng(5), []
    for _ in range(30):
        control, treatment = rng.random(4000) < 0.5, rng.random(4000) < 0.6
        low, high = 1, 4000
        while low < high:
            middle = (low + high) // 2
            found = sequential.difference(control[:middle], treatment[:middle], (1, 1), ALPHA)
            low, high = (low, middle) if found.low > 0 else (middle + 1, high)
        needed.append(low)
    assert np.median(needed) < 2 * 388
    assert max(needed) < 4000
