"""The audit log: complete, chained, monotone, and what `verify` sees when somebody meddles."""

from __future__ import annotations

import contextlib
import sqlite3
import time

import pytest
from tests.store.small_records import record

from modicum.errors import NotStoredError
from modicum.store import Store
from modicum.store.catalogue import audit


@pytest.fixture
def folder(tmp_path):
    with Store(tmp_path / "store", create=True, actor="ada@desk") as store:
        store.put("one", record(0), metrics={"acc": 0.5}, tags=["x"], note="first", alias="production")
        store.put("one", record(1), parent="one@1")
        store.promote("one@2")
        store.put("two", record(0))
    return tmp_path / "store"


def edit(folder, *statements):
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as db, db:
        for statement in statements:
            assert db.execute(statement).rowcount, statement


def faults(folder, **options):
    with Store(folder) as store:
        return store.verify(**options).faults


def test_every_change_is_one_entry_with_who_when_what(folder):
    with Store(folder, actor="bob") as store:
        store.rollback("one")
        store.tag("one@1", "y")
        store.untag("one@1", "y")
        store.measure("one@1", {"acc": 0.6})
        store.note("one@1", "second")
        store.unalias("one", "production")
        store.remove("one", 2)
        entries = store.log()
        assert [entry.action for entry in entries] == [
            "put", "alias", "put", "alias", "put", "rollback", "tag", "untag", "metrics", "note", "unalias", "remove",
        ]  # fmt: skip
        assert [entry.seq for entry in entries] == list(range(1, 13))
        assert {entry.actor for entry in entries[:5]} == {"ada@desk"}
        assert {entry.actor for entry in entries[5:]} == {"bob"}
        assert [e.detail for e in entries if e.action in ("alias", "rollback")] == [
            {"alias": "production", "from": None},
            {"alias": "production", "from": 1},
            {"alias": "production", "from": 2},
        ]
        assert [(e.name, e.version) for e in entries[:5]] == [("one", 1)] * 2 + [("one", 2)] * 2 + [
            ("two", 1)
        ]
        assert sorted(e.at for e in entries) == [e.at for e in entries]
        assert [e.seq for e in store.log("two")] == [5]
        assert [e.seq for e in store.log(after=10)] == [11, 12]
        assert store.log(limit=1)[0].digest == store.show("one@1").digest
        assert store.verify().faults == ()


@pytest.mark.parametrize(
    "meddling",
    [
        "UPDATE audit SET actor = 1 + (SELECT max(id) FROM actors) WHERE seq = 2",
        "UPDATE actors SET actor = 'eve'",
        "UPDATE audit SET at = at + 1 WHERE seq = 3",
        "UPDATE audit SET action = 'tag' WHERE seq = 3",
        "UPDATE audit SET version = 1 WHERE seq = 3",
        "UPDATE audit SET name = 2 WHERE seq = 3",
        "UPDATE audit SET detail = replace(detail, '0.5', '0.9') WHERE seq = 1",
        "UPDATE audit SET digest = zeroblob(32) WHERE seq = 1",
        "UPDATE audit SET hash = zeroblob(32) WHERE seq = 4",
        "DELETE FROM audit WHERE seq = 2",
        "DELETE FROM audit WHERE seq = 5",
        "UPDATE audit SET seq = 9 WHERE seq = 5",
        "UPDATE names SET name = 'uno' WHERE name = 'one'",
        "UPDATE names SET latest = 9 WHERE name = 'one'",
        "UPDATE names SET salt = zeroblob(16) WHERE name = 'one'",
        "UPDATE versions SET object = 3 - object WHERE name = 1",
        "UPDATE versions SET size = size + 1 WHERE name = 2",
        "UPDATE versions SET kind = 2 WHERE name = 2",
        "UPDATE versions SET entry = 2 WHERE name = 2",
        "UPDATE versions SET version = 7 WHERE name = 2",
        "UPDATE versions SET object = 77 WHERE name = 2",
        "UPDATE versions SET name = 77 WHERE name = 2",
        "DELETE FROM versions WHERE name = 2",
        "UPDATE kinds SET base = 'other'",
        "UPDATE aliases SET version = 1",
        "UPDATE aliases SET alias = 'canary'",
        "UPDATE earlier SET version = 2",
        "DELETE FROM earlier",
        "UPDATE tags SET tag = 'y'",
        "UPDATE metrics SET value = 0.6",
        "UPDATE notes SET note = 'never'",
        "UPDATE objects SET uses = 5 WHERE id = 2",
        "UPDATE objects SET digest = zeroblob(32) WHERE id = 2",
        "UPDATE objects SET start = start + 8 WHERE id = 2",
        "UPDATE objects SET segment = 5 WHERE id = 2",
        "DELETE FROM objects WHERE id = 2",
        "UPDATE segments SET size = size - 8",
        "DELETE FROM segments",
        "UPDATE settings SET value = zeroblob(32) WHERE key = 'head'",
        "UPDATE settings SET value = 3 WHERE key = 'entries'",
        "DELETE FROM names WHERE name = 'two'",
    ],
)  # fmt: skip
def test_meddling_with_any_table_is_found(folder, meddling):
    assert faults(folder) == ()
    edit(folder, meddling)
    assert faults(folder)


