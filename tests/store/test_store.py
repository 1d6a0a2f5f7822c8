"""The adapter store as its users see it: versions, aliases, labels, bulk, listing."""

from __future__ import annotations

import stat
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.store.small_records import record

from modicum.errors import ConfigError, ConflictError, CorruptAdapterError, NotStoredError, StoreError
from modicum.store import Filter, Put, Store
from modicum.store.record import encode, peek


@pytest.fixture
def store(location):
    with Store(location, create=True, actor="tester", segment_bytes=8000) as made:
        yield made


def test_what_is_put_is_got(store):
    for seed in range(3):
        version = store.put("ada", record(seed))
        assert (version.name, version.version, str(version)) == ("ada", seed + 1, f"ada@{seed + 1}")
        assert version.digest == peek(encode(record(seed))).digest
    assert store.get("ada") == store.get("ada@latest") == store.get("ada@3") == record(2)
    assert store.get("ada@1") == record(0)
    assert store.get_bytes("ada@2") == encode(record(1))
    assert store.put("ada", encode(record(9))).version == 4
    assert store.verify().faults == ()


def test_everything_said_about_a_version_is_kept(store):
    store.put("parent", record(0))
    said = {"metrics": {"acc": 0.25, "f1": 1}, "tags": ["night", "best"], "note": "from the night run"}
    before = datetime.now(UTC)
    store.put("ada", record(1), parent="parent@latest", data_digest="d1", seed=7, alias="canary", **said)
    version = store.show("ada@canary")
    assert (version.parent, version.data_digest, version.seed) == ("parent@1", "d1", 7)
    assert (version.metrics, version.tags) == ({"acc": 0.25, "f1": 1.0}, ("best", "night"))
    assert (version.note, version.aliases, version.actor) == ("from the night run", ("canary",), "tester")
    assert (version.method, version.dtype, version.base_fingerprint) == ("lora_xs", "bfloat16", "5f" * 16)
    assert version.basis_fingerprint == [0.5] * 16
    assert timedelta(0) <= version.created - before < timedelta(seconds=60)
    store.measure("ada", {"acc": 0.5})
    store.tag("ada@1", "checked", "best")
    store.untag("ada@1", "night")
    store.note("ada", None)
    version = store.show("ada")
    assert (version.metrics, version.tags, version.note) == (
        {"acc": 0.5, "f1": 1.0},
        ("best", "checked"),
        None,
    )
    with pytest.raises(NotStoredError, match="no tag night"):
        store.untag("ada", "night")
    assert store.verify().faults == ()


def test_equal_records_are_stored_once(store):
    store.put_many([(f"user{n}", record(n % 3)) for n in range(30)])
    found = store.stats()
    assert (found.names, found.versions, found.objects) == (30, 30, 3)
    assert found.record_bytes == 10 * found.kept_bytes
    store.remove("user0", 1)
    assert store.get("user3") == record(0)  # the same record under another name


def test_what_a_store_holds_is_counted(store, location):
    large, small = (len(encode(record(0, r=r))) for r in (8, 4))
    store.put_many([("bob", record(1)), *(("ada", record(n, r=4)) for n in range(3)), ("carl", record(1))])
    found = store.stats()
    assert found.largest == (("ada", 3, 3 * small), ("bob", 1, large), ("carl", 1, large))
    assert store.stats(largest=2).largest == found.largest[:2]
    assert found.kinds == (("lora_xs", "bfloat16", "5f" * 16, 5, 3 * small + 2 * large),)
    assert (found.record_bytes, found.kept_bytes) == (3 * small + 2 * large, 3 * small + large)
    if isinstance(location, Path):
        assert found.disk == {
            "segments": sum(file.stat().st_size for file in location.glob("segments/*")),
            "index": (location / "index.sqlite").stat().st_size,
            "log": (location / "index.sqlite-wal").stat().st_size,
        }
        assert min(found.disk.values()) > 0
    else:
        assert (found.disk["objects"], found.disk["dead"]) == (found.kept_bytes, 0)
        store.remove("bob", 1)
        store.remove("carl", 1)
        assert (store.stats().disk["objects"], store.stats().disk["dead"]) == (3 * small, large)


