"""Deletion for real, space that comes back, and backups."""

from __future__ import annotations

import contextlib
import json
import sqlite3

import pytest
from tests.store.small_records import record

from modicum.errors import ConfigError, ConflictError, NotStoredError, StoreError
from modicum.store import Store
from modicum.store.catalogue import removal
from modicum.store.catalogue.lookup import find_name
from modicum.store.record import encode

NAME, NOTE = "users/0b6c5a3e-54dd-4c43", "private-note-about-this-user"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def store(folder):
    with Store(folder, create=True, segment_bytes=8000) as made:
        yield made


def on_disk(folder, *needles):
    """Which of the byte strings are anywhere in the files of a store, the WAL included."""
    files = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    return [needle for needle in needles if any(needle in data for data in files)]


def payload(seed):
    """The packed numbers of a record, as they lie on the disk."""
    return record(seed).values.tobytes()


def fill(store):
    store.put_many([(f"users/{n:04d}", record(n + 100)) for n in range(30)])
    store.put(NAME, record(1), note=NOTE, metrics={"secret_metric": 0.5})
    store.put(NAME, record(2), alias="production")
    store.put(NAME, record(3))
    store.put_many([(f"users/9{n:04d}", record(n + 200)) for n in range(30)])


def test_a_purged_name_leaves_no_byte(store, folder):
    fill(store)
    wanted = [payload(1), payload(2), payload(3), NAME.encode(), NOTE.encode(), b"secret_metric"]
    store.remove(NAME, 3)  # removed long before the purge: its bytes count too
    assert on_disk(folder, *wanted) == wanted
    purged = store.acting("eve").purge(NAME)
    assert on_disk(folder, *wanted) == []
    assert (purged.versions, purged.shared) == (2, ())
    assert purged.bytes == sum(len(encode(record(seed))) for seed in (1, 2, 3))
    with pytest.raises(NotStoredError):
        store.get(NAME)
    said = store.log(after=purged.entry - 1)
    assert [(entry.action, entry.actor) for entry in said] == [("purge", "eve"), ("erased", "eve")]
    assert said[0].name == f"purged:{purged.pseudonym[:12]}"
    assert said[1].detail == {"purge": purged.entry, "bytes": purged.bytes, "objects": 3}
    assert store.verify().faults == ()
    for n in range(30):
        assert store.get(f"users/{n:04d}") == record(n + 100)
    again = store.put(NAME, record(4))  # the name is free again, and is another one for the log
    assert again.version == 1
    assert [entry.action for entry in store.log(NAME)] == ["put"]
    assert store.verify().faults == ()


def test_what_a_purge_takes_from_the_log_cannot_be_guessed_back(store, folder):
    fill(store)
    store.note(NAME, "yes")
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as db:
        salt = db.execute("SELECT salt FROM names WHERE name = ?", (NAME,)).fetchone()[0]
        details = [
            json.loads(text) for (text,) in db.execute("SELECT detail FROM audit WHERE detail IS NOT NULL")
        ]
    # the salt of the name goes with it, and whatever few values could be tried for has a nonce
    assert all("nonce" in detail for detail in details if detail.keys() != {"kind"})
    assert len({detail["nonce"] for detail in details if "nonce" in detail}) > 2
    assert on_disk(folder, salt) == [salt]
    store.purge(NAME)
    assert on_disk(folder, salt) == []


def test_a_purged_version_leaves_no_byte(store, folder):
    fill(store)
    with pytest.raises(ConflictError, match="production"):
        store.purge(NAME, 2)
    store.purge(NAME, 1)
    assert on_disk(folder, payload(1), NOTE.encode(), b"secret_metric") == []
    assert on_disk(folder, payload(2), payload(3)) == [payload(2), payload(3)]
    entries = store.log(NAME)
    assert [(e.action, e.version, e.redacted) for e in entries] == [
        ("put", 1, True), ("put", 2, False), ("alias", 2, False), ("put", 3, False), ("purge", 1, False),
    ]  # fmt: skip
    assert entries[0].digest is None
    assert store.get(f"{NAME}@production") == record(2)
    assert store.verify().faults == ()


def test_what_others_have_too_stays_and_is_named(store, folder):
    store.put("ada", record(1))
    store.put("bob", record(1))
    purged = store.purge("ada")
    assert (purged.bytes, purged.shared) == (0, ("bob@1",))
    assert store.get("bob") == record(1)
    assert store.purge("bob").bytes == len(encode(record(1)))
    assert on_disk(folder, payload(1)) == []


