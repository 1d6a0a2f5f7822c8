"""Archives: what is exported is imported, the log says where from, and nothing hostile or damaged comes in."""

from __future__ import annotations

import hashlib
import json
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.store.small_records import record

from modicum.errors import ConfigError, CorruptAdapterError
from modicum.store import Filter, Store, carried, export_archive, import_archive
from modicum.store.archive import MAGIC, read_archive
from modicum.store.carried import Carried
from modicum.store.record import encode, peek


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", create=True, actor="ann") as made:
        made.put("ada", record(0), metrics={"acc": 0.5}, tags=["b", "a"], note="erste\nZeile é", seed=-3)
        made.put("team/bob", record(1), parent="ada@1", data_digest="d", alias="production")
        made.put("ada", record(2), parent="team/bob@1", alias="production")
        made.alias("ada@1", "old")
        made.put("copy", record(0))
        yield made


@pytest.fixture
def other(tmp_path):
    with Store(tmp_path / "other", create=True, actor="bea") as made:
        yield made


def said(store):
    """Everything about all versions but who put them when."""
    return {
        str(v): (v.digest, v.aliases, v.tags, v.metrics, v.note, v.parent, v.seed, v.data_digest)
        for v in store.ls()
    }


def test_what_goes_out_comes_in(store, other, tmp_path):
    written = export_archive(store, tmp_path / "a")
    assert (written.versions, written.records, written.bytes) == (4, 3, (tmp_path / "a").stat().st_size)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    found = import_archive(other, tmp_path / "a")
    assert (found.stored, found.known, found.renumbered, found.without_parent) == (4, 0, {}, ())
    assert said(other) == said(store)
    assert all(other.get_bytes(str(v)) == store.get_bytes(str(v)) for v in store.ls())
    entry = other.log("team/bob")[0]
    assert entry.actor == "bea"
    assert "a from " in entry.detail["source"]
    assert "team/bob@1, put by ann" in entry.detail["source"]
    again = import_archive(other, tmp_path / "a")
    assert (again.stored, again.known) == (0, 4)
    assert other.verify().ok


def test_a_subset_and_parents_that_stay_behind(store, other, tmp_path):
    export_archive(store, tmp_path / "a", Filter(name="ada", newest=True))
    found = import_archive(other, tmp_path / "a")
    assert [str(v) for v in other.ls()] == ["ada@2"]  # its number stays
    assert found.without_parent == ("ada@2",)
    with pytest.raises(ConfigError, match="nothing in the store"):
        export_archive(store, tmp_path / "b", "nobody")
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match="exists already"):
        export_archive(store, tmp_path / "a")
    export_archive(store, tmp_path / "a", "team/*", overwrite=True)
    other.put("ada", record(9))
    assert import_archive(other, tmp_path / "a").without_parent == ("team/bob@1",)


def test_a_parent_that_is_here_already_is_found_by_its_digest(store, other, tmp_path):
    other.put("ada", record(0))
    export_archive(store, tmp_path / "a", "team/*")
    assert import_archive(other, tmp_path / "a").without_parent == ()
    assert other.show("team/bob").parent == "ada@1"


def test_taken_numbers_and_aliases(store, other, tmp_path):
    other.put("ada", record(7), alias="production")
    export_archive(store, tmp_path / "a", "ada")
    found = import_archive(other, tmp_path / "a")
    # number 1 is taken, and 2 is free until 1 has become 2
    assert found.renumbered == {"ada@1": "ada@2", "ada@2": "ada@3"}
    assert found.aliases_kept == ("ada@production",)
    assert other.show("ada@production").version == 1
    assert other.show("ada@old").version == 2
    again = import_archive(other, tmp_path / "a", move_aliases=True)
    assert (again.stored, again.known, again.aliases_kept) == (0, 2, ())
    assert other.show("ada@production").version == 3


def test_equal_records_are_told_apart(store, other, tmp_path):
    store.put("copy", record(0), note="second")
    store.put("copy", record(0), note="third")
    export_archive(store, tmp_path / "a", "copy")
    for seed in (7, 0, 8):
        other.put("copy", record(seed))
    # 2 is here under its number; nothing is left for the others
    assert import_archive(other, tmp_path / "a").renumbered == {"copy@1": "copy@4", "copy@3": "copy@5"}
    assert (other.show("copy@2").note, other.show("copy@5").note) == (None, "third")
    assert import_archive(other, tmp_path / "a").stored == 0


def forge(*lines, end=None):
    """An archive of these lines (objects, or bytes as they are) whose last line is right."""
    data = MAGIC + b'{"store":"x"}\n'
    for line in lines:
        data += line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
    versions = [line for line in lines if isinstance(line, dict)]
    digest = hashlib.blake2b(data, digest_size=32).hexdigest()
    records = sum(line.get("here") is True for line in versions)
    last = end or {"versions": len(versions), "records": records, "digest": digest}
    return data + json.dumps(last).encode() + b"\n"


