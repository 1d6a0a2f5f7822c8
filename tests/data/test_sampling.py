"""The order of rows depends on seed and epoch alone."""

from __future__ import annotations

import numpy as np
import pytest

from modicum.data.sampling import EpochSampler


@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_is_another_order_of_all_rows(grouped):
    lengths = np.random.default_rng(0).integers(1, 50, 103) if grouped else None
    sampler = EpochSampler(103, 0, lengths=lengths, batch_size=4)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again != second
    assert sorted(first) == sorted(second) == list(range(103)) != first
    assert len(sampler) == 103
    assert list(EpochSampler(103, 1, lengths=lengths, batch_size=4)) != first


def test_grouping_saves_padding():
    lengths = np.random.default_rng(0).integers(1, 100, 800)

    def padding(order):
        batches = lengths[np.array(order)].reshape(-1, 8)
        return (batches.max(1, keepdims=True) - batches).sum()

    grouped = list(EpochSampler(800, 0, lengths=lengths, batch_size=8))
    assert padding(grouped) < 0.1 * padding(list(EpochSampler(800, 0)))
    # long batches do not all come first
    means = lengths[np.array(grouped)].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(means, np.arange(100))[0, 1]) < 0.3
