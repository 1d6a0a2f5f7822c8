"""The arithmetic of a fleet's plan, against figures computed by hand."""

from __future__ import annotations

import math

import pytest
from tests.fleet import fleets

from modicum.errors import ConfigError
from modicum.evaluate.intervals import t_quantile
from modicum.evaluate.resources import Prices
from modicum.fleet.plan import Asked, Facts, plan
from modicum.fleet.rates import Measured, Rate
from modicum.fleet.schedule import makespan, with_failures
from modicum.fleet.sizing import fitting, user_bytes
from modicum.fleet.work import UserRows, Work, cohorts_of, work_of
from modicum.models.plan import AdapterNumbers

GIB = 2**30
FACTS = Facts("m", 1000, {4: AdapterNumbers(trained=200, basis=50, directions=80)})


def spec(**sections):
    train = {"epochs": 2, "min_steps": 1, "batch_size": 2, "evaluations": 2, **sections.pop("train", {})}
    return fleets.spec(
        model={"name_or_path": "m"},
        users={"held_out": 0.2},
        store={"dtype": "bfloat16"},
        train=train,
        **sections,
    )


def user(number: int = 0, rows: int = 3, tokens: int = 5) -> UserRows:
    """Three rows to train on, one to judge by and one for the test."""
    return UserRows(f"u{number}", (tokens,) * rows, (6,), (4,), rank=4, order=(rows + 2, 0, number))


def measured(**values) -> Measured:
    return Measured(
        **{
            "what": "by hand",
            "model": "m",
            "method": "lora_xs",
            "ranks": (4,),
            "device": "cpu",
            "threads": 2,
            "tokens_per_pass": 100,
            "cohort_size": 2,
            "rates": {"all_tokens": Rate((100.0, 100.0), (9.0, 11.0))},
            "token_bytes": 7,
            "base_bytes": 5000,
            "process_bytes": 300,
            "container_bytes": 60.0,
            "index_bytes": 40.0,
            "start": 2.0,
            **values,
        }
    )


def test_work_by_hand():
    # 2 epochs of a batch of 2 rows and one of 1 row; judged before, after steps 2 and 4; tested before and after
    found = work_of([user()], spec().train, 100)
    assert found == Work(users=1, steps=4, passes=4, tokens=2 * (10 + 5), looks=5, look_tokens=3 * 6 + 2 * 4)
    assert found.all_tokens == 56
    # two such users share every pass
    both = work_of([user(0), user(1)], spec().train, 100)
    assert both == Work(users=2, steps=8, passes=4, tokens=60, looks=5, look_tokens=52)
    # passes of 12 tokens have no room for 2 × 10
    assert work_of([user(0), user(1)], spec().train, 12).passes == 2 + 1 + 2 + 1


def test_rows_to_judge_by_are_split_over_passes():
    many = UserRows("u", (5,), (6, 4, 6), rank=4)
    # 2 × 6 tokens, then 1 × 4, three times
    found = work_of([many], spec(train={"epochs": 2}).train, 12)
    assert (found.looks, found.look_tokens) == (3 * 2, 3 * 16)


def test_padding_goes_to_the_longest_row_and_to_a_multiple():
    uneven = UserRows("u", (3, 9), rank=4)
    one = spec(train={"epochs": 1}).train
    assert work_of([uneven], one, 100).tokens == 18
    assert work_of([uneven], one, 100, multiple=8).tokens == 32


def test_users_at_fault_are_in_a_cohort_and_do_nothing():
    nobody = UserRows("u9", order=(9, 0, 9))
    assert cohorts_of([user(1), nobody, user(0)], 2) == [[user(0), user(1)], [nobody]]
    assert work_of([nobody], spec().train, 100) == Work()
    assert work_of([user(0), nobody], spec().train, 100) == work_of([user(0)], spec().train, 100)


def test_min_and_max_steps_count():
    assert work_of([user()], spec(train={"min_steps": 9}).train, 100).steps == 9
    assert work_of([user()], spec(train={"max_steps": 3, "min_steps": 1}).train, 100).steps == 3


def test_a_rate_and_its_error():
    rate = Rate((1.0, 1.0), (1.0, 3.0))
    assert rate.each == 2.0
    # residuals −1 and 1: √(2/1 · 2) / 2
    assert rate.error == pytest.approx(1.0)
    assert Rate((2.0,), (3.0,)).error is None
    assert Rate((1.0, 2.0, 4.0), (2.0, 4.0, 8.0)).error == pytest.approx(0.0)


