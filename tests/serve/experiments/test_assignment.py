"""Users and their arms: always the same, in the shares of the weights, and few who move."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import pytest

from modicum.serve.experiments.assignment import assign, owner, pseudonym
from modicum.serve.experiments.design import Arm

SALT, OTHER = bytes(range(32)), bytes(range(1, 33))
USERS = [f"user-{number}" for number in range(20_000)]


def arms(*weights):
    return tuple(Arm(f"arm{number}", f"ada@{number + 1}", weight) for number, weight in enumerate(weights))


def given(found, salt=SALT, users=USERS):
    return [assign(salt, found, user).label for user in users]


@pytest.mark.parametrize("weights", [(1, 1), (9, 1), (0.5, 0.3, 0.2), (1000, 10, 0)])
def test_shares_are_those_of_the_weights(weights):
    counts = Counter(given(arms(*weights)))
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        spread = math.sqrt(len(USERS) * share * (1 - share))
        assert abs(counts[f"arm{number}"] - len(USERS) * share) <= 4 * spread


def test_a_user_keeps_the_arm_and_another_experiment_gives_another():
    first, again, other = given(arms(1, 1)), given(arms(1, 1)), given(arms(1, 1), OTHER)
    assert first == again
    same = sum(a == b for a, b in zip(first, other, strict=True)) / len(USERS)
    assert 0.48 < same < 0.52
    # and the order in which arms are named does not matter
    assert given(arms(1, 1)[::-1]) == first


def test_as_few_users_move_as_can():
    before, after = given(arms(9, 1)), given(arms(8, 2))
    moved = Counter((a, b) for a, b in zip(before, after, strict=True) if a != b)
    assert set(moved) == {("arm0", "arm1")}
    # the share that has to go: 0.2 − 0.1
    assert 0.09 < sum(moved.values()) / len(USERS) < 0.11
    # a third arm takes from both, and nobody moves between these
    moved = Counter((a, b) for a, b in zip(before, given(arms(9, 1, 10)), strict=True) if a != b)
    assert {b for _, b in moved} == {"arm2"}
    # weights in proportion are the same weights
    assert given(arms(90, 10)) == before


def test_an_arm_without_weight_gets_nobody():
    assert set(given(arms(1, 0))) == {"arm0"}
    closed = tuple(dataclasses.replace(arm, weight=0 if arm.label == "arm0" else 1) for arm in arms(1, 1))
    assert set(given(closed)) == {"arm1"}


def test_pseudonyms_tell_tenants_users_and_experiments_apart():
    known = {
        pseudonym(SALT, "team", "u"), pseudonym(OTHER, "team", "u"), pseudonym(SALT, "tea", "mu"),
        pseudonym(SALT, "team", "v"), owner(SALT, "team"), owner(OTHER, "team"),
    }  # fmt: skip
    assert len(known) == 6
    assert pseudonym(SALT, "team", "\ud800") != pseudonym(SALT, "team", "?")
