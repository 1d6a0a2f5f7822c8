"""What the backend on PostgreSQL and a bucket has to survive: kills, faults of either half, races, and meddling."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg
import pytest
from tests.store.small_records import record

from modicum.errors import ConfigError, ConflictError, CorruptAdapterError, NotStoredError, StoreError
from modicum.store import Put, Store
from modicum.store.catalogue.publish import prepare, publish
from modicum.store.engine.postgres import Address, connect
from modicum.store.record import encode

ROOT = Path(__file__).resolve().parents[3]
NAME, NOTE = "users/0b6c5a3e-54dd-4c43", "private-note-about-this-user"


@pytest.fixture
def store(postgres):
    with Store(postgres, create=True, actor="tester") as made:
        yield made


@pytest.fixture
def sql(postgres):
    """Statements from outside of any store."""
    with contextlib.closing(connect(Address.parse(postgres), 10.0)) as db:
        yield db.execute


def objects(tmp_path):
    """Every file of the bucket by the seed of its record, or by its name."""
    seeds = {encode(record(seed)): seed for seed in range(60)}
    files = [file for file in (tmp_path / "objects").rglob("*") if file.is_file()]
    return {seeds.get(file.read_bytes(), file.name): file for file in files}


def test_killed_at_any_moment(postgres):
    command = [sys.executable, ROOT / "tests/store/crash_harness.py", postgres, "36", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert sum(found["interrupted"].values()) > 12  # the kills did hit changes
    assert sum(found["acknowledged"].values()) > 36


def test_what_a_killed_writer_left_in_the_bucket_is_collected(store, tmp_path):
    store.put("ada", record(0))
    store._backend.bucket.put({b"\1" * 32: b"left behind"})
    (tmp_path / "objects" / "half.tmp").write_bytes(b"not ours")
    half = next(iter(objects(tmp_path)[0].parent.iterdir())).with_suffix(".tmp")
    half.write_bytes(b"half")
    assert store.verify().faults == ()
    done = store.gc()
    assert (done.segments, done.bytes) == (2, len(b"left behind") + len(b"half"))
    assert set(objects(tmp_path)) == {0, "half.tmp"}  # what lies beside the store's folder is not its own
    assert store.log()[-1].action == "compact"
    assert store.get("ada") == record(0)


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "empty", "another"])
def test_faults_of_objects_are_reported(store, tmp_path, damage):
    store.put_many([(f"u{n}", record(n)) for n in range(5)])
    file, data = objects(tmp_path)[3], bytearray(encode(record(3)))
    data[300] ^= 1
    content = {"flipped": bytes(data), "cut": bytes(data[:-9]), "empty": b"", "another": encode(record(4))}
    file.unlink() if damage == "missing" else file.write_bytes(content[damage])
    faults = store.verify().faults
    assert len(faults) == 1
    assert file.name in faults[0]
    for read in (store.get, store.get_bytes, lambda one: store.get_many(["u1", one])):
        with pytest.raises(CorruptAdapterError):
            read("u3")
    assert store.get("u2") == record(2)
    with pytest.raises(CorruptAdapterError):
        store.backup(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    # whoever puts the same record again makes it whole
    store.put("again", record(3))
    assert store.get("u3") == record(3)
    assert store.verify().faults == ()


def test_a_purged_name_leaves_neither_object_nor_row(store, tmp_path, sql):
    store.put("other", record(2))
    store.put(NAME, record(1), note=NOTE, metrics={"secret_metric": 0.5})
    store.put(NAME, record(2), alias="production")
    store.put(NAME, record(3))
    store.remove(NAME, 3)
    with store.snapshot() as frozen:
        purged = store.purge(NAME)  # goes through, whoever still reads
        with pytest.raises(CorruptAdapterError, match="missing"):
            frozen.get(f"{NAME}@1")
    assert (purged.versions, purged.shared) == (2, ("other@1",))
    assert purged.bytes == sum(len(encode(record(seed))) for seed in (1, 3))
    assert set(objects(tmp_path)) == {2}
    tables = [name for (name,) in sql("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")]
    rows = " ".join(str(sql(f"SELECT t::text FROM {table} t").fetchall()) for table in tables)
    for private in (NAME, NOTE, "secret_metric", encode(record(1))[96:128].hex()):
        assert private not in rows
    assert [entry.action for entry in store.log(after=purged.entry - 1)] == ["purge", "erased"]
    assert store.verify().faults == ()


def test_a_purge_that_was_interrupted_is_finished_by_gc(store, tmp_path, monkeypatch):
    store.put(NAME, record(1))
    with monkeypatch.context() as patch:
        patch.setattr(store._backend, "bucket", None)  # the bucket is out of reach
        with pytest.raises(StoreError):
            store.purge(NAME)
    with pytest.raises(NotStoredError):
        store.get(NAME)
    assert "not removed yet" in " ".join(store.verify().faults)
    store.gc()
    assert objects(tmp_path) == {}
    assert store.log()[-1].action == "erased"
    assert store.verify().faults == ()


def test_a_record_that_is_put_between_the_two_steps_of_a_purge_stays(store, monkeypatch):
    store.put(NAME, record(1))
    with monkeypatch.context() as patch:
        patch.setattr(store._backend, "erase", dict)
        store.purge(NAME)
    store.put("ada", record(1))
    store.gc()
    assert store.get("ada") == record(1)
    assert store.verify().faults == ()


def test_gc_spares_what_a_view_sees_and_nothing_more(store, tmp_path):
    store.put_many([(f"u{n}", record(n)) for n in range(6)])
    store.remove("u0", 1)
    with store.snapshot() as first:
        store.remove("u1", 1)
        with store.snapshot() as second:
            store.remove("u2", 1)
            assert store.gc().segments == 1
            assert set(objects(tmp_path)) == {1, 2, 3, 4, 5}
            assert [first.get(f"u{n}@1") for n in (1, 2)] == [record(1), record(2)]
            assert second.get("u2@1") == record(2)
        assert store.gc().segments == 0
    assert store.gc().segments == 2
    assert set(objects(tmp_path)) == {3, 4, 5}
    store.put("back", record(0))
    assert store.get("back") == record(0)
    assert store.verify().faults == ()


def test_a_dead_object_lives_again_when_it_is_put(store):
    store.put("ada", record(1))
    store.remove("ada", 1)
    store.put("bob", record(1))
    assert store.gc().segments == 0
    assert store.get("bob") == record(1)
    assert store.stats().disk["dead"] == 0


def test_a_backup_is_an_embedded_store_of_one_moment(store, tmp_path):
    store.put_many([(f"u{n}", record(n)) for n in range(5)])
    store.put("ada", record(7), note="hé", metrics={"acc": 0.1}, tags=["x"], alias="production", parent="u1")
    store.put("ada", record(7))
    store.remove("u4", 1)
    store.purge("u3")
    head = store.head()
    size = store.backup(tmp_path / "copy")
    assert size == sum(file.stat().st_size for file in (tmp_path / "copy").rglob("*") if file.is_file())
    with Store(tmp_path / "copy") as copy:
        assert copy.verify(expected=head).faults == ()
        assert copy.ls() == store.ls()
        assert copy.log() == store.log()
        assert copy.get("ada@production") == record(7)
        copy.put("new", record(8))
        assert copy.verify(expected=head).faults == ()
    with pytest.raises(ConfigError, match="exists already"):
        store.backup(tmp_path / "copy")


@pytest.mark.parametrize(
    "meddling",
    [
        "UPDATE audit SET at = at + 1 WHERE seq = 2",
        "UPDATE audit SET detail = replace(detail, '0.5', '0.9') WHERE seq = 1",
        "DELETE FROM audit WHERE seq = 3",
        "UPDATE versions SET object = 3 - object WHERE name = 1",
        "UPDATE versions SET size = size + 1 WHERE name = 2",
        "UPDATE aliases SET version = 2",
        "UPDATE metrics SET value = 0.6",
        "UPDATE objects SET uses = 5 WHERE id = 2",
        "UPDATE objects SET digest = decode(repeat('00', 32), 'hex') WHERE id = 2",
        "UPDATE objects SET size = 3 WHERE id = 2",
        "DELETE FROM objects WHERE id = 2",
        "UPDATE settings SET value = '3' WHERE key = 'entries'",
        "UPDATE settings SET value = 'x' WHERE key = 'entries'",
        "DELETE FROM names WHERE name = 'two'",
    ],
)
def test_meddling_with_rows_is_found(store, sql, meddling):
    store.put("one", record(0), metrics={"acc": 0.5}, alias="production")
    store.put("one", record(1))
    store.put("two", record(0))
    assert store.verify().faults == ()
    assert sql(meddling).rowcount
    assert store.verify().faults


def test_writers_race_for_one_alias(store, postgres):
    for seed in range(4):
        store.put("ada", record(seed))
    store.promote("ada@1")
    won = []

    def race():
        with Store(postgres) as mine:
            for _ in range(15):
                now = mine.show("ada@production").version
                with contextlib.suppress(ConflictError):
                    mine.promote(f"ada@{now % 4 + 1}", expected=now)
                    won.append(now)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    moves = [entry.detail["from"] for entry in store.log("ada") if entry.action == "alias"][1:]
    assert moves == [n % 4 + 1 for n in range(len(won))]
    assert store.verify().faults == ()


def test_readers_during_removals_and_compactions(store, postgres):
    store.put_many([(f"u{n}", record(n)) for n in range(12)])
    stop, errors, reads = threading.Event(), [], []

    def read():
        try:
            with Store(postgres) as mine:
                while not stop.is_set():
                    assert mine.get("u3@1") == record(3)
                    mine.get("moving")
                    with mine.snapshot() as frozen:
                        one = frozen.get("moving")
                        time.sleep(0.01)
                        assert frozen.get("moving") == one
                    reads.append(1)
        except Exception as error:  # noqa: BLE001 - told to the main thread
            errors.append(error)

    store.put("moving", record(20))
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for n in range(40):
        store.put("moving", record(21 + n))
        store.remove("moving", n + 1)
        store.gc()
    stop.set()
    for reader in readers:
        reader.join()
    assert not errors
    assert len(reads) > 4
    assert store.gc().segments <= 40
    assert store.verify().faults == ()


def test_a_busy_store_says_so(store, postgres):
    with store._backend.change(), Store(postgres, timeout=0.2) as other:
        with pytest.raises(StoreError, match="busy"):
            other.put("ada", record(0))
        assert other.ls() == []  # reading waits for nobody


def test_a_connection_that_breaks_in_a_change_keeps_nothing(store, sql):
    store.put("ada", record(0))

    def broken():
        with store._backend.said(), store._backend.change() as change:
            publish(change, "tester", [prepare(Put("bob", record(1)))])
            sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
            time.sleep(0.1)
            publish(change, "tester", [prepare(Put("carl", record(2)))])

    with pytest.raises(StoreError, match="nothing of this change was kept"):
        broken()
    assert store.get("ada") == record(0)  # on a new connection
    assert store.verify().faults == ()


def test_a_bucket_that_cannot_be_written_keeps_nothing(store, postgres, tmp_path):
    store.put("ada", record(0))
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    elsewhere = postgres.replace(f"objects={tmp_path / 'objects'}", f"objects={blocked}/deep")
    with Store(elsewhere) as other:
        with pytest.raises(StoreError, match=re.escape(str(blocked))):
            other.put("bob", record(1))
        with pytest.raises(CorruptAdapterError, match="missing"):
            other.get("ada")
    assert [str(version) for version in store.ls()] == ["ada@1"]
    with pytest.raises(StoreError, match=re.escape(str(blocked))):
        Store(elsewhere.replace("schema=s", "schema=t"), create=True)
    with pytest.raises(StoreError, match="no store in schema"):
        Store(elsewhere.replace("schema=s", "schema=t"))


def test_any_file_system_of_fsspec_will_do(postgres_server):
    address = f"{postgres_server}&schema=memory&objects=memory://bucket/folder"
    with Store(address, create=True) as store:
        store.put_many([Put(f"u{n}", record(n), alias="production") for n in range(5)])
        store.put("u0", record(9))
        store.remove("u0", 2)
        assert store.gc().segments == 1
        assert store.verify().faults == ()
    with Store(f"{postgres_server}&schema=memory") as store:  # it knows where its objects are
        assert store.get("u3@production") == record(3)
        store.purge("u3")
        assert store.verify().faults == ()
        assert len(store._backend.bucket.listed()) == 4


def test_stores_share_a_database_and_a_bucket(store, postgres, tmp_path):
    store.put("ada", record(0))
    with Store(postgres.replace("schema=s", "schema=z"), create=True) as other:
        other.put("ada", record(0))
        other.put("ada", record(1))
        other.remove("ada", 1)
        assert other.gc().segments == 1
        assert store.get("ada") == record(0)
        assert store.gc().segments == 0
        assert other.get("ada") == record(1)


def test_many_make_one_store_at_once(postgres):
    made, threads = [], []
    for n in range(4):

        def make(n=n):
            with Store(postgres, create=True) as store:
                store.put(f"u{n}", record(n))
                made.append(n)

        threads.append(threading.Thread(target=make))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Store(postgres) as store:
        assert sorted(made) == [0, 1, 2, 3]
        assert len(store.ls()) == 4
        assert store.verify().faults == ()


def test_a_newer_format_is_refused(store, postgres, sql):
    sql("UPDATE settings SET value = '2' WHERE key = 'format'")
    with pytest.raises(StoreError, match=r"format 2.*upgrade modicum"):
        Store(postgres)


def test_text_that_the_database_cannot_hold_is_refused(store):
    with pytest.raises(StoreError, match="nothing of this change was kept"):
        store.put("ada", record(0), note="a\0b")
    assert store.ls() == []
    assert store.put("ada", record(0)).version == 1


def test_addresses_say_everything_but_the_password():
    address = Address.parse(
        "postgres://ada:se%40cret@db.example:5433/adapters?objects=s3://bucket/some%20folder"
        "&schema=team&sslmode=require&password=x+y"
    )
    assert address.objects == "s3://bucket/some folder"
    assert address.schema == "team"
    assert "cret" not in address.shown
    assert "password" not in address.shown
    assert address.shown.startswith("postgresql://ada@db.example:5433/adapters?objects=s3://bucket/some")
    parts = psycopg.conninfo.conninfo_to_dict(address.connection)
    assert (parts["user"], parts["password"], parts["host"]) == ("ada", "x+y", "db.example")
    assert (parts["port"], parts["dbname"], parts["sslmode"]) == ("5433", "adapters", "require")
    assert not {"objects", "schema"} & set(parts)
    assert Address.parse("postgresql:///db?objects=rel").objects == str(Path("rel").absolute())
    assert (Address.parse("postgresql:///db").objects, Address.parse("postgresql:///db").schema) == (
        None,
        "modicum",
    )
    with pytest.raises(ConfigError, match="no address"):
        Address.parse("postgresql://[half/db")


def test_no_server_and_no_place_for_objects(postgres_server, tmp_path):
    with pytest.raises(StoreError, match="cannot be reached"):
        Store(f"postgresql://modicum:secret@/x?host={tmp_path}")
    with pytest.raises(ConfigError, match=r"no \*"):
        Store(f"{postgres_server}&schema=nowhere&objects={tmp_path}/[x]", create=True)
    with pytest.raises(ConfigError, match=r"add \?objects="):
        Store(f"{postgres_server}&schema=nowhere", create=True)
    with pytest.raises(StoreError, match="no store in schema 'nowhere'"):
        Store(f"{postgres_server}&schema=nowhere")


def test_without_the_extra_its_name_is_said():
    code = (
        "import sys; sys.modules['psycopg'] = None\nfrom modicum.store import Store\nStore('postgresql:///x')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "modicum[postgres]" in done.stderr


@pytest.mark.usefixtures("open_umask")
def test_only_the_owner_may_read_objects(store, tmp_path):
    store.put("ada", record(0))
    assert set(objects(tmp_path)) == {0}
    for path in (tmp_path / "objects").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_the_command_line_and_an_archive_move_a_store_here(store, postgres, tmp_path, capsys):
    from modicum.cli import main

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main(["store", *map(str, words)])
        assert ended.value.code == 0
        return json.loads(capsys.readouterr().out)

    with Store(tmp_path / "small", create=True) as old:
        old.put_many([Put(f"u{n}", record(n), tags=["x"], metrics={"acc": n}) for n in range(5)])
        old.put("u0", record(9), parent="u0", alias="production")
    run("export", tmp_path / "all.archive", "--store", tmp_path / "small", "--json")
    run("import", tmp_path / "all.archive", "--store", postgres, "--json")
    assert run("verify", "--store", postgres, "--json")["faults"] == []
    assert {one["name"] for one in run("ls", "--store", postgres, "--json")["versions"]} == {
        f"u{n}" for n in range(5)
    }
    assert store.get("u0@production") == record(9)
    assert store.show("u0@production").parent == "u0@1"
    run("get", "u3", "--output", tmp_path / "u3.modicum", "--store", postgres, "--json")
    assert (tmp_path / "u3.modicum").read_bytes() == encode(record(3))
    said = run("init", "--store", postgres.replace("modicum@", "modicum:secret@"), "--json")
    assert "secret" not in json.dumps(said)