def test_a_log_that_was_written_anew_is_found_with_an_earlier_head(folder):
    with Store(folder, actor="ada@desk") as store:
        head = store.head()
        store.put("three", record(3))
        assert store.verify(expected=head).faults == ()
    edit(folder, "UPDATE actors SET actor = 'eve'")
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as db, db:
        link = audit.BEGINNING
        salts = dict(db.execute("SELECT id, salt FROM names"))
        names = dict(db.execute("SELECT id, name FROM names"))
        for seq, at, action, name, version, digest, detail in db.execute(
            "SELECT seq, at, action, name, version, digest, detail FROM audit ORDER BY seq"
        ).fetchall():
            who = audit.pseudonym(salts[name], names[name])
            link = audit.chained(link, seq, at, "eve", action, who, version, audit.content(digest, detail))
            db.execute("UPDATE audit SET hash = ? WHERE seq = ?", (link, seq))
        db.execute("UPDATE settings SET value = ? WHERE key = 'head'", (link,))
    assert faults(folder) == ()  # a perfect forgery
    assert "noted elsewhere" in " ".join(faults(folder, expected=head))


def test_a_log_that_was_cut_off_is_found_with_an_earlier_head(folder):
    with Store(folder) as store:
        head = store.head()
    edit(
        folder,
        "DELETE FROM audit WHERE seq = 5",
        "DELETE FROM versions WHERE name = 2",
        "DELETE FROM names WHERE id = 2",
    )
    edit(
        folder,
        "UPDATE settings SET value = 4 WHERE key = 'entries'",
        "UPDATE settings SET value = (SELECT hash FROM audit WHERE seq = 4) WHERE key = 'head'",
        "UPDATE objects SET uses = 1",
    )
    assert faults(folder) == ()
    assert "4 entries, 5 were noted elsewhere" in " ".join(faults(folder, expected=head))


def test_a_clock_that_goes_backwards_does_not_turn_the_log(folder, monkeypatch):
    with Store(folder) as store:
        last = store.log()[-1].at
        true = time.time_ns
        monkeypatch.setattr(time, "time_ns", lambda: true() - 3600 * 10**9)
        store.put("late", record(8))
        store.put_many([(f"later{n}", record(8)) for n in range(3)])
        monkeypatch.undo()
        entries = store.log(after=5)
        times = [last, *(entry.at for entry in entries)]
        assert times == sorted(set(times))
        for entry in entries:  # what the clock said is kept
            assert 3500 < entry.at.timestamp() - entry.detail["clock"] / 1e6 < 3700
        store.put("now", record(8))
        assert store.log()[-1].at > times[-1]
        assert store.verify().faults == ()
        seeds = {"one@1": 0, "one@2": 1, "two@1": 0}
        seeds |= dict.fromkeys(["late@1", "later0@1", "later1@1", "later2@1", "now@1"], 8)
        assert {str(version) for version in store.ls()} == seeds.keys()
        assert all(store.get(version) == record(seed) for version, seed in seeds.items())
        assert store.show("one@production").version == 2


def test_the_actor_is_asked_for_in_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_ACTOR", "robot")
    assert Store(tmp_path / "a", create=True).actor == "robot"
    assert Store(tmp_path / "a", actor="ada").actor == "ada"
    monkeypatch.delenv("MODICUM_ACTOR")
    assert "@" in Store(tmp_path / "a").actor


def test_what_an_experiment_does_is_logged_under_every_name_of_it(folder):
    with Store(folder, actor="bob") as store:
        before = store.head()
        store.acting("cy").experiment({"one": {"experiment": "t", "did": "start"}, "two": {"did": "start"}})
        first, second = store.log(after=before.entries)
        assert (first.action, first.actor, first.name, first.detail["did"]) == (
            "experiment",
            "cy",
            "one",
            "start",
        )
        assert (second.name, second.detail) == ("two", {"did": "start"})
        assert store.actor == "bob"
        assert store.verify(expected=before).faults == ()
        with pytest.raises(NotStoredError, match="three"):
            store.experiment({"one": {"did": "stop"}, "three": {"did": "stop"}})
        assert store.head().entries == before.entries + 2
        # what was private in it goes with the name
        store.purge("one")
        assert store.verify().faults == ()
        entry = store.log(after=before.entries)[0]
        assert entry.redacted
        assert entry.detail == {}
