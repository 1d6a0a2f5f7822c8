"""What a store has to survive: kills, full disks, damage, races, and readers in the middle of it all."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.store.small_records import record

from modicum.errors import CorruptAdapterError, ModicumError, StoreError
from modicum.store import Store

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture
def python():
    """Starts a program in a process of its own, which does not outlive the test."""
    with contextlib.ExitStack() as stack:

        def start(code, *arguments):
            command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            process = stack.enter_context(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
            stack.callback(process.kill)
            return process

        yield start


def finished(process):
    # not communicate(): what readline() has read ahead would be lost
    assert process.wait(timeout=120) == 0, process.stderr.read()
    return process.stdout.read()


@pytest.mark.parametrize(
    ("rounds", "seed", "kinds"),
    [(40, 1, {"put"}), pytest.param(400, 2, {"put", "alias", "gc"}, marks=pytest.mark.slow)],
    ids=["some", "hundreds"],
)
def test_killed_at_any_moment(tmp_path, rounds, seed, kinds):
    command = [sys.executable, HERE / "crash_harness.py", tmp_path / "store", str(rounds), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert sum(found["interrupted"].values()) > rounds / 3  # the kills did hit changes
    assert found["interrupted"].keys() >= kinds
    assert sum(found["acknowledged"].values()) > rounds


@pytest.mark.parametrize(
    ("changes", "cuts", "seed"),
    [(20, 60, 1), pytest.param(60, 500, 2, marks=pytest.mark.slow)],
    ids=["some", "hundreds"],
)
def test_the_power_goes_off_at_any_moment(tmp_path, changes, cuts, seed):
    strace = shutil.which("strace")
    if strace is None or subprocess.run([strace, "-o", tmp_path / "none", "true"], check=False).returncode:
        pytest.skip("needs strace, to see what was written and what was flushed")
    command = [sys.executable, HERE / "power_cut.py", tmp_path / "store", str(changes), str(cuts), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["cuts"] == cuts


_FILL = """
    import sys
    from modicum.errors import StoreError
    from modicum.store import Store
    from tests.store.small_records import record
    {before}
    store, safe = Store(sys.argv[1], timeout=5), []
    try:
        for n in range(100000):
            store.put_many([(f"u{{n}}-{{k}}", record(10 * n + k)) for k in range(10)])
            safe.append(n)
    except StoreError as error:
        print(len(safe), error)
