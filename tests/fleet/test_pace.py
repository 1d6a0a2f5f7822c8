"""Who trains how much, on which rows, in which passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fleet import fleets

from modicum.fleet.pace import Pace, steps_of
from modicum.fleet.passes import passes


def options(**values):
    return fleets.spec(train={"min_steps": 1, **values}).train


@pytest.mark.parametrize(
    ("rows", "values", "steps"),
    [
        (16, {"epochs": 3}, 12),
        (17, {"epochs": 3}, 15),
        (2, {"epochs": 3}, 3),
        (2, {"epochs": 3, "min_steps": 10}, 10),
        (1000, {"epochs": 3, "max_steps": 40}, 40),
        (16, {"epochs": 0.6}, 3),
    ],
)
def test_few_rows_still_learn_and_many_rows_end(rows, values, steps):
    assert steps_of(rows, options(**values)) == steps


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
def test_every_pass_over_the_rows_takes_each_of_them_once(rows):
    pace = Pace(rows, options(epochs=3))
    per_epoch = -(-rows // 4)
    batches = [pace.batch(step) for step in range(pace.steps)]
    epochs = [
        [row for batch in batches[at : at + per_epoch] for row in batch]
        for at in range(0, len(batches), per_epoch)
    ]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    if rows == 9:
        assert epochs[0] != epochs[1]


def test_batches_depend_on_the_users_own_rows_alone():
    one, again = Pace(9, options()), Pace(9, options())
    again.batch(3)
    assert [one.batch(step) for step in range(4)] == [again.batch(step) for step in range(4)]


def test_evaluations_are_spread_over_the_steps_and_the_last_one_is_at_the_end():
    pace = Pace(40, options(epochs=1, evaluations=4))
    assert [step for step in range(1, 11) if pace.is_measured_after(step)] == [3, 5, 8, 10]
    few = Pace(4, options(epochs=1, evaluations=4))
    assert few.is_measured_after(1)


@settings(max_examples=60, deadline=None)
@given(
    users=st.dictionaries(
        st.integers(0, 30), st.lists(st.integers(1, 40), min_size=1, max_size=9), min_size=1
    ),
    tokens=st.integers(10, 300),
    may_split=st.booleans(),
)
def test_passes_hold_every_row_once_and_keep_to_their_size(users, tokens, may_split):
    wanted = {slot: range(len(lengths)) for slot, lengths in users.items()}
    found = list(passes(wanted, lambda slot, row: users[slot][row], tokens, may_split=may_split))
    rows = [
        (slot, row) for one in found for slot, part in zip(one.slots, one.rows, strict=True) for row in part
    ]
    assert sorted(rows) == [(slot, row) for slot in sorted(users) for row in range(len(users[slot]))]
    for one in found:
        assert len(set(one.slots)) == len(one.slots)
        lengths = [users[slot][row] for slot, part in zip(one.slots, one.rows, strict=True) for row in part]
        alone = len(one.slots) == 1 and (not may_split or len(lengths) == 1)
        assert alone or max(lengths) * len(lengths) <= tokens
        assert max(one.counts) <= 2 * min(one.counts)
    if not may_split:
        assert sum(len(one.slots) for one in found) == len(users)
