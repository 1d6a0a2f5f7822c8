"""The embedded backend: rows in SQLite, objects in segment files; see docs/design/store.md."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
from typing import TYPE_CHECKING, Any, final

from modicum.errors import ModicumError, StoreError
from modicum.store.beside import WAITING, side_by_side, split
from modicum.store.engine import checking, maintenance
from modicum.store.engine.change import PLACES, EmbeddedChange, View, marks
from modicum.store.engine.connections import Connections
from modicum.store.engine.interface import MovedError
from modicum.store.engine.segments import Segments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from modicum.store.engine.interface import Compacted
    from modicum.store.engine.segments import Segment

INDEX, FOLDER = "index.sqlite", "segments"
FORMAT = 1
#: bytes after which a segment is full
SEGMENT_BYTES = 1 << 30
_APPLICATION = 0x6D6F6463
_TABLES = """
CREATE TABLE settings(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE segments(id INTEGER PRIMARY KEY AUTOINCREMENT, size INTEGER NOT NULL);
CREATE TABLE objects(
    id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, segment INTEGER NOT NULL, start INTEGER NOT NULL,
    size INTEGER NOT NULL, uses INTEGER NOT NULL);
CREATE TABLE dead(
    id INTEGER PRIMARY KEY AUTOINCREMENT, digest BLOB NOT NULL, segment INTEGER NOT NULL, start INTEGER NOT NULL,
    size INTEGER NOT NULL, erase INTEGER NOT NULL DEFAULT 0);
"""
_DAMAGED = "has a damaged index: run verify, and restore it from a backup"
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
#: KiB of pages that a connection keeps, and one of a thread that reads ahead for others
_CACHE, _LITTLE = 8192, 2048
#: how often segments that a compaction has just unlinked are looked for
_TRIES = 8


@final
class Embedded:
    """A store in one folder of this machine, for any number of processes and threads."""

    def __init__(self, folder: Path, *, timeout: float = 60.0) -> None:
        """Open the store in `folder`; a writer waits `timeout` seconds for others.

        Raises:
            StoreError: there is none, it is damaged, or of a newer format.
        """
        self.folder, self.location, self.timeout = folder, str(folder), timeout
        self._connections: Connections[sqlite3.Connection] = Connections(self.location)
        if not (folder / INDEX).is_file():
            raise StoreError(
                f"no store in {folder}: name its folder, or make one (`modicum store init`, create=True)"
            )
        with self.said():
            settings: dict[str, Any] = dict(self.connection().execute("SELECT key, value FROM settings"))
            found = settings.get("format")
            if found != FORMAT:
                self.close()
                newer = isinstance(found, int) and found > FORMAT
                raise StoreError(
                    f"{folder} has format {found!r}, this modicum knows {FORMAT}: "
                    + ("upgrade modicum" if newer else "restore the store from a backup")
                )
            self.segments = Segments(folder / FOLDER, settings["store"])
            self.segment_bytes: int = settings["segment_bytes"]

    @classmethod
    def create(cls, folder: Path, tables: str, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Make an empty store with the catalogue's `tables` in `folder`, as a whole or not at all.

        Of several that do so at once, one makes it. An existing one is left alone.

        Raises:
            StoreError: the folder holds something else.
        """
        aside = folder.with_name(f".{folder.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        with said(str(folder), 1.0), contextlib.ExitStack() as stack:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(maintenance.remove_folder, aside)
            maintenance.remove_folder(aside)
            maintenance.make_folder(aside)
            maintenance.make_folder(aside / FOLDER)
            os.close(os.open(aside / INDEX, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            with contextlib.closing(connect(aside / INDEX, 1.0)) as db:
                db.executescript(f"BEGIN; {_TABLES} {tables} COMMIT;")
                settings = {"format": FORMAT, "store": os.urandom(4), "segment_bytes": segment_bytes}
                db.executemany("INSERT INTO settings VALUES (?, ?)", settings.items())
                db.execute(f"PRAGMA application_id={_APPLICATION}")
            maintenance.publish_folder(aside, folder, INDEX)

    @contextlib.contextmanager
    def snapshot(self, *, pinned: bool = False, single: bool = False) -> Iterator[View]:
        """A view for some reads, or for a `single` one; a `pinned` one has its own connection and all segments open."""
        with contextlib.ExitStack() as stack:
            if pinned:
                db = stack.enter_context(contextlib.closing(connect(self.folder / INDEX, self.timeout)))
            else:
                db = self.connection()
            inside = db.in_transaction  # of another view of this thread, whose moment is this one's too
            try:
                if not inside and not single:
                    db.execute("BEGIN")
                yield View(db, self.segments, self._hold(db) if pinned else {}, self._fetch)
            finally:
                if db.in_transaction and not inside:
                    db.execute("ROLLBACK")

    def _fetch(self, query: str, keys: Sequence[Any], values: tuple, wanted: int | None) -> None:
        """Returns when threads have asked the query for the keys: its pages are then in the system's memory.

        The objects in the column `wanted` are on their way there. SQLite asks the disk for one page after the other;
        what the threads see may be of another moment than the view that wants to know, so it is thrown away.
        """

        def ask(part: Sequence[Any]) -> None:
            with contextlib.suppress(sqlite3.Error, ModicumError, OSError):
                db = self.connection(_LITTLE)
                rows = db.execute(query.format(marks(part)), (*part, *values)).fetchall()
                if wanted is not None:
                    objects = [row[wanted] for row in rows]
                    # all of them first: a query that has begun keeps the WAL from being emptied
                    places = db.execute(PLACES.format(marks(objects)), objects).fetchall()
                    for *_, segment, start, size in places:
                        self.segments.get(segment).expect(start, size)

        side_by_side(ask, split(keys, WAITING))

    def _hold(self, db: sqlite3.Connection) -> dict[int, Segment]:
        """All segments that the view on `db` knows, open; what is missing for good is missing."""
        held: dict[int, Segment] = {}
        for _ in range(_TRIES):
            held.clear()
            listed = [number for (number,) in db.execute("SELECT id FROM segments")]
            for number in listed:
                with contextlib.suppress(MovedError):
                    held[number] = self.segments.get(number)
            if len(held) == len(listed):
                break
            # compacted away between the two lines; look again
            db.execute("ROLLBACK")
            db.execute("BEGIN")
        return held

    @contextlib.contextmanager
    def change(self) -> Iterator[EmbeddedChange]:
        """The one change of this moment; acknowledged when the block ends without an error."""
        db = self.connection()
        if db.in_transaction:
            raise StoreError(f"{self.location}: a change cannot begin inside of another one, or of a read")
        change = EmbeddedChange(db, self.segments, self.segment_bytes)
        committing = False
        try:
            db.execute("BEGIN IMMEDIATE")
            yield change
            committing = True
            db.execute("COMMIT")
        except BaseException:
            # on a full disk SQLite may have rolled back by itself. The lock is gone then, the next writer may be
            # writing where this one did, and cuts off what it finds; so it does after a failed commit
            if db.in_transaction:
                if not committing:
                    change.undo()
                db.execute("ROLLBACK")
            raise

    def erase(self) -> dict[int, int]:
        """Place -> bytes of every place that was waiting to be overwritten and now is, the WAL included."""
        with self.said(), maintenance.alone(self):
            return maintenance.erase(self)

    def compact(self, dead: float = 0.5) -> Compacted:
        """What was rewritten: segments of which more than the share `dead` is used by nobody."""
        with self.said(), maintenance.alone(self):
            return maintenance.compact(self, dead)

    def check(self, report: Callable[[str], None], progress: Callable[[int], None] | None = None) -> int:
        """Bytes of objects read and compared with their digests; every fault is reported in words."""
        return checking.check(self, report, progress)

    def backup(self, target: Path) -> int:
        """Bytes written to the new folder `target`: this store as of one moment."""
        with self.said(), maintenance.alone(self):
            return maintenance.backup(self, target)

    def sizes(self) -> dict[str, int]:
        """Bytes on disk by part."""
        parts = {"segments": 0, "index": 0, "log": 0}
        for file in (self.folder / FOLDER).iterdir():
            with contextlib.suppress(FileNotFoundError):
                parts["segments"] += file.stat().st_size
        for part, name in {"index": INDEX, "log": f"{INDEX}-wal"}.items():
            with contextlib.suppress(FileNotFoundError):
                parts[part] += (self.folder / name).stat().st_size
        return parts

    def close(self) -> None:
        """Returns when no file is held open any more."""
        self._connections.close()
        if hasattr(self, "segments"):
            self.segments.close()

    def connection(self, cache: int = _CACHE) -> sqlite3.Connection:
        """The connection of this thread in this process; a new one keeps up to `cache` KiB of pages."""
        return self._connections.mine(lambda: connect(self.folder / INDEX, self.timeout, cache))

    def said(self) -> contextlib.AbstractContextManager[None]:
        """Turns what SQLite and the system say inside into words that help, and nonsense in rows into damage."""
        return said(self.location, self.timeout)


@contextlib.contextmanager
def said(location: str, timeout: float) -> Iterator[None]:
    """See `Embedded.said`; for a store that is not open yet."""
    try:
        yield
    except ModicumError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise StoreError(_advice(error, location, timeout)) from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # rows that cannot be read as what they should be; text that is no text comes as a UnicodeDecodeError
        raise StoreError(f"{location} {_DAMAGED} ({type(error).__name__}: {error})") from error


def _advice(error: Exception, location: str, timeout: float) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return (
            f"{location} is busy: another process has been changing it for {timeout:g} seconds; wait, or see which "
            "one has index.sqlite open (fuser, lsof)"
        )
    if code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) in _NO_ROOM:
        return (
            f"no room for {location} ({error}): nothing of this change was kept; make room, or gc the store"
        )
    if code == sqlite3.SQLITE_IOERR:
        return (
            f"{location} cannot be read or written ({error}): nothing of this change was kept; look at the disk, and "
            "at the limits on room and file sizes"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return (
            f"{location} cannot be opened or changed ({error}): look at the permissions of the folder and its files, "
            "which readers have to write to as well (index.sqlite-shm)"
        )
    return f"{location} {_DAMAGED} ({error})" if code else f"{location}: {error}"


def connect(file: Path, timeout: float, cache: int = _CACHE) -> sqlite3.Connection:
    """A connection to an index, set up for durable changes and overwritten deletions; see `Embedded.connection`."""
    # mode=rw: a missing file is an error, not an empty store
    db = sqlite3.connect(
        f"{file.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=timeout,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        for pragma in (
            "journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY", f"cache_size=-{cache}",
            "wal_autocheckpoint=4096", "journal_size_limit=67108864",
        ):  # fmt: skip
            db.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        db.close()
        raise
    return db