def test_a_purge_that_was_interrupted_is_finished_by_gc(store, folder):
    fill(store)
    with store.snapshot() as frozen:
        store._backend.timeout = 0.1  # the reader below needs old pages of the index
        store._backend.connection().execute("PRAGMA busy_timeout = 100")
        assert frozen.get(NAME) == record(3)
        with pytest.raises(StoreError, match="gc finishes"):
            store.purge(NAME)
        assert on_disk(folder, payload(1), payload(2), payload(3)) == []
        assert "not overwritten yet" in " ".join(store.verify().faults)
    store.gc()
    assert store.log()[-1].action == "erased" or store.log()[-2].action == "erased"
    assert on_disk(folder, NAME.encode(), NOTE.encode()) == []
    assert store.verify().faults == ()


def test_a_compaction_between_the_two_steps_of_a_purge_overwrites_too(store, folder, tmp_path):
    fill(store)
    for file in (folder / "segments").iterdir():  # what else the freed blocks could be seen through
        (tmp_path / file.name).hardlink_to(file)
    with store._backend.change() as change:
        removal.purge_name(change, "tester", find_name(change, NAME))
    assert store._backend.compact(0.0).segments > 0
    assert on_disk(tmp_path, payload(1), payload(2), payload(3)) == []
    store.gc()
    assert "erased" in [entry.action for entry in store.log(limit=10**6)]
    assert store.verify().faults == ()


def test_gc_gives_space_back_and_keeps_what_lives(store, folder):
    fill(store)
    before = store.stats().disk["segments"]
    for n in range(30):
        store.remove(f"users/{n:04d}", 1)
    done = store.acting("eve").gc(0.0)
    assert done.segments > 0
    assert before - store.stats().disk["segments"] == pytest.approx(done.bytes - done.moved, abs=2000)
    assert store.stats().disk["segments"] < 1.1 * store.stats().kept_bytes
    assert on_disk(folder, payload(100), payload(129)) == []
    for n in range(30):
        assert store.get(f"users/9{n:04d}") == record(n + 200)
    last = store.log()[-1]
    assert (last.action, last.actor) == ("compact", "eve")
    assert store.gc(0.0).segments == 0
    assert store.verify().faults == ()


def test_gc_leaves_what_is_mostly_alive(store):
    fill(store)
    store.remove("users/0003", 1)
    assert store.gc(0.9).segments == 0
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        store.gc(1.5)


def test_gc_keeps_what_is_damaged_and_says_so(store, folder):
    fill(store)
    with contextlib.closing(sqlite3.connect(folder / "index.sqlite")) as db:
        segment, start = db.execute(
            "SELECT segment, start FROM objects JOIN versions ON versions.object = objects.id "
            "JOIN names ON names.id = versions.name WHERE names.name = 'users/0005'"
        ).fetchone()
    file = folder / "segments" / f"{segment:08d}.seg"
    data = bytearray(file.read_bytes())
    data[start + 300] ^= 4
    file.write_bytes(data)
    store.remove("users/0004", 1)
    store.remove("users/0006", 1)
    done = store.gc(0.0)
    assert len(done.faults) == 1
    assert file.exists()
    assert len([fault for fault in store.verify().faults if "damaged" in fault]) == 1
    # whoever puts the same record again makes it whole
    store.put("again", record(105))
    assert store.get("users/0005") == record(105)
    assert store.verify().faults == ()


def test_a_file_that_a_killed_process_left_is_removed(store, folder):
    fill(store)
    stray = folder / "segments" / "00009999.seg"
    stray.write_bytes(b"left behind")
    store.gc()
    assert not stray.exists()


def test_a_backup_is_a_store_of_one_moment(store, tmp_path):
    fill(store)
    store.remove("users/0001", 1)
    size = store.backup(tmp_path / "copy")
    assert size == sum(file.stat().st_size for file in (tmp_path / "copy").rglob("*.s*") if file.is_file())
    store.purge(NAME)
    with Store(tmp_path / "copy") as copy:
        assert copy.verify().faults == ()
        assert copy.get(f"{NAME}@production") == record(2)
        copy.put("ada", record(9))
        assert copy.get("ada") == record(9)
    with pytest.raises(ConfigError, match="exists already"):
        store.backup(tmp_path / "copy")
