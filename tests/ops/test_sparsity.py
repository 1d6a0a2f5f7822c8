"""Masks: exact counts, the right weights, ties in order, and Wanda's scores against their formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modicum.errors import ConfigError
from modicum.ops import sparsity
from modicum.ops.sparsity import InputNorms, count, magnitude_scores, mask, mask_n_m, wanda_scores


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lowest(scores, gone):
    """The mask (n,) without the `gone` lowest of a NumPy vector, equal ones from the left."""
    keep = np.ones(len(scores), dtype=bool)
    keep[np.argsort(scores, kind="stable")[:gone]] = False
    return keep


@pytest.fixture(params=[1 << 20, 64], ids=["whole", "panels"])
def panels(request, monkeypatch):
    monkeypatch.setattr(sparsity, "_PANEL", request.param)


def test_wanda_is_its_formula():
    weight, batches = drawn(5, 12), [drawn(3, 7, 12, seed=1), drawn(4, 12, seed=2)]
    inputs = InputNorms(12)
    for x in batches:
        inputs.add(x)
    rows = np.concatenate([x.reshape(-1, 12).double().numpy() for x in batches])
    norms = np.sqrt((rows**2).sum(0))
    assert inputs.rows == 25
    assert inputs.norms().dtype == torch.float32
    np.testing.assert_allclose(inputs.norms().numpy(), norms, rtol=1e-6)
    scores = wanda_scores(weight, inputs.norms())
    np.testing.assert_allclose(scores.numpy(), np.abs(weight.numpy()) * norms, rtol=1e-6)
    want = np.stack([lowest(row, 6) for row in scores.numpy()])
    assert np.array_equal(mask(scores, 0.5).numpy(), want)
    # magnitude alone would choose others
    assert not torch.equal(mask(scores, 0.5), mask(magnitude_scores(weight), 0.5))


def test_norms_lose_no_small_inputs():
    """A sum in float32 would stop to grow at 2^24 times its addends."""
    inputs = InputNorms(1)
    inputs.add(torch.full((1, 1), 4096.0))
    for _ in range(4):
        inputs.add(torch.ones(1, 1))
    assert float(inputs._sum) == 4096.0**2 + 4
    assert InputNorms(3).norms().tolist() == [0, 0, 0]


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("distinct", [False, True])
def test_the_lowest_go_and_their_count_is_exact(kind, ratio, distinct):
    weight = drawn(9, 100) if distinct else drawn(9, 100).mul(2).round()
    scores = magnitude_scores(weight.to(kind))
    gone = math.floor(100 * ratio + 1e-9)
    rows = mask(scores, ratio)
    assert rows.dtype == torch.bool
    assert np.array_equal(rows.numpy(), np.stack([lowest(row, gone) for row in scores.numpy()]))
    layer = mask(scores, ratio, "layer")
    want = lowest(scores.numpy().ravel(), math.floor(900 * ratio + 1e-9)).reshape(9, 100)
    assert np.array_equal(layer.numpy(), want)


@pytest.mark.usefixtures("panels")
def test_equal_scores_go_from_the_left():
    assert mask(torch.ones(2, 5), 0.4).tolist() == [[False, False, True, True, True]] * 2
    assert mask(torch.zeros(2, 3), 0.5, "layer").tolist() == [[False] * 3, [True] * 3]
    assert mask_n_m(torch.ones(1, 8), 1, 4).tolist() == [[False, False, False, True] * 2]


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1.0, 3e38, float("inf")])
def test_scores_of_any_size(value):
    scores = torch.tensor([[value, 2.5, value, 0.3, 1e-38, 7e30]])
    for per in ("row", "layer"):
        assert np.array_equal(mask(scores, 0.5, per).numpy()[0], lowest(scores.numpy()[0], 3))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6), inner=st.integers(1, 40), ratio=st.floats(0, 0.999), seed=st.integers(0, 10_000)
)
def test_counts_of_any_shape(rows, inner, ratio, seed):
    scores = drawn(rows, inner, seed=seed).abs().mul(3).round()
    assert ((~mask(scores, ratio)).sum(1) == count(inner, ratio)).all()
    assert int((~mask(scores, ratio, "layer")).sum()) == count(rows * inner, ratio)


def test_counts_are_those_of_decimals():
    assert 0.29 * 100 < 29
    assert count(100, 0.29) == 29
    assert count(11008, 0.6) == 6604
    assert count(4096 * 11008, 0.7) == 31_562_137
    assert [count(7, ratio) for ratio in (0.0, 0.14, 0.15, 0.99)] == [0, 0, 1, 6]


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (5, 16)])
def test_every_run_keeps_its_best(n, m):
    for scores in (drawn(7, 48).abs(), drawn(7, 48, seed=3).abs().mul(2).round()):
        keep = mask_n_m(scores, n, m)
        runs = scores.view(-1, m).numpy()
        want = np.stack([lowest(run, m - n) for run in runs]).reshape(7, 48)
        assert np.array_equal(keep.numpy(), want)
        assert (keep.view(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratios_outside_are_refused(ratio):
    with pytest.raises(ConfigError, match="must be at least 0 and below 1"):
        mask(torch.ones(2, 4), ratio)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (2, 3)])
def test_patterns_that_cannot_be_are_refused(n, m):
    with pytest.raises(ConfigError, match=f"{n}:{m} of rows of 8"):
        mask_n_m(torch.ones(2, 8), n, m)