def test_the_interval_is_students_t_over_all_units():
    three = Rate((1.0, 1.0, 1.0), (1.0, 2.0, 3.0))
    one = measured(rates={"tokens": three, "look_tokens": Rate((1.0, 1.0), (4.0, 4.0))})
    amounts = {"tokens": 10.0, "look_tokens": 5.0}
    assert one.parts(amounts) == {"training": 20.0, "held-out and test rows": 20.0}
    # only the first varies, so its two degrees of freedom count
    assert one.spread(amounts) == pytest.approx(t_quantile(0.975, 2) * 10 * three.error)
    single = measured(rates={"tokens": Rate((1.0,), (1.0,))})
    assert single.spread(amounts) is None


def test_failures_and_schedules_by_hand():
    time, again = with_failures(100 * math.log(2), mtbf=100, restart=5)
    assert again == pytest.approx(1)
    assert time == pytest.approx(105)
    # what hardly ever fails takes as long as it takes
    assert with_failures(10, 1e9, 5)[0] == pytest.approx(10, rel=1e-6)
    assert makespan([10.0] * 7, 3) == 30
    assert makespan([5.0, 1.0, 1.0, 1.0, 4.0], 2) == 7
    assert makespan([5.0], 10) == 5


def test_a_plan_by_hand():
    """1,000 users like two, of 56 tokens each at a tenth of a second: 5,600 seconds of work."""
    found = plan(spec(), [user(0), user(1)], measured(), FACTS, Asked(users=1000, workers=4, months=2))
    assert found.cohorts == 500
    assert found.work == work_of([user(0), user(1)], spec().train, 100).times(500)
    assert found.worker_hours == {"cohorts": pytest.approx(5600 / 3600)}
    assert found.hours.value == pytest.approx(5600 / 4 / 3600)
    half = t_quantile(0.975, 1) * measured().rates["all_tokens"].error * 56_000 / 4 / 3600
    assert found.hours.high - found.hours.value == pytest.approx(half)
    # two samples that differ by a fifth say next to nothing
    assert found.hours.low == 0.0
    assert found.memory == {
        "base model": 5000,
        "users of a cohort": 2 * user_bytes(200),
        "a pass": 700,
        "process and libraries": 300,
    }
    assert found.store == {"numbers": 1000 * 200 * 2, "containers": 60_000, "index and log": 40_000}
    assert found.basis_bytes == 200
    assert (found.rows_per_user, found.tokens_per_row) == (5, 5)
    assert found.dominates["store"] == "numbers (80%)"
    assert found.notes == []
    assert found.cost is None
    assert found.failures is None


def test_an_odd_number_of_users_makes_a_smaller_last_cohort():
    found = plan(spec(), [user(0), user(1)], measured(), FACTS, Asked(users=7))
    assert found.cohorts == 4
    assert found.hours.value == pytest.approx(7 * 5.6 / 3600)
    # four workers: one cohort each, and the last has one user
    spread = plan(spec(), [user(0), user(1)], measured(), FACTS, Asked(users=7, workers=4))
    assert spread.hours.value == pytest.approx(2 * 5.6 / 3600)


def test_cohorts_that_differ_add_up_to_the_whole():
    # the third user, of many rows, has a cohort of its own, which stands for a third of all users
    sample = [user(0), user(1), user(2, rows=30)]
    found = plan(spec(), sample, measured(), FACTS, Asked(users=10_000))
    each = [work_of([one], spec().train, 100).all_tokens for one in sample]
    assert found.hours.value == pytest.approx(sum(found.worker_hours.values()))
    assert found.hours.value == pytest.approx(sum(each) / 3 * 10_000 * 0.1 / 3600)


def test_money_by_hand():
    prices = Prices(cpu_hour=0.5, gb_month=3.0, currency="EUR")
    asked = Asked(users=1000, workers=4, months=2)
    found = plan(spec(), [user(0), user(1)], measured(), FACTS, asked, prices).cost
    # 4 workers of 2 threads for the hours on the clock
    assert found["parts"]["cpu"] == pytest.approx(0.5 * 2 * 5600 / 3600)
    assert found["parts"]["storage"] == pytest.approx(3.0 * 2 * (500_000 + 200) / 1e9)
    assert found["parts"]["gpu"] is None
    on_gpu = plan(
        spec(),
        [user(0)],
        measured(device="cuda:0"),
        FACTS,
        Asked(users=2),
        Prices(gpu_hour=2.0, currency="EUR"),
    )
    assert on_gpu.cost["parts"]["gpu"] == pytest.approx(2.0 * on_gpu.hours.value)
    # rows of 4, 5 and 6 tokens are padded to 8
    assert on_gpu.work.all_tokens == 2 * (6 * 8 + 5 * 8)


