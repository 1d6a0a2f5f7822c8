"""What a plan is made of, out of real jobs: counts are those of the job, to the pass, the token and the byte."""

from __future__ import annotations

import json
import sqlite3
import statistics
from contextlib import closing, contextmanager

import pytest
import torch
from tests.fleet import fleets
from tests.fleet.test_job import StopError, spec_in
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from modicum.cli._common import jsonable
from modicum.errors import ConfigError, DataError
from modicum.fleet.finished import read_measured
from modicum.fleet.job import train_fleet
from modicum.fleet.ledger import FILE, Ledger
from modicum.fleet.measure import bytes_each, measured_here
from modicum.fleet.plan import Asked, plan
from modicum.fleet.planning import facts_of
from modicum.fleet.rates import Measured
from modicum.fleet.sample import alike, sampled
from modicum.fleet.work import Work
from modicum.store import Put, Store
from modicum.store.record import encode

#: rows of the users of both halves; the lengths of rows differ, too
COUNTS = (6, 9, 14, 7, 1, 11)
FIXED = {"tokens_per_pass": 300, "cohort_size": 2}


def half(folder, name, counts=COUNTS, **sections):
    folder = folder / name
    folder.mkdir()
    train = {"epochs": 4, "learning_rate": 2e-2, "evaluations": 3, **FIXED, **sections.pop("train", {})}
    return spec_in(folder, counts, train=train, users={"held_out": 0.3, "test": 0.1}, **sections)


def stopped_half(folder):
    """A job that was stopped when two of its three cohorts were finished."""
    spec = half(folder, "a")

    def stop(progress):
        if progress.users == 4:
            raise StopError

    with pytest.raises(StopError):
        train_fleet(spec, tell=stop)
    return spec


@contextmanager
def counted():
    """The passes that a model really makes, by whether gradients are kept, and the tokens in them."""
    found = {True: [0, 0], False: [0, 0]}

    def hook(module, given):
        if isinstance(module, nn.Embedding):
            one = found[torch.is_grad_enabled()]
            one[0] += 1
            one[1] += given[0].numel()

    handle = register_module_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def opened(*specs):
    """The stores of jobs, one open at a time."""
    for spec in specs:
        with Store(spec.store.path) as store:
            yield store