def test_an_alias_moves_and_goes_back_step_by_step(store):
    for seed in range(3):
        store.put("ada", record(seed))
    store.promote("ada@1")
    store.promote("ada@2")
    store.promote("ada@3", "canary")
    store.promote("ada@canary")
    assert store.get("ada@production") == record(2)
    assert [store.rollback("ada"), store.rollback("ada")] == [2, 1]
    assert store.get("ada@production") == record(0)
    with pytest.raises(NotStoredError, match="no earlier version"):
        store.rollback("ada")
    store.promote("ada@3")
    store.promote("ada@3")  # changes nothing, and is no step
    assert store.rollback("ada") == 1
    store.unalias("ada", "production")
    with pytest.raises(NotStoredError, match=r"no alias 'productoin'.*it has canary"):
        store.get("ada@productoin")
    assert store.verify().faults == ()


def test_an_alias_moves_only_from_where_it_is_expected(store):
    store.put("ada", record(0))
    store.put("ada", record(1))
    store.alias("ada@1", "production", expected=None)
    for wrong in (None, 2):
        with pytest.raises(ConflictError, match="points at version 1"):
            store.alias("ada@2", "production", expected=wrong)
    store.alias("ada@2", "production", expected=1)
    with pytest.raises(ConflictError, match="not at 1"):
        store.rollback("ada", expected=1)
    assert store.show("ada@production").version == 2


def test_numbers_of_versions_are_never_used_again(store):
    for seed in range(3):
        store.put("ada", record(seed))
    store.remove("ada", 3)
    assert store.show("ada").version == 2
    assert store.put("ada", record(5)).version == 4
    with pytest.raises(NotStoredError, match="no version 3; its newest: 4, 2, 1"):
        store.get("ada@3")
    store.promote("ada@2")
    store.promote("ada@4")
    with pytest.raises(ConflictError, match="production"):
        store.remove("ada", 4)
    store.remove("ada", 2)
    with pytest.raises(NotStoredError, match="no earlier version"):
        store.rollback("ada")  # the one it would go back to was removed
    assert store.verify().faults == ()


def test_many_records_become_one_block(store):
    store.put_many([(f"user{n:02d}", record(n)) for n in range(20)])
    wanted = [f"user{n:02d}" for n in (7, 3, 19, 3)]
    stack = store.get_many(wanted)
    assert stack.versions == ("user07@1", "user03@1", "user19@1", "user03@1")
    assert stack.tensor().shape == (4, 4 * 64)
    assert stack.tensor().dtype == torch.bfloat16
    for row, seed in zip(stack.tensor().float().numpy(), (7, 3, 19, 3), strict=True):
        assert np.array_equal(row, record(seed).floats())
    store.put("other", record(0, r=4))
    with pytest.raises(ConfigError, match=r"different are other@1 \(lora_xs"):
        store.get_many(["user01", "other"])
    assert store.get_many(["other"]).values.shape == (1, 64)


def test_a_batch_is_kept_as_a_whole_or_not_at_all(store, location):
    safe = []
    items = [Put(f"user{n}", record(n)) for n in range(7)] + [Put("user7", record(7), parent="nobody")]
    with pytest.raises(NotStoredError, match="'nobody'"):
        store.put_many(items, batch=3, progress=safe.append)
    assert safe == [3, 6]
    # what was written for the batch that was refused is gone from the disk too, from a bucket with the next gc
    if isinstance(location, Path):
        segments = store._backend.connection().execute("SELECT id, size FROM segments")
        assert dict(segments) == {
            n: store._backend.segments.path(n).stat().st_size for n in store._backend.segments.numbers()
        }
    else:
        assert store.gc().segments == 2
        assert len(store._backend.bucket.listed()) == 6
    assert [v.name for v in store.ls()] == [f"user{n}" for n in range(6)]
    assert store.put_many(iter([Put("user0", record(1)), Put("user0", record(2))])) == [2, 3]
    assert store.verify().faults == ()


def test_a_parent_may_be_in_the_same_batch(store):
    store.put_many(
        [Put("ada", record(0)), Put("ada", record(1), parent="ada"), Put("bob", record(2), parent="ada@1")]
    )
    assert [store.show(one).parent for one in ("ada@1", "ada@2", "bob")] == [None, "ada@1", "ada@1"]
    with pytest.raises(NotStoredError):
        store.put("carl", record(3), parent="carl")  # not its own
    assert store.verify().faults == ()


