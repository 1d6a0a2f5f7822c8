"""The file of experiments: many changes in one flush, nothing acknowledged that is not on the disk, nothing lost."""

from __future__ import annotations

import asyncio
import sqlite3
import threading

import pytest
from tests.serve.experiments.speaking import arms_of, ask, flushed

from modicum.errors import ConfigError, StoreError
from modicum.serve.experiments.ledger import Ledger

TABLES = "CREATE TABLE IF NOT EXISTS numbers(n INTEGER PRIMARY KEY);"


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "ledger.sqlite", TABLES)
    yield made
    made.close()


def add(number):
    return lambda db: db.execute("INSERT INTO numbers VALUES (?)", (number,)).rowcount


def numbers(ledger):
    return ledger.read(lambda db: [n for (n,) in db.execute("SELECT n FROM numbers ORDER BY n")])


def test_what_is_done_is_seen_by_others(ledger):
    assert ledger.do(add(1)) == 1
    with sqlite3.connect(ledger.path) as other:
        assert other.execute("SELECT n FROM numbers").fetchall() == [(1,)]
    other.close()


def test_many_changes_are_one_flush(ledger):
    hold = threading.Event()
    first = ledger.submit(lambda db: hold.wait(10))
    found = [ledger.submit(add(number)) for number in range(300)]
    before = ledger.read(lambda db: db.execute("PRAGMA data_version").fetchone())
    hold.set()
    assert first.result(10)
    assert [future.result(10) for future in found] == [1] * 300
    assert before
    assert len(numbers(ledger)) == 300


def test_a_change_that_is_refused_spoils_no_other(ledger):
    def refuse(db):
        raise ConfigError("no")

    found = [ledger.submit(change) for change in (add(1), refuse, add(2))]
    assert (found[0].result(10), found[2].result(10)) == (1, 1)
    with pytest.raises(ConfigError, match="no"):
        found[1].result(10)
    assert numbers(ledger) == [1, 2]


def test_a_change_that_fails_leaves_nothing_half_done(ledger):
    def half(db):
        add(7)(db)
        add(7)(db)

    with pytest.raises(StoreError, match="UNIQUE"):
        ledger.do(half)
    assert numbers(ledger) == []
    assert ledger.do(add(8)) == 1


def test_closing_waits_for_what_was_submitted(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite", TABLES)
    found = [ledger.submit(add(number), urgent=number % 2 == 0) for number in range(50)]
    ledger.close()
    ledger.close()
    assert all(future.done() for future in found)
    assert len(numbers(ledger)) == 50
    with pytest.raises(StoreError, match="has been closed"):
        ledger.do(add(99))


def test_a_file_that_is_none_is_told(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match=r"ledger.sqlite cannot be read or changed"):
        Ledger(tmp_path / "ledger.sqlite", TABLES)


def test_while_nothing_can_be_written_feedback_is_refused_and_answers_are_kept(experiments, engine, trial):
    trial()

    def rename(table, name):
        experiments._ledger.do(lambda db: db.execute(f"ALTER TABLE {table} RENAME TO {name}").rowcount)

    async def come():
        return [await ask(experiments, engine, "trial", f"u{number}") for number in range(20)]

    rename("exposures", "away")
    # the answers themselves are not touched
    assert all(tokens for _, tokens in asyncio.run(come()))
    with pytest.raises(StoreError, match="no such table"):
        asyncio.run(experiments.feedback("team", {"response_id": "r-u1", "thumbs": "up"}))
    flushed(experiments)
    rename("away", "exposures")
    assert (
        asyncio.run(experiments.feedback("team", {"response_id": "r-u1", "thumbs": "up"}))["replaced"]
        is False
    )
    report = experiments.report("trial")
    assert report.lost == 0
    assert sum(arm.users for arm in arms_of(report).values()) == 20


def test_what_can_never_be_written_is_given_up_and_counted(ledger):
    ledger.do(add(1))
    ledger.submit(add(1), urgent=False)
    ledger.do(add(2))
    ledger.do(add(3))
    assert ledger.lost == 1
    assert numbers(ledger) == [1, 2, 3]
