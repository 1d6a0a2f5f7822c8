"""Stopping and judging: by a user's own held-out rows alone."""

from __future__ import annotations

import math

import pytest
import torch
from tests import models_for_tests
from tests.fleet import fleets

from modicum.data.encoded import Collator, Encoded, EncodedRow
from modicum.evaluate.memory import Peak
from modicum.fleet.cohort import Cohort
from modicum.fleet.training import Learner, Training, is_better, measured

COUNTS = (6, 9, 4)


def trained(people, **train):
    spec = fleets.spec(train={"epochs": 6, "evaluations": 6, **train}, users={"held_out": 0.2})
    training = Training(fleets.base_of(models_for_tests.llama(), spec), spec, people, 300)
    return training, training.run()


def alike(rows, user):
    """Rows of twelve tokens each."""
    generator = torch.Generator().manual_seed(user)
    ids = torch.randint(3, models_for_tests.VOCABULARY, (rows, 12), generator=generator)
    return Encoded([EncodedRow(row) for row in ids.tolist()])


def test_what_is_kept_is_the_best_step_on_held_out_rows():
    people = fleets.learners(COUNTS, held_out=3)
    training, learnt = trained(people, learning_rate=0.05, scheduler="constant")
    again = measured(training.cohort, {slot: one.held_out for slot, one in enumerate(people)}, 300)
    for slot, one in enumerate(learnt):
        assert one.held_out["loss"] == pytest.approx(again[slot]["loss"], rel=1e-5)
        assert 0 < one.best_step <= one.steps
        assert one.before["n"] == 3
    # random held-out rows cannot be learnt, so the best is not always the last
    assert any(one.best_step < one.steps for one in learnt)


def test_metrics_are_those_of_the_model_on_these_rows_alone():
    spec = fleets.spec()
    base = fleets.base_of(models_for_tests.llama(), spec)
    people = fleets.learners(COUNTS)
    training = Training(base, spec, people, 300)
    training.run()
    data = {slot: one.train for slot, one in enumerate(people)}
    found, bare = measured(training.cohort, data, 60), measured(training.cohort, data, 60, base_only=True)
    fresh = models_for_tests.llama()
    for slot, rows in data.items():
        batch = Collator(0)([rows[row] for row in range(len(rows))])
        wanted = fresh(**batch).loss.item()
        assert bare[slot]["loss"] == pytest.approx(wanted, rel=1e-5)
        assert found[slot]["loss"] < wanted - 0.05
        assert found[slot]["n"] == len(rows)
        assert 0 <= found[slot]["token_accuracy"] <= 1


def test_patience_stops_a_user_and_not_the_others():
    helpless = fleets.learners((8,), held_out=3)[0]
    # what is judged is what is trained, so it gets better all the time
    rows = fleets.texts(8, 5)
    able = Learner(rows, rows, rank=4)
    _, learnt = trained([helpless, able], learning_rate=0.1, early_stopping_patience=1, scheduler="constant")
    assert learnt[0].stopped_early
    assert learnt[0].steps < learnt[1].steps == 12
    assert not learnt[1].stopped_early
    _, alone = trained([able], learning_rate=0.1, early_stopping_patience=1, scheduler="constant")
    assert alone[0].held_out["loss"] == pytest.approx(learnt[1].held_out["loss"], rel=1e-4)


def test_test_rows_decide_nothing():
    people = fleets.learners(COUNTS, held_out=3)
    with_test = [Learner(p.train, p.held_out, fleets.texts(2, 50 + at), 4) for at, p in enumerate(people)]
    plain, _ = trained(people)
    tested, learnt = trained(with_test)
    torch.testing.assert_close(plain.values, tested.values, rtol=1e-4, atol=1e-6)
    assert all(one.test["n"] == 2 and one.test_before["loss"] != one.test["loss"] for one in learnt)


def test_steps_are_told_once_each_also_where_users_stop_early():
    spec = fleets.spec(
        train={"epochs": 6, "evaluations": 6, "learning_rate": 0.1, "early_stopping_patience": 1},
        users={"held_out": 0.2},
    )
    told: list[int] = []
    training = Training(
        fleets.base_of(models_for_tests.llama(), spec), spec, fleets.learners(COUNTS, held_out=3), 300
    )
    training.run(told.append)
    assert sum(told) == 12 + 18 + 6


def test_training_goes_on_from_given_numbers():
    spec = fleets.spec()
    base = fleets.base_of(models_for_tests.llama(), spec)
    first = Training(base, spec, fleets.learners((9,)), 300)
    first.run()
    start = first.values[0].clone()
    person = fleets.learners((9,))[0]
    again = Training(base, spec, [Learner(person.train, rank=4, start=start)], 300)
    assert torch.equal(again.cohort.values[0], start)
    assert again.run()[0].losses[0] < first.learnt[0].losses[0] - 0.05


@pytest.mark.parametrize(("held_out", "each"), [(0, 12), (1, 16)])
def test_memory_of_a_user_is_its_numbers_moments_and_what_was_best(held_out, each):
    users, rows = 16, 4
    base = fleets.base_of(models_for_tests.llama(), fleets.spec())
    peaks = []
    # the same rows in both cases, in one pass: of one adapter, and of sixteen
    for count in (1, users):
        share = rows * users // count
        spec = fleets.spec(train={"epochs": 2, "batch_size": share, "evaluations": 2})
        kept = held_out * users // count
        people = [
            Learner(alike(share, user), alike(kept, 100 + user) if kept else None, rank=4)
            for user in range(count)
        ]
        training = None
        with Peak(base.device) as peak:
            training = Training(base, spec, people, 10_000)
            training.run()
        peaks.append(peak.bytes)
    numbers = base.widest.record.layout.size
    beyond = (peaks[1] - peaks[0]) / (numbers * (users - 1))
    assert each - 4 < beyond <= each * 1.05


def test_what_is_not_finite_is_never_better():
    assert is_better({"loss": 1.0}, None, "loss")
    assert is_better({"loss": 1.0}, {"loss": 2.0}, "loss")
    assert not is_better({"loss": 2.0}, {"loss": 2.0}, "loss")
    assert is_better({"accuracy": 1.0}, {"accuracy": 0.5}, "accuracy")
    assert not is_better({"loss": math.nan}, None, "loss")
    assert not is_better({"accuracy": math.inf}, {"accuracy": 0.5}, "accuracy")


def test_adapters_of_a_narrower_rank_come_back_from_the_stack():
    spec = fleets.spec("lora", ranks={0: 2, 5: 8})
    base = fleets.base_of(models_for_tests.llama(), spec)
    values = torch.randn(base.kinds[2].record.layout.size, generator=torch.Generator().manual_seed(0))
    row = base.spread(2, values)
    assert row.shape == (base.widest.record.layout.size,)
    assert torch.equal(base.gathered(2, row), values)
    assert row.abs().sum() == pytest.approx(values.abs().sum().item(), rel=1e-5)
    assert Cohort(base, [2, 8]).values.shape[0] == 2