def test_failures_make_it_longer():
    asked = Asked(users=1000, mtbf=1.0)
    found = plan(spec(), [user(0), user(1)], measured(), FACTS, asked)
    time, again = with_failures(11.2, 3600, 2.0)
    assert found.failures.cohorts_again == pytest.approx(500 * again)
    assert found.hours.value == pytest.approx(500 * time / 3600)
    assert found.failures.worker_hours == pytest.approx(500 * (time - 11.2) / 3600)
    with pytest.raises(ConfigError, match="take smaller cohorts"):
        plan(spec(), [user(0), user(1)], measured(), FACTS, Asked(users=1000, mtbf=1e-5))


def test_memory_sizes_cohorts_as_the_job_does():
    asked = Asked(users=10, memory=1.0, per_machine=2, workers=2)
    found = plan(spec(), [user(0)], measured(), FACTS, asked)
    free = GIB // 2 - 5300
    assert (found.tokens_per_pass, found.cohort_size) == fitting(spec().train, "cpu", free, 200, 7, 6)
    assert found.cohort_size == 256
    assert found.fits
    assert found.machines == 1
    tight = plan(spec(), [user(0)], measured(), FACTS, Asked(users=10, memory=5000 / GIB))
    assert (tight.cohort_size, tight.fits) == (1, False)
    # what the specification says is not touched
    own = plan(spec(train={"cohort_size": 3, "tokens_per_pass": 50}), [user(0)], measured(), FACTS, asked)
    assert (own.tokens_per_pass, own.cohort_size) == (50, 3)


def test_a_pass_takes_what_the_process_grew_by():
    grown = measured(token_grown=9.5)
    assert plan(spec(), [user(0)], grown, FACTS, Asked()).memory["a pass"] == 950
    # sizes are those of the job, which goes by tensors
    asked = Asked(memory=20_000 / GIB)
    found = plan(spec(), [user(0)], grown, FACTS, asked)
    assert found.tokens_per_pass == plan(spec(), [user(0)], measured(), FACTS, asked).tokens_per_pass == 1050


def test_what_was_not_measured_is_said():
    bare = measured(
        token_bytes=None, base_bytes=None, process_bytes=None, container_bytes=None, index_bytes=None
    )
    found = plan(spec(), [user(0)], bare, FACTS, Asked(users=4, memory=1.0))
    # weights and directions in float32
    assert found.memory == {"base model": 4 * 1080, "users of a cohort": found.cohort_size * user_bytes(200)}
    assert found.store == {"numbers": 4 * 400, "containers": 4 * 1024}
    assert len(found.notes) == 5
    text = " ".join(found.notes)
    for part in ("that of a pass", "the process", "1024 bytes", "index and log", "a pass is of"):
        assert part in text
    other = measured(model="n", ranks=(8,), early_stopping=2, rates={"steps": Rate((4.0,), (2.0,))})
    said = plan(spec(), [user(0)], other, FACTS, Asked(users=4))
    assert said.hours.value == pytest.approx(4 * 4 * 0.5 / 3600)
    assert said.hours.low is None
    text = " ".join(said.notes)
    for part in ("the model n", "at rank 8", "early_stopping_patience = 2", "rows as long"):
        assert part in text
    with pytest.raises(ConfigError, match="that was lora"):
        plan(spec(), [user(0)], measured(method="lora"), FACTS, Asked())


def test_rows_that_nobody_timed_count_as_those_that_train():
    half = measured(rates={"tokens": Rate((1.0, 1.0), (1.0, 1.0))})
    found = plan(spec(), [user(0)], half, FACTS, Asked(users=1))
    assert found.hours.value == pytest.approx(56 / 3600)
    assert "count as those that train" in " ".join(found.notes)


def test_adapters_that_are_not_stored_take_no_room():
    found = plan(spec(), [user(0)], measured(stored=0.5), FACTS, Asked(users=10))
    assert found.adapters == 5
    assert found.store["numbers"] == 5 * 400


def test_everything_wrong_is_said_at_once():
    wrong = Asked(users=0, rows=3, workers=0, per_machine=-1, memory=float("nan"), mtbf=0.0, months=math.inf)
    faults = wrong.faults()
    assert len(faults) == 7
    for name in (
        "users = 0",
        "workers = 0",
        "workers-per-machine = -1",
        "memory",
        "mtbf",
        "months",
        "together",
    ):
        assert any(name in fault for fault in faults), name
    assert Asked(users=5, rows=3, tokens=2, memory=0.5).faults() == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rates": {"tokens": {"work": [1], "seconds": [0]}}},
        {"rates": {}},
        {"rates": {"miles": {"work": [1], "seconds": [1]}}},
        {"rates": {"tokens": {"work": [], "seconds": []}}},
    ],
)
def test_what_is_no_measurement_is_refused(values):
    whole = {name: getattr(measured(), name) for name in Measured.__dataclass_fields__}
    with pytest.raises(ConfigError, match="measured fleet"):
        Measured.of({**whole, **values} if values else values)