DATA = encode(record(5))
GOOD = {"name": "eve", "version": 1, "digest": peek(DATA).digest, "bytes": len(DATA), "here": True}


def test_a_forged_archive_that_is_right_is_read(other, tmp_path):
    (tmp_path / "a").write_bytes(forge(GOOD, DATA + b"\n", GOOD | {"version": 4, "here": False}))
    import_archive(other, tmp_path / "a")
    assert other.get("eve@4") == other.get("eve@1") == record(5)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../etc/passwd"},
        {"name": "/etc/passwd"},
        {"name": 7},
        {"name": "eve@1"},
        {"version": 0},
        {"version": 1 << 40},
        {"version": True},
        {"version": "1"},
        {"bytes": 1 << 60},
        {"bytes": -1},
        {"bytes": len(DATA) - 8},
        {"bytes": 10**400},
        {"digest": "0" * 64},
        {"digest": "../x"},
        {"aliases": ["latest"]},
        {"aliases": "production"},
        {"aliases": [["x"]]},
        {"tags": [None]},
        {"metrics": {"acc": float("nan")}},
        {"metrics": {"acc": 10**400}},
        {"metrics": {"a b": 1}},
        {"note": "\ud800"},
        {"note": ["x"]},
        {"parent": "a/../b@1"},
        {"parent_digest": "x"},
        {"seed": 1 << 70},
        {"sudo": 1},
        {"here": False},
        {"here": "yes"},
    ],
)
def test_hostile_versions_are_refused(other, tmp_path, change):
    (tmp_path / "a").write_bytes(forge(GOOD | change, DATA + b"\n"))
    with pytest.raises(CorruptAdapterError):
        import_archive(other, tmp_path / "a")
    assert other.stats().entries == 0


@pytest.mark.parametrize(
    "data",
    [
        forge(GOOD, DATA + b"\n", json.dumps(GOOD | {"here": False}).encode() + b"\n"),  # twice
        forge(GOOD | {"digest": peek(encode(record(6))).digest}, DATA + b"\n"),  # another record
        forge(GOOD, DATA[:-8] + bytes(8) + b"\n"),
        forge(GOOD, DATA + b"x"),
        forge(GOOD, DATA + b"\n", end={"versions": 1, "records": 1, "digest": "0" * 64}),
        forge(GOOD, DATA + b"\n") + b"more",
        forge(GOOD, DATA + b"\n", b"[" * 100_000 + b"\n"),
        forge(GOOD, DATA + b"\n", b"x" * (1 << 21) + b"\n"),
        MAGIC,
        MAGIC[:-2] + b"2\n",
    ],
)
def test_hostile_files_are_refused(other, tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CorruptAdapterError, match="get the file again"):
        import_archive(other, tmp_path / "a")
    assert other.stats().entries == 0


def test_other_files_are_no_archives(tmp_path):
    (tmp_path / "a").write_bytes(DATA)
    for path, message in (("a", "no archive of a store"), (".", "put-many"), ("b", "no archive")):
        with pytest.raises(ConfigError, match=message):
            read_archive(tmp_path / path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_a_file_goes_unnoticed(tmp_path, data):
    good = forge(GOOD, DATA + b"\n", GOOD | {"version": 2, "here": False})
    at = data.draw(st.integers(0, len(good) - 1))
    new = data.draw(
        st.one_of(
            st.integers(1, 255).map(lambda flip: good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]),
            st.just(good[:at]),
            st.binary(min_size=1, max_size=9).map(lambda more: good[:at] + more + good[at:]),
        )
    )
    (tmp_path / "fuzz").write_bytes(new)
    if new != good:
        with pytest.raises((CorruptAdapterError, ConfigError)):
            read_archive(tmp_path / "fuzz")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(values=st.dictionaries(st.sampled_from(list(Carried.__dataclass_fields__)), _json), base=st.booleans())
def test_any_values_are_read_or_refused(values, base):
    good = {key: value for key, value in GOOD.items() if key != "here"}
    try:
        one = Carried.read({**good, **values} if base else values)
    except CorruptAdapterError:
        return
    assert Carried.read(json.loads(one.line())) == one


def test_a_batch_that_breaks_off_is_taken_up_again(store, other, tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "_BATCH", 1)
    export_archive(store, tmp_path / "a")

    def stop(done, _):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_archive(other, tmp_path / "a", progress=stop)
    assert 0 < other.stats().versions < 4
    import_archive(other, tmp_path / "a")
    assert said(other) == said(store)