@pytest.mark.parametrize(
    "about", [{"note": "\ud800"}, {"data_digest": "\udfff"}, {"seed": "7"}, {"note": 3}, {"seed": True}]
)
def test_what_cannot_be_stored_is_refused_by_name(store, about):
    with pytest.raises(ConfigError, match=next(iter(about))):
        store.put("ada", record(), **about)
    assert store.stats().entries == 0
    store.put("ada", record())
    with pytest.raises(ConfigError, match="note"):
        store.note("ada", "\ud800")
    assert store.stats().entries == 1


def test_numbers_beyond_all_versions(store):
    store.put("ada", record())
    for call in (
        lambda: store.remove("ada", 10**30),
        lambda: store.get("ada@0"),
        lambda: store.purge("ada", -1),
    ):
        with pytest.raises(NotStoredError):
            call()
    with pytest.raises(ConfigError):
        store.get("ada@" + "9" * 30)


def test_a_record_whose_words_are_none(store):
    for about in ({"task_type": 3}, {"base_fingerprint": ["a"]}, {"task_type": "\ud800"}):
        with pytest.raises(CorruptAdapterError, match="should have a word"):
            store.put("ada", record(**about))
        with pytest.raises(CorruptAdapterError):
            store.put("ada", encode(record(**about)))


def test_a_stream_of_all_records(store):
    store.put_many([(f"user{n:03d}", record(n)) for n in range(300)])
    seen = dict(store.iterate("user*"))
    assert list(seen) == [f"user{n:03d}@1" for n in range(300)]
    assert seen["user271@1"] == record(271)
    assert len(list(store.iterate("user1*"))) == 100


def test_listing_by_every_condition(store):
    store.put("team/a", record(0), metrics={"acc": 0.5}, tags=["x"], alias="production")
    store.put("team/a", record(1), metrics={"acc": 0.9})
    middle = store.put("team/b", record(2), metrics={"acc": 0.7}, tags=["x"]).created
    store.put("solo", record(3, base_fingerprint="00" * 16))

    def names(wanted):
        return [str(version) for version in store.ls(wanted)]

    assert names(None) == ["solo@1", "team/a@1", "team/a@2", "team/b@1"]
    assert names("team/*") == ["team/a@1", "team/a@2", "team/b@1"]
    assert names("*/b") == ["team/b@1"]
    assert names("team/a") == ["team/a@1", "team/a@2"]
    assert names(Filter(tag="x")) == ["team/a@1", "team/b@1"]
    assert names(Filter(alias="production")) == ["team/a@1"]
    assert names(Filter(base_fingerprint="00" * 16)) == ["solo@1"]
    assert names(Filter(method="lora_xs", name="s*")) == ["solo@1"]
    assert names(Filter(newest=True)) == ["solo@1", "team/a@2", "team/b@1"]
    assert names(Filter(metrics={"acc": (0.6, None)})) == ["team/a@2", "team/b@1"]
    assert names(Filter(metrics={"acc": (None, 0.8)}, tag="x", newest=True)) == ["team/b@1"]
    assert names(Filter(since=middle)) == ["solo@1", "team/b@1"]
    assert names(Filter(before=middle)) == ["team/a@1", "team/a@2"]
    assert [str(v) for v in store.ls(limit=2)] == ["solo@1", "team/a@1"]
    with pytest.raises(ConfigError, match=r"acc from 2 to 1.*no time zone"):
        store.ls(Filter(metrics={"acc": (2, 1)}, since=datetime(2026, 1, 1)))  # noqa: DTZ001


def test_pages_of_a_listing_miss_nothing(store):
    store.put_many([(f"u{n:04d}", record(n % 5)) for n in range(600)])
    store.put_many([(f"u{n:04d}", record(n % 3)) for n in range(0, 600, 2)])
    assert len(store.ls()) == 900
    assert len(store.ls("u*1")) == 60


@pytest.mark.parametrize("location", ["embedded"], indirect=True)  # SQLite counts steps, PostgreSQL none
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../b",
        "/a",
        "a/",
        "a//b",
        "a@b",
        "a\0",
        "a\n",
        "a b",
        "ä",
        "-x",
        "x" * 201,
        "a/.b",
    ],
)
def test_names_that_could_be_something_else(store, name):
    with pytest.raises(ConfigError, match="no name for an adapter"):
        store.put(name, record())
    assert store.stats().entries == 0


