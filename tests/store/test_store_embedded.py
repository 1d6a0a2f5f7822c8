"""What only the embedded backend is asked: the work of a query, segments, connections."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.store.small_records import record

from modicum.errors import CorruptAdapterError, StoreError
from modicum.store import Filter, Put, Store, reading
from modicum.store.beside import WAITING
from modicum.store.engine import change
from modicum.store.engine.interface import MovedError
from modicum.store.engine.segments import START, Segments, framed


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", create=True) as made:
        yield made


@pytest.mark.parametrize("wanted", [None, "u*", Filter(alias="production"), Filter(newest=True)], ids=str)
def test_a_later_page_of_a_listing_costs_no_more_than_the_first(store, wanted):
    store.put_many([Put(f"u{n:04d}", record(n % 5), alias="production") for n in range(2000)])
    store.purge("u0007")
    steps = [0]

    def count():
        steps[-1] += 1

    store._backend.connection().set_progress_handler(count, 50)
    for n, _ in enumerate(store.iterate(wanted)):
        if n % 256 == 255:
            steps.append(0)
    assert len(steps) == 8
    assert max(steps[:7]) < 1.5 * min(steps[:7])


@pytest.mark.parametrize("version", ["ada", "ada@2", "ada@production"])
def test_one_statement_finds_a_version_and_where_it_is(store, version):
    store.put_many([Put("ada", record(n), alias="production") for n in range(2)])
    asked = []
    store._backend.connection().set_trace_callback(asked.append)
    assert store.get(version).values.tolist() == record(1).values.tolist()
    assert store.find(version) == "ada@2"
    assert [query.split()[0] for query in asked] == ["SELECT", "SELECT"]
    # several are looked for at one moment
    store.find("bob", version)
    assert [query.split()[0] for query in asked[2:]] == ["BEGIN", "SELECT", "SELECT", "ROLLBACK"]


def test_what_is_put_between_two_looks_is_found(store, monkeypatch):
    store.put("ada", record(1))
    monkeypatch.setattr(reading, "find_located", lambda *_: None)
    assert store.get("ada").values.tolist() == record(1).values.tolist()


def test_an_object_that_the_index_does_not_name(store):
    store.put("ada", record(1))
    store._backend.connection().execute("DELETE FROM objects")
    with pytest.raises(CorruptAdapterError, match="the index names no object 1; run verify"):
        store.get("ada")


@pytest.fixture
def segments(tmp_path):
    made = Segments(tmp_path, b"1234")
    assert made.create(1) == START
    return made


def test_objects_follow_each_other_at_multiples_of_eight(segments):
    objects = [b"", b"a", b"b" * 8, b"c" * 1001]
    starts = segments.append(1, START, objects)
    assert starts == [START, *(START + sum(framed(len(o)) for o in objects[:n]) for n in (1, 2, 3))]
    assert all(start % 8 == 0 for start in starts)
    for start, data in zip(starts, objects, strict=True):
        assert segments.get(1).read(start, len(data)) == data
    end = starts[-1] + framed(1001)
    assert list(segments.faults(segments.get(1), 1, end)) == []
    assert segments.path(1).stat().st_size == end
    # what a killed writer left behind the catalogued end is cut off
    segments.append(1, starts[2], [b"new"])
    assert segments.path(1).stat().st_size == starts[2] + framed(3)
    assert segments.get(1).read(starts[2], 3) == b"new"


def test_a_place_that_is_none(segments):
    (start,) = segments.append(1, START, [b"12345"])
    for at, size in ((start + 8, 5), (start, 4), (start, 6), (0, 5)):
        with pytest.raises(CorruptAdapterError, match=r"no object starts there|cut short"):
            segments.get(1).read(at, size)
    with pytest.raises(StoreError, match="cut short"):
        segments.append(1, start + 1000, [b"x"])
    with pytest.raises(MovedError):
        segments.get(2)


def test_an_object_is_read_at_once_and_onto_given_memory(segments):
    data = bytes(range(256)) * 400
    (start, _) = segments.append(1, START, [data, b"next"])
    segment = segments.get(1)
    segment.read(start, len(data))
    before = calls()
    for _ in range(50):
        segment.read(start, len(data))
    assert calls() - before < 60
    room = bytearray(framed(len(data)) + 100)
    read = segment.read(start, len(data), room)
    assert read == data
    room[framed(0)] ^= 1
    assert read != data
    with pytest.raises(TypeError):
        segment.read(start, len(data))[0] = 1
    os.truncate(segments.path(1), start + framed(len(data)) - 8)
    for memory in (room, None):
        with pytest.raises(CorruptAdapterError, match="cut short"):
            segment.read(start, len(data), memory)


def calls():
    """How often this process has asked the system to read."""
    io = Path("/proc/self/io")
    if not io.exists():
        pytest.skip("the system does not count what is read")
    return int(next(line.split()[1] for line in io.read_text().splitlines() if line.startswith("syscr")))


def test_a_large_object_and_a_size_that_no_memory_holds(segments):
    data = b"12345678" * (1 << 18)
    (start,) = segments.append(1, START, [data])
    assert segments.get(1).read(start, len(data)) == data
    for size in (len(data) + 8, 1 << 60):
        with pytest.raises(CorruptAdapterError, match="cut short"):
            segments.get(1).read(start, size)


def test_what_a_slow_disk_is_asked_in_advance_changes_nothing(store, monkeypatch):
    store.put_many([(f"u{n}", record(n)) for n in range(100)])
    names = [f"u{n}" for n in range(99, -1, -3)]
    monkeypatch.setattr(change, "_WAITED", 1e9)
    quick = store.get_many(names)
    opened = len(store._backend._connections._all)
    monkeypatch.setattr(change, "_WAITED", 0.0)
    slow = store.get_many(names)
    assert (slow.versions, slow.values.tolist()) == (quick.versions, quick.values.tolist())
    assert opened == 1
    # those who asked, each with a connection of its own
    assert 1 < len(store._backend._connections._all) <= 1 + WAITING
    # the answers of others are of another moment, and nobody's
    with store.snapshot() as frozen:
        store.put_many([(f"u{n}", record(n + 1)) for n in range(100)])
        assert frozen.get_many(names).values.tolist() == quick.values.tolist()
    store.purge("u99")
    assert store.verify().faults == ()


def test_erasing_touches_its_object_alone(segments):
    starts = segments.append(1, START, [b"first", b"secret" * 1000, b"third"])
    segments.erase(1, [(starts[1], 6000), (starts[1] + 16, 5), (starts[0], 4)])  # two of them are no objects
    assert b"secret" not in segments.path(1).read_bytes()
    assert [segments.get(1).read(starts[n], 5) for n in (0, 2)] == [b"first", b"third"]
    with pytest.raises(MovedError, match="erased"):
        segments.get(1).read(starts[1], 6000)
    segments.erase(1, [(starts[1], 6000)])  # again, after an interruption
    assert list(segments.faults(segments.get(1), 1, starts[2] + framed(5))) == []


def test_a_file_that_was_unlinked_is_let_go(segments):
    segments.append(1, START, [b"data"])
    held = segments.get(1)
    segments.path(1).unlink()  # by another process
    assert held.read(START, 4) == b"data"
    assert held.gone()
    segments.create(2)
    segments.get(2)
    with pytest.raises(MovedError):
        segments.get(1)
    assert held.read(START, 4) == b"data"  # for whoever still holds it


def test_a_change_inside_of_another_is_refused(store):
    store.put("ada", record(0))
    with store._backend.change():
        with pytest.raises(StoreError, match="cannot begin inside"):
            store.put("ada", record(1))
        assert store.get("ada@1") == record(0)
    assert store.put("ada", record(1)).version == 2


def test_nothing_is_locked_after_an_interrupted_change(store):
    def interrupted():
        with store._backend.change() as change:
            change.run("DELETE FROM names")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with Store(store._backend.folder, timeout=0.1) as other:
        assert other.put("ada", record(0)).version == 1


def test_a_busy_store_says_so(store):
    with store._backend.change(), Store(store._backend.folder, timeout=0.1) as other:
        with pytest.raises(StoreError, match=r"is busy.*another process"):
            other.put("ada", record(0))
        assert other.ls() == []  # readers do not wait