"""


def check_full(said, folder):
    safe, message = int(said.split()[0]), said
    assert safe > 0
    assert "nothing of this change was kept" in message
    with Store(folder) as store:
        assert [v.name for v in store.ls()] == sorted(f"u{n}-{k}" for n in range(safe) for k in range(10))
        assert store.get(f"u{safe - 1}-9") == record(10 * (safe - 1) + 9)
        assert store.verify().faults == ()


def test_an_index_that_cannot_grow(tmp_path):
    with Store(tmp_path / "store", create=True) as store:
        store.put("ada", record(0))
        db = store._backend.connection()
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        db.execute(f"PRAGMA max_page_count = {pages}").fetchall()
        safe = []
        with pytest.raises(StoreError, match="no room"):
            store.put_many([(f"u{n}", record(n)) for n in range(500)], batch=10, progress=safe.append)
        assert not db.in_transaction
        assert store.stats().names == 1 + max(safe, default=0)
        db.execute("PRAGMA max_page_count = 100000").fetchall()
        store.put_many([(f"v{n}", record(n)) for n in range(100)])
        assert store.get("v99") == record(99)
        assert store.verify().faults == ()


def test_a_limit_on_file_sizes(python, tmp_path):
    Store(tmp_path / "store", create=True).close()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))"
    said = finished(python(_FILL.format(before=limit), tmp_path / "store"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    check_full(said, tmp_path / "store")
    with Store(tmp_path / "store") as store:  # and it goes on where there is room again
        store.put("after", record(1))
        assert store.verify().faults == ()


def test_a_full_disk(python, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        Store(disk / "store", create=True, segment_bytes=100_000).close()
        check_full(finished(python(_FILL.format(before=""), disk / "store")), disk / "store")
        with Store(disk / "store") as store:
            with pytest.raises(StoreError, match="no room"):
                store.put_many([(f"more{n}", record(10**6 + n)) for n in range(100)])
            assert store.verify().faults == ()
            subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
            store.purge("u0-0")
            assert store.verify().faults == ()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled") / "store"
    with Store(folder, create=True, segment_bytes=8000) as store:
        store.put_many([(f"u{n}", record(n)) for n in range(20)])
        store.put("u0", record(50), tags=["x"], note="n", metrics={"acc": 1}, alias="production")
        store.remove("u1", 1)
        assert store.verify().faults == ()
    assert not (folder / "index.sqlite-wal").exists()
    return folder


def copied(filled, to):
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(filled, to)
    return to


#: what is in `filled`
RECORDS = {f"u{n}@1": record(n) for n in range(20) if n != 1} | {"u0@2": record(50)}


def dead_bytes(folder):
    """File offsets that belong to no version: what was removed."""
    with Store(folder) as store:
        rows = store._backend.connection().execute("SELECT segment, start, size FROM dead").fetchall()
    return {(segment, start + 16 + k) for segment, start, size in rows for k in range(size)}


def lying_at(folder, segment, first, end):
    """The versions with a frame or a record between these offsets of a segment."""
    query = (
        "SELECT n.name || '@' || v.version FROM versions v JOIN names n ON n.id = v.name "
        "JOIN objects o ON o.id = v.object WHERE o.segment = ? AND o.start < ? AND o.start + 16 + o.size > ?"
    )
    with Store(folder) as store:
        return {found for (found,) in store._backend.connection().execute(query, (segment, end, first))}


def check_versions(store, damaged=()):
    """Returns if all versions are there and identical, but for the damaged ones, which are refused."""
    assert {str(version) for version in store.ls()} == RECORDS.keys()
    for version, wanted in RECORDS.items():
        if version in damaged:
            with pytest.raises(CorruptAdapterError):
                store.get(version)
        else:
            assert store.get(version) == wanted


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_of_the_payload_is_found(filled, tmp_path, data):
    folder = copied(filled, tmp_path / "store")
    file = data.draw(st.sampled_from(sorted((folder / "segments").iterdir())))
    content = bytearray(file.read_bytes())
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[at] ^= 1 << bit
    file.write_bytes(content)
    belongs_to_nobody = (int(file.stem), at) in dead_bytes(folder)
    damaged = lying_at(folder, int(file.stem), at, at + 1)
    with Store(folder) as store:
        assert bool(store.verify().faults) != belongs_to_nobody
        check_versions(store, damaged)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_of_the_index_is_found_or_changes_nothing(filled, tmp_path, data):
    folder = copied(filled, tmp_path / "store")
    content = bytearray((folder / "index.sqlite").read_bytes())
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[at] ^= 1 << bit
    (folder / "index.sqlite").write_bytes(content)
    try:
        with Store(folder) as store:
            if not store.verify().faults:  # free space of a page, or a setting that has no say any more
                assert {str(v): v for v in store.ls()} == truth(filled)
                check_versions(store)
    except ModicumError:
        pass  # refused


def cut_index(folder, cut):
    """Returns when the index has lost `cut` bytes at its end, or that share of them."""
    file = folder / "index.sqlite"
    size = file.stat().st_size
    os.truncate(file, size - (cut if isinstance(cut, int) else int(cut * size)))


@pytest.mark.parametrize("cut", [4096, 0.25, 0.5, 0.9])
def test_an_index_without_its_last_pages_is_refused(filled, tmp_path, cut):
    folder = copied(filled, tmp_path / "store")
    cut_index(folder, cut)
    with pytest.raises(StoreError, match="damaged index"):
        Store(folder)


@pytest.mark.parametrize("cut", [1, 40, 400, 4000])
def test_an_index_without_its_last_bytes(filled, tmp_path, cut):
    folder = copied(filled, tmp_path / "store")
    cut_index(folder, cut)
    with Store(folder) as store:
        assert store.verify().faults
        check_versions(store)  # the last page is of the log's


_truth = {}


def truth(filled):
    if not _truth:
        with Store(filled) as store:
            _truth.update({str(version): version for version in store.ls()})
    return _truth


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_segment(filled, tmp_path, cut):
    folder = copied(filled, tmp_path / "store")
    file = max((folder / "segments").iterdir())
    size = file.stat().st_size
    damaged = lying_at(folder, int(file.stem), max(0, size - cut), size)
    assert "u0@2" in damaged  # the last that was put
    assert "u0@1" not in damaged  # lies in another file
    os.truncate(file, max(0, size - cut))
    with Store(folder) as store:
        assert any("cut short" in fault for fault in store.verify().faults)
        check_versions(store, damaged)
        with pytest.raises(CorruptAdapterError, match="cut short"):
            store.get("u0@2")
        with pytest.raises(StoreError, match="cut short"):
            store.put("new", record(99))
        assert "new" not in {version.name for version in store.ls()}


def test_places_that_were_swapped(filled, tmp_path):
    folder = copied(filled, tmp_path / "store")
    with Store(folder) as store:
        db = store._backend.connection()
        places = db.execute(
            "SELECT segment, start, id FROM objects WHERE id IN (4, 5) ORDER BY id"
        ).fetchall()
        for (segment, start, _), (*_, other) in zip(places, reversed(places), strict=True):
            db.execute("UPDATE objects SET segment = ?, start = ? WHERE id = ?", (segment, start, other))
        with pytest.raises(CorruptAdapterError, match="another record"):
            store.get("u3")
        for beside in (["u3", "u10"], ["u10", "u3"], ["u10", "u11", "u4"]):
            with pytest.raises(CorruptAdapterError, match=r"u[34]@1: .*another record"):
                store.get_many(beside)
        assert len(store.verify().faults) >= 2


def test_a_missing_segment(filled, tmp_path):
    folder = copied(filled, tmp_path / "store")
    (folder / "segments" / "00000001.seg").unlink()
    with Store(folder) as store:
        assert any("cannot be read" in fault for fault in store.verify().faults)
        with pytest.raises(StoreError, match="verify"):
            store.get("u2")


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100], ids=["empty", "rubbish"])
def test_an_index_that_is_none(filled, tmp_path, content):
    folder = copied(filled, tmp_path / "store")
    (folder / "index.sqlite").write_bytes(content)
    with pytest.raises(StoreError, match="store"):
        Store(folder)


def test_a_newer_format_is_refused(filled, tmp_path):
    folder = copied(filled, tmp_path / "store")
    with Store(folder) as store:
        store._backend.connection().execute("UPDATE settings SET value = 2 WHERE key = 'format'")
    with pytest.raises(StoreError, match=r"format 2.*upgrade modicum"):
        Store(folder)


def test_writers_race_for_one_alias(python, tmp_path):
    with Store(tmp_path / "store", create=True) as store:
        for seed in range(8):
            store.put("ada", record(seed))
        store.promote("ada@1")
    code = """
        import sys
        from modicum.errors import ConflictError
        from modicum.store import Store
        store, won = Store(sys.argv[1], actor=sys.argv[2]), 0
        print("ready", flush=True)
        sys.stdin.readline()
        for n in range(30):
            now = store.show("ada@production").version
            try:
                store.promote(f"ada@{now % 8 + 1}", expected=now)
                won += 1
            except ConflictError:
                pass
        print(won)
    """
    racers = [python(code, tmp_path / "store", f"racer{n}") for n in range(4)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = sum(int(finished(racer)) for racer in racers)
    with Store(tmp_path / "store") as store:
        moves = [entry for entry in store.log("ada") if entry.action == "alias"][1:]
        # every move that was acknowledged started from where the one before had ended
        assert len(moves) == won
        assert [move.detail["from"] for move in moves] == [n % 8 + 1 for n in range(won)]
        assert store.show("ada@production").version == won % 8 + 1
        assert store.verify().faults == ()


def test_writers_and_readers_during_compactions(python, tmp_path):
    with Store(tmp_path / "store", create=True, segment_bytes=6000) as store:
        store.put_many([(f"u{n}", record(n)) for n in range(60)])
    reading = """
        import sys
        from modicum.store import Store, stack
        from modicum.store.engine import change
        from tests.store.small_records import record
        if sys.argv[2] == "1":  # as if the disk were slow and the records large: all threads take part
            change._WAITED, stack._MANY = 0.0, 0
        store, expected, reads = Store(sys.argv[1]), {n: record(n) for n in range(60)}, 0
        print("ready", flush=True)
        while not (reads > 100 and store.ls("end")):
            for n in range(0, 60, 7):
                assert store.get(f"u{n}@1") == expected[n]
                reads += 1
            block = store.get_many([f"u{n}@1" for n in range(60)])
            assert all((row == expected[n].values).all() for n, row in enumerate(block.values))
            with store.snapshot() as frozen:
                one = [v.version for v in frozen.ls("moving")]
                assert [v.version for v in frozen.ls("moving")] == one
        print(reads)
    """
    writing = """
        import sys
        from modicum.store import Store
        from tests.store.small_records import record
        store = Store(sys.argv[1])
        print("ready", flush=True)
        for n in range(25):
            store.put("moving", record(1000 + int(sys.argv[2]) * 100 + n))
        print("written")
    """
    readers = [python(reading, tmp_path / "store", n) for n in range(2)]
    writers = [python(writing, tmp_path / "store", n) for n in range(2)]
    for process in readers + writers:
        assert process.stdout.readline() == "ready\n"
    gone, writing_still = 0, True
    with Store(tmp_path / "store") as store:
        while writing_still:  # and once more, should the writers have been the faster ones
            writing_still = any(process.poll() is None for process in writers)
            for version in store.ls("moving")[:-1]:
                store.remove("moving", version.version)
            gone += store.gc(0.0).segments
        for process in writers:
            assert finished(process) == "written\n"
        store.put("end", record(0))
        for process in readers:
            assert int(finished(process)) > 100
        assert gone > 1
        assert store.show("moving").version == 50
        assert store.verify().faults == ()
    # no file that has been compacted away is left
    assert len(list((tmp_path / "store" / "segments").iterdir())) < 30


def test_backups_while_others_write(python, tmp_path):
    Store(tmp_path / "store", create=True, segment_bytes=6000).close()
    writing = """
        import sys
        from modicum.store import Put, Store
        from tests.store.small_records import record
        store, n = Store(sys.argv[1]), 0
        print("ready", flush=True)
        while not store.ls("stop"):
            store.put_many([Put(f"pair{n}", record(n)), Put(f"pair{n}", record(n + 1), alias="production")])
            n += 1
    """
    writers = [python(writing, tmp_path / "store")]
    assert writers[0].stdout.readline() == "ready\n"
    counts = []
    with Store(tmp_path / "store") as store:
        for n in range(6):
            while store.stats().versions == (counts or [0])[-1]:
                time.sleep(0.01)
            store.backup(tmp_path / f"copy{n}")
            with Store(tmp_path / f"copy{n}") as copy:
                assert copy.verify().faults == ()
                found = copy.stats()
                assert found.versions == 2 * found.names == 2 * found.aliases  # no half of a batch
                counts.append(found.versions)
        store.put("stop", record(0))
    finished(writers[0])
    assert counts == sorted(counts)
    assert counts[-1] > counts[0]


def test_many_make_one_store(python, tmp_path):
    code = """
        import sys
        from modicum.store import Store
        from tests.store.small_records import record
        sys.stdin.readline()
        with Store(sys.argv[1], create=True) as store:
            store.put(f"from{sys.argv[2]}", record(int(sys.argv[2])))
    """
    makers = [python(code, tmp_path / "store", n) for n in range(4)]
    for maker in makers:
        maker.stdin.write("go\n")
        maker.stdin.flush()
    for maker in makers:
        finished(maker)
    with Store(tmp_path / "store") as store:
        assert [v.name for v in store.ls()] == [f"from{n}" for n in range(4)]
        assert store.verify().faults == ()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]  # nothing left aside
