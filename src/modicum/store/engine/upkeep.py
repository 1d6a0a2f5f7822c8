"""What is done to a whole store on PostgreSQL while others use it: erasure, compaction, checking, backup."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

from modicum.errors import ConfigError, CorruptAdapterError
from modicum.store.atomic import write_folder
from modicum.store.engine.interface import Compacted
from modicum.store.engine.rows import burials
from modicum.store.engine.sqlite import Embedded
from modicum.store.objects import intact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from modicum.store.engine.change import EmbeddedChange
    from modicum.store.engine.postgres import Postgres
    from modicum.store.engine.rows import PostgresChange, PostgresView

T = TypeVar("T")
#: objects in one change or one request
_AT_ONCE = 200
_NUMBERS = 48
#: settings that say where a store keeps its things, which are another store's own
_OWN = ("format", "store", "objects", "burials")


def pin(view: PostgresView, store: bytes) -> None:
    """Returns when compactions spare, as long as the connection lasts, whatever is in use from now on.

    A shared lock on the number of burials so far; PostgreSQL lists it, and forgets it with the connection.
    """
    view.rows("SELECT pg_advisory_lock_shared(?::bigint)", _key(store, burials(view)))


def _key(store: bytes, number: int) -> int:
    return int.from_bytes(store[:2], "big", signed=True) << _NUMBERS | number


def _oldest_pin(view: PostgresView, store: bytes) -> int | None:
    query = (
        "SELECT classid::bigint, objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 "
        "AND mode = 'ShareLock' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    prefix = int.from_bytes(store[:2], "big")
    keys = [high << 32 | low for high, low in view.rows(query)]
    return min((key & ((1 << _NUMBERS) - 1) for key in keys if key >> _NUMBERS == prefix), default=None)


def erase(store: Postgres) -> dict[int, int]:
    """Place -> bytes of every object that was waiting to be removed and now is."""
    with store.change() as change:  # nobody puts the same object again meanwhile
        waiting = change.rows("SELECT id, digest, size FROM dead WHERE erase = 1")
        store.bucket.remove(digest for _, digest, _ in waiting)
    return {place: size for place, _, size in waiting}


def compact(store: Postgres) -> Compacted:
    """What was removed: objects that nobody uses and no pinned view sees, and files that no row names."""
    gone = freed = 0
    while found := _bury(store):
        gone, freed = gone + len(found), freed + sum(found)
    listed = store.bucket.listed()
    for part in _parts(listed):
        with store.change() as change:  # no writer is at work now, so what no row names is nobody's
            strays = set(part) - _named(change, [name for name in part if isinstance(name, bytes)])
            store.bucket.remove(strays)
        gone, freed = gone + len(strays), freed + sum(listed[name] for name in strays)
    return Compacted(gone, freed, 0)


def _bury(store: Postgres) -> list[int]:
    """Bytes of each of some dead objects, now removed."""
    with store.change() as change:
        dead = change.rows(
            "SELECT id, digest, size, burial FROM dead WHERE erase = 0 ORDER BY burial, id LIMIT 1000"
        )
        oldest = _oldest_pin(change, store.number)  # after the rows: whoever pins now sees them dead
        free = [
            (place, digest, size)
            for place, digest, size, burial in dead
            if oldest is None or burial <= oldest
        ]
        store.bucket.remove(digest for _, digest, _ in free)
        change.run_many("DELETE FROM dead WHERE id = ?", ((place,) for place, _, _ in free))
    return [size for _, _, size in free]


def _named(change: PostgresChange, digests: list[bytes]) -> set[bytes]:
    if not digests:
        return set()
    marks = ", ".join("?" * len(digests))
    query = f"SELECT digest FROM objects WHERE digest IN ({marks})"  # noqa: S608 - question marks
    rows = change.rows(f"{query} UNION ALL {query.replace('objects', 'dead')}", *digests, *digests)
    return {digest for (digest,) in rows}


def check(
    store: Postgres, report: Callable[[str], None], progress: Callable[[int], None] | None = None
) -> int:
    """Bytes of objects read and compared with their digests; all is seen as of the beginning."""
    done = last = 0
    with store.snapshot(pinned=True) as view:
        query = "SELECT id, digest, size FROM objects WHERE id > ? ORDER BY id LIMIT ?"
        while rows := view.rows(query, last, _AT_ONCE):
            found = store.bucket.get(digest for _, digest, _ in rows)
            for number, digest, size in rows:
                fault = _fault(found.get(digest), digest, size)
                if fault and _still_listed(store, number, digest):
                    report(f"object {digest.hex()}: {fault}")
                done += size
            last = rows[-1][0]
            if progress is not None:
                progress(done)
        waiting = view.rows("SELECT count(*) FROM dead WHERE erase = 1")[0][0]
        if waiting:
            report(f"{waiting} purged objects are not removed yet; gc finishes that")
    return done


def _fault(data: bytes | None, digest: bytes, size: int) -> str | None:
    if data is None:
        return "it is missing"
    if len(data) != size:
        return f"it has {len(data)} bytes instead of {size}"
    return None if intact(data, digest) else "its bytes are damaged"


def _still_listed(store: Postgres, number: int, digest: bytes) -> bool:
    with store.snapshot() as now:  # else it was purged meanwhile
        return bool(now.rows("SELECT 1 FROM objects WHERE id = ? AND digest = ?", number, digest))


def backup(store: Postgres, target: Path) -> int:
    """Bytes written to the new folder `target`, an embedded store of its own."""
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another folder for the backup")

    def fill(aside: Path) -> None:
        Embedded.create(aside, store.tables)
        copy = Embedded(aside)
        try:
            with store.snapshot(pinned=True) as view, copy.change() as change:
                _copy(view, change, re.findall(r"CREATE TABLE (\w+)", store.tables))
        finally:
            copy.close()

    write_folder(target, fill)
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


def _copy(view: PostgresView, change: EmbeddedChange, tables: list[str]) -> None:
    for table in tables:
        for rows in view.pages(f"SELECT * FROM {table}"):  # noqa: S608 - names of our own tables
            change.run_many(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)  # noqa: S608
    for key, value in view.rows("SELECT key, value FROM settings"):
        if key not in _OWN:
            change.run("INSERT INTO settings VALUES (?, ?)", key, int(value) if key == "entries" else value)
    for rows in view.pages("SELECT id, size, uses FROM objects"):
        for part in _parts(rows):
            stored = view.load([number for number, _, _ in part])
            for one in stored:
                if not intact(one.data, one.digest):
                    raise CorruptAdapterError(f"object {one.digest.hex()} is damaged; run verify")
            places = change.write([one.data for one in stored])
            change.run_many(
                "INSERT INTO objects(id, digest, segment, start, size, uses) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (number, one.digest, *place, size, uses)
                    for (number, size, uses), one, place in zip(part, stored, places, strict=True)
                ),
            )


def _parts(values: Iterable[T]) -> Iterator[list[T]]:
    values = list(values)
    for start in range(0, len(values), _AT_ONCE):
        yield values[start : start + _AT_ONCE]