def test_aliases_and_tags_that_could_be_something_else(store):
    store.put("ada", record())
    for alias in ("3", "latest", "a/b", "", "x" * 65):
        with pytest.raises(ConfigError):
            store.alias("ada@1", alias)
    with pytest.raises(ConfigError, match="a tag"):
        store.tag("ada", "a b")
    with pytest.raises(ConfigError, match="finite numbers, not acc = nan"):
        store.measure("ada", {"acc": float("nan")})
    assert store.stats().entries == 1


def test_errors_name_the_nearest(store):
    store.put("users/ada", record())
    with pytest.raises(NotStoredError, match="did you mean 'users/ada'"):
        store.get("users/adda")
    with pytest.raises(NotStoredError, match="no version 4"):
        store.show("users/ada@4")
    with pytest.raises(CorruptAdapterError, match="no modicum record"):
        store.put("bob", b"rubbish")
    with pytest.raises(ConfigError, match="no adapters to stack"):
        store.get_many([])


def test_there_is_no_store_where_none_was_made(tmp_path):
    with pytest.raises(StoreError, match="create=True"):
        Store(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="neither empty nor a store"):
        Store(tmp_path / "full", create=True)
    assert [file.name for file in tmp_path.rglob("*")] == ["full", "thesis.txt"]
    (tmp_path / "empty").mkdir()
    Store(tmp_path / "empty", create=True).close()
    Store(tmp_path / "empty", create=True).close()  # leaves an existing one alone


@pytest.mark.usefixtures("open_umask")
def test_only_the_owner_may_read(tmp_path):
    def check(*names):
        paths = list(tmp_path.rglob("*"))
        assert {path.name for path in paths} >= set(names)
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path

    with Store(tmp_path / "store", create=True) as store:
        store.put("ada", record())
        store.put("bob", record(1))
        check("index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "00000001.seg")
        store.remove("bob", 1)
        assert store.gc(0.0).segments == 1
        store.backup(tmp_path / "copy")
        check("copy", "maintenance.lock", "00000002.seg")
    check("store", "copy")


def test_threads_share_a_store(store):
    errors = []

    def work(number):
        try:
            for n in range(10):
                store.put(f"thread{number}", record(number * 10 + n))
                assert store.get(f"thread{number}") == record(number * 10 + n)
        except Exception as error:  # noqa: BLE001 - told to the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert store.stats().versions == 40
    assert store.verify().faults == ()


def test_a_snapshot_stays_as_it_was(store, location):
    store.put_many([(f"u{n}", record(n)) for n in range(20)])
    store.promote("u0@1")
    with store.snapshot() as frozen:
        store.put("u0", record(50), alias="production")
        for n in range(1, 20):
            store.remove(f"u{n}", 1)
        # of segments the view holds open what is unlinked, objects are spared for it
        assert bool(store.gc(0.0).segments) == isinstance(location, Path)
        assert frozen.get("u0@production") == record(0)
        assert [r == record(int(ref[1:].split("@")[0])) for ref, r in frozen.iterate()] == [True] * 20
    assert len(store.ls()) == 2


def test_a_closed_store_says_so(store):
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.ls()


def test_a_forked_child_has_connections_of_its_own(store, location):
    # in a process of its own: pytest's workers have threads, which must not be forked
    code = f"""
import os
from modicum.store import Store
from tests.store.small_records import record
store = Store({str(location)!r})
store.put("ada", record(0))
parents = store._backend.connection()
child = os.fork()
if not child:
    assert store._backend.connection() is not parents
    store.put("child", record(1))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
store.put("ada", record(2))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path.cwd())
    assert [str(v) for v in store.ls()] == ["ada@1", "ada@2", "child@1"]
    assert store.verify().faults == ()


def test_the_store_needs_no_torch(tmp_path):
    code = (
        "import sys; from modicum.store import Store; from tests.store.small_records import record\n"
        f"s = Store({str(tmp_path / 's')!r}, create=True); s.put('a', record()); s.get('a'); s.verify()\n"
        "print([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    assert done.stdout.strip() == "[]"