def beside_numbers(record):
    """The bytes of a record that are no numbers."""
    return len(encode(record)) - record.values.nbytes


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A job that was measured, and one that it predicts, with what that one really did."""
    folder = tmp_path_factory.mktemp("halves")
    first, second = half(folder, "a"), half(folder, "b", (12, 5, 8, 8, 10, 3, 1))
    train_fleet(first)
    with counted() as passes:
        report = train_fleet(second).report
    return first, second, report, passes


def test_a_measured_half_predicts_the_other_half(halves):
    first, second, report, passes = halves
    known = read_measured(first.folder)
    sample = sampled(second)
    found = plan(second, sample.users, known, facts_of(second), Asked(users=sample.count))
    assert found.cohorts == report["timing"]["cohorts"] == 4
    assert found.work.users == report["users"]["stored"] == 6
    assert found.at_fault == report["users"]["faulty"] == 1
    assert found.work.steps == report["timing"]["steps"]
    assert [found.work.passes, found.work.tokens] == passes[True]
    assert [found.work.looks, found.work.look_tokens] == passes[False]
    measured, stored = ([store.get(str(each)) for each in store.ls()] for store in opened(first, second))
    assert found.store["numbers"] == sum(record.values.nbytes for record in stored)
    # a description is compressed, then filled up to eights: another digit may take one more of them
    assert known.container_bytes == pytest.approx(statistics.mean(map(beside_numbers, measured)), abs=8)
    assert found.store["containers"] == pytest.approx(sum(map(beside_numbers, stored)), abs=8 * len(stored))
    assert found.hours.low < found.hours.value < found.hours.high
    assert set(found.notes) == {
        "memory: without that of a pass, which was not measured",
        "memory: without that of the process and its libraries, which was not measured",
        "store: without index and log, which were not measured",
    }


def test_a_job_is_measured_by_its_cohorts(halves):
    first, second, _, passes = halves
    known = read_measured(first.folder)
    report = json.loads((first.folder / "report.json").read_text())
    (rate,) = known.rates.values()
    assert list(known.rates) == ["all_tokens"]
    assert len(rate.seconds) == report["timing"]["cohorts"] == 3
    timing = report["timing"]
    assert sum(rate.seconds) == pytest.approx(timing["seconds_of_cohorts"])
    # the clock also sees what lies between cohorts
    assert 0 < timing["seconds_of_cohorts"] < timing["seconds"]
    assert (known.tokens_per_pass, known.cohort_size, known.method) == (300, 2, "lora_xs")
    assert known.stored == 1.0
    again = Measured.of(json.loads(json.dumps(jsonable(known))))
    assert again == known
    # tokens are those that the model met
    (rate,) = read_measured(second.folder).rates.values()
    assert sum(rate.work) == passes[True][1] + passes[False][1]


def test_rows_that_are_gone_or_changed_do_not_matter(tmp_path):
    spec = half(tmp_path, "a")
    report = train_fleet(spec).report
    known = read_measured(spec.folder)
    fleets.table(tmp_path / "a" / "users.jsonl", (6, 9, 14, 8, 1, 11))
    assert read_measured(spec.folder) == known
    (tmp_path / "a" / "users.jsonl").unlink()
    assert read_measured(spec.folder) == known
    # the report may have been carried elsewhere
    alone = read_measured(spec.folder / "report.json")
    assert alone.rates["steps"].work == (report["timing"]["steps"],)
    assert alone.rates["steps"].seconds == (report["timing"]["seconds_of_cohorts"],)
    assert alone.rates["steps"].error is None
    assert alone.container_bytes is None


def test_an_unfinished_job_is_measured_by_what_is_finished(tmp_path):
    spec = stopped_half(tmp_path)
    known = read_measured(spec.folder)
    assert len(known.rates["all_tokens"].work) == 2
    assert known.device == "cpu"
    # there is no report yet that says where it was trained
    with Ledger(spec.folder) as ledger, ledger.change():
        ledger.note("about", {**ledger.fact("about"), "device": "cuda:0"})
    assert read_measured(spec.folder).device == "cuda:0"
    with pytest.raises(StopError):
        train_fleet(spec, overwrite=True, tell=lambda _: (_ for _ in ()).throw(StopError))
    with pytest.raises(ConfigError, match="no cohort of the fleet"):
        read_measured(spec.folder)


def test_a_rate_is_that_of_cohorts_whatever_the_clock_says(tmp_path):
    """Several cohorts at a time share the clock, and how many may change from one attempt to the next."""
    spec = half(tmp_path, "a")
    train_fleet(spec)
    known = read_measured(spec.folder)
    with Ledger(spec.folder) as ledger, ledger.change():
        ledger.note("clock", ledger.clock / 3)
        ledger.note("workers", 3)
    assert read_measured(spec.folder) == known


def as_before(folder):
    """Make a ledger one of format 1, whose three workers shared the seconds of cohorts; the seconds on that clock."""
    with closing(sqlite3.connect(folder / FILE)) as ledger, ledger:
        ledger.execute("ALTER TABLE cohorts DROP COLUMN tokens")
        ledger.execute("DELETE FROM facts WHERE name IN ('clock', 'about')")
        ledger.execute("INSERT INTO facts VALUES ('workers', '3')")
        ledger.execute("UPDATE facts SET value = '1' WHERE name = 'format'")
        return [seconds for (seconds,) in ledger.execute("SELECT seconds FROM cohorts ORDER BY cohort")]


def test_a_job_of_an_older_modicum_is_measured_by_steps_and_gone_on_with(tmp_path):
    spec = stopped_half(tmp_path)
    took = as_before(spec.folder)
    assert len(took) == 2
    known = read_measured(spec.folder)
    assert known.rates["steps"].seconds == tuple(3 * one for one in took)
    assert known.device == "cpu"
    assert "did not note the tokens" in known.notes[0]
    report = train_fleet(spec, resume=True).report
    with Ledger(spec.folder) as ledger:
        seconds = [one for one, _ in ledger.finished().values()]
        assert seconds[:2] == [3 * one for one in took]
        assert report["timing"]["seconds"] == ledger.clock > sum(took)
    # of the cohorts whose tokens are known
    assert len(read_measured(spec.folder).rates["all_tokens"].work) == 1
    # every step was made, by whomever
    whole = half(tmp_path, "b")
    assert report["timing"]["steps"] == train_fleet(whole).report["timing"]["steps"]


def test_a_report_of_an_older_modicum_says_who_shared_the_clock(tmp_path, halves):
    report = json.loads((halves[0].folder / "report.json").read_text())
    timing = {name: value for name, value in report["timing"].items() if name != "seconds_of_cohorts"}
    (tmp_path / "report.json").write_text(json.dumps({**report, "timing": {**timing, "workers": 2}}))
    assert read_measured(tmp_path / "report.json").rates["steps"].seconds == (2 * timing["seconds"],)


def test_what_holds_no_measurement(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    (tmp_path / "y.json").write_text('{"kind": "fleet"}')
    for path, part in (
        (tmp_path, "no measured fleet"),
        (tmp_path / "absent", "no measured fleet"),
        (tmp_path / "x.json", "no measured fleet"),
        (tmp_path / "y.json", "no report of a fleet"),
    ):
        with pytest.raises(ConfigError, match=part):
            read_measured(path)


def test_measured_on_this_machine(tmp_path, halves):
    spec = half(tmp_path, "a", (12, 20, 14, 16), train={"tokens_per_pass": None, "cohort_size": None})
    known = measured_here(spec, sampled(spec), 0.3)
    assert set(known.rates) == {"tokens", "look_tokens", "users", "adapters"}
    assert all(rate.each > 0 for rate in known.rates.values())
    assert len(known.rates["tokens"].work) >= 4
    assert known.start > 0
    assert known.cohort_size == 256
    assert known.token_bytes > 0
    # records are those of a job, but for the names of users and the number of steps: descriptions are compressed and
    # filled up to eights, so that a digit more may take two eights
    job = read_measured(halves[0].folder)
    assert known.container_bytes == pytest.approx(job.container_bytes, abs=16)
    assert 100 < known.index_bytes < 1500
    found = plan(spec, sampled(spec).users, known, facts_of(spec), Asked(users=1000))
    assert set(found.worker_hours) == {"training", "held-out and test rows", "reading rows", "storing"}
    assert found.notes == []
    # nothing of it trains: the pass changes no number, and no folder is left
    assert not spec.folder.exists()


def test_bytes_of_a_job_with_enough_adapters_have_index_and_log(tmp_path):
    spec = spec_in(
        tmp_path, (2,) * 260, train={"epochs": 1, "min_steps": 1, "cohort_size": 260}, users={"held_out": 0.0}
    )
    train_fleet(spec)
    known = read_measured(spec.folder)
    with Store(spec.store.path) as store:
        stats = store.stats()
    whole = sum(stats.disk.values()) / stats.versions
    numbers = 4 * facts_of(spec).ranks[4].trained
    # files begin with some pages, which many adapters share
    assert numbers + known.container_bytes + known.index_bytes == pytest.approx(whole, rel=0.3)


def test_bytes_of_a_record_do_not_depend_on_how_many_there_are():
    base = fleets.base(fleets.spec())
    kind = base.kinds[4]

    def puts(count):
        records = (
            base.record(4, kind.start, "bfloat16", metadata={"user": f"{at:06}"}) for at in range(count)
        )
        return [Put(f"users/{at:06}", record, metrics={"loss": 0.5}) for at, record in enumerate(records)]

    few, many = bytes_each(puts(300)), bytes_each(puts(1000))
    assert few[0] == pytest.approx(many[0], rel=1e-2)
    # whole pages of some kilobytes
    assert few[1] == pytest.approx(many[1], rel=0.25)
    # too few to tell
    assert bytes_each(puts(5))[1] is None
    assert sum(few[2].work) == 300


@pytest.mark.parametrize("kind", ["lora_xs", "lora"])
def test_numbers_by_shape_are_those_of_the_job(kind, tmp_path):
    ranks = {"ranks": {0: 2, 10: 6}} if kind == "lora" else {}
    spec = fleets.spec(kind, **ranks)
    base = fleets.base(spec)
    facts = facts_of(spec)
    assert {rank: one.record.layout.size for rank, one in base.kinds.items()} == {
        rank: one.trained for rank, one in facts.ranks.items()
    }
    narrow = fleets.spec(
        kind,
        method={
            **fleets.METHODS[kind],
            "target_modules": ["q_proj", "k_proj"],
            "exclude_modules": ["k_proj"],
        },
    )
    kinds = fleets.base(narrow).kinds
    assert kinds[4].record.layout.size == facts_of(narrow).ranks[4].trained


def test_users_like_each_other(tmp_path):
    spec = half(tmp_path, "a")
    sample = alike(spec, 10, 20, 10**6)
    assert sample.count == 10**6
    assert len(sample.users) == len(sample.learners) == 4096
    one = sample.users[17]
    # 30 % to judge by, 10 % for the test
    assert (one.train, one.held_out, one.test) == ((20,) * 6, (20,) * 3, (20,))
    with pytest.raises(ConfigError, match=r"too few .*; tokens = 99"):
        alike(spec, 2, 99, 5)


def test_a_sample_stands_for_all_users_in_equal_parts(tmp_path):
    spec = half(tmp_path, "a", tuple(range(4, 24)))
    every, some = sampled(spec), sampled(spec, 5)
    assert every.count == some.count == 20
    assert [one.order[0] for one in every.users] == list(range(4, 24))
    assert [one.order[0] for one in some.users] == [6, 10, 14, 18, 22]
    assert sum(every.reading.work) == 20
    with pytest.raises(DataError, match="none of 2 users"):
        sampled(half(tmp_path, "b", (1, 1)))
    assert Work().times(3) == Work()
