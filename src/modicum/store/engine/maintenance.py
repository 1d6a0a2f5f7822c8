"""What is done to a whole embedded store while others use it: erasure, compaction, backup; and making its folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import time
from typing import TYPE_CHECKING

from modicum.errors import ConfigError, CorruptAdapterError, StoreError
from modicum.store.atomic import flush, write_folder
from modicum.store.engine.interface import Compacted
from modicum.store.engine.segments import START, framed
from modicum.store.objects import intact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from modicum.store.engine.change import EmbeddedChange
    from modicum.store.engine.interface import Data
    from modicum.store.engine.sqlite import Embedded

LOCK = "maintenance.lock"
#: bytes moved in one change, so that no writer waits long
_MOVED = 1 << 23
_COPIED = 1 << 22


@contextlib.contextmanager
def alone(store: Embedded) -> Iterator[None]:
    """Nobody else compacts, backs up or erases inside.

    Raises:
        StoreError: somebody does, for longer than the store's timeout.
    """
    handle = os.open(store.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        until = time.monotonic() + store.timeout
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise StoreError(
                        f"{store.location}: another gc, backup or purge is running; wait until it ends"
                    ) from None
                time.sleep(0.02)
        yield
    finally:
        os.close(handle)


def erase(store: Embedded) -> dict[int, int]:
    """Place -> bytes of every place that was waiting and is zeros now, and the WAL is empty.

    Raises:
        StoreError: readers hold the WAL for longer than the store's timeout; the places go on waiting.
    """
    db = store.connection()
    query = "SELECT segment, start, size, id FROM dead WHERE erase = 1 ORDER BY segment, start"
    waiting = db.execute(query).fetchall()
    if not waiting:
        return {}
    for number in {segment for segment, *_ in waiting}:
        store.segments.erase(number, [(start, size) for s, start, size, _ in waiting if s == number])
    if db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
        raise StoreError(
            f"{store.location}: {len(waiting)} objects are overwritten, but readers still need old pages of the "
            "index; gc finishes the erasure when they are done"
        )
    return {place: size for _, _, size, place in waiting}


def compact(store: Embedded, dead: float) -> Compacted:
    """What was rewritten: segments of which more than the share `dead` is nobody's; and files of nobody."""
    faults: list[str] = []
    moved = freed = gone = 0
    for number in _mostly_dead(store, dead):
        moved += _empty(store, number, faults)
        came_free = _remove(store, number)
        freed, gone = freed + came_free, gone + (came_free > 0)
    with store.change() as change:
        named = {number for (number,) in change.rows("SELECT id FROM segments")}
        for number in store.segments.numbers():
            if number not in named:  # left by a compaction or a writer that was killed
                freed += store.segments.unlink(number)
    store.connection().execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    return Compacted(gone, freed, moved, tuple(faults))


def _mostly_dead(store: Embedded, share: float) -> list[int]:
    with store.change() as change:
        nobodys: dict[int, int] = {}
        for number, size in change.rows("SELECT segment, size FROM dead"):
            nobodys[number] = nobodys.get(number, 0) + framed(size)
        sizes = change.rows("SELECT id, size FROM segments ORDER BY id")
        chosen = [n for n, size in sizes if size > START and nobodys.get(n, 0) / (size - START) > share]
        if chosen and chosen[-1] == sizes[-1][0]:
            change.start_segment()  # the last one takes what is moved, so it must be another
    return chosen


def _empty(store: Embedded, number: int, faults: list[str]) -> int:
    """Bytes moved out of segment `number`; what is damaged stays, and is added to `faults`."""
    query = "SELECT id, size FROM objects WHERE segment = ? ORDER BY start"
    listed = store.connection().execute(query, (number,)).fetchall()
    at = moved = 0
    while at < len(listed):
        first, size = at, 0
        while at < len(listed) and (at == first or size + listed[at][1] <= _MOVED):
            size += listed[at][1]
            at += 1
        with store.change() as change:
            objects = [o for one, _ in listed[first:at] if (o := _whole(change, one, number, faults))]
            change.move(objects)
        moved += sum(len(data) for _, data in objects)
    return moved


def _whole(change: EmbeddedChange, one: int, number: int, faults: list[str]) -> tuple[int, Data] | None:
    """Object `one` and its bytes, if it is still in segment `number` and whole."""
    if not change.rows("SELECT 1 FROM objects WHERE id = ? AND segment = ?", one, number):
        return None  # removed meanwhile
    try:
        stored = change.load([one])[0]
    except CorruptAdapterError as error:
        faults.append(f"{error}")
        return None
    if not intact(stored.data, stored.digest):
        faults.append(f"object {stored.digest.hex()} in segment {number} is damaged; run verify")
        return None
    return one, stored.data


def _remove(store: Embedded, number: int) -> int:
    """Bytes that came free; 0 if the segment has to stay."""
    with store.change() as change:
        if change.rows("SELECT 1 FROM objects WHERE segment = ? LIMIT 1", number):
            return 0
        # an erasure asked for meanwhile is owed before its bytes are out of reach; it is ticked off by `erase`
        owed = change.rows("SELECT start, size FROM dead WHERE segment = ? AND erase = 1", number)
        store.segments.erase(number, owed)
        change.run("DELETE FROM dead WHERE segment = ? AND erase != 1", number)
        change.run("DELETE FROM segments WHERE id = ?", number)
    return store.segments.unlink(number)


def backup(store: Embedded, target: Path) -> int:
    """Bytes written to the new folder `target`, a store of its own."""
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another folder for the backup")
    written = 0

    def fill(aside: Path) -> None:
        nonlocal written
        aside.chmod(0o700)
        make_folder(aside / "segments")
        index = aside / "index.sqlite"
        os.close(os.open(index, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with contextlib.closing(sqlite3.connect(index)) as copy:
            # in one step, under one read lock: what is in the index is in the segments, whose ends only move on
            store.connection().backup(copy)
            ends = copy.execute("SELECT id, size FROM segments").fetchall()
        written = index.stat().st_size
        for number, end in ends:
            written += _copy(store.segments.path(number), aside / "segments", end)

    write_folder(target, fill)
    return written


def _copy(source: Path, folder: Path, end: int) -> int:
    handle = os.open(folder / source.name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with source.open("rb") as read, open(handle, "wb") as write:  # noqa: PTH123 - permissions are set on opening
        while end > 0:
            part = read.read(min(_COPIED, end))
            if not part:
                raise StoreError(f"{source} is cut short; run verify, and restore the store from a backup")
            write.write(part)
            end -= len(part)
        return write.tell()


def make_folder(path: Path) -> None:
    """Returns when the new folder is there, for its owner only."""
    path.mkdir(mode=0o700)


def publish_folder(aside: Path, path: Path, known_by: str) -> None:
    """Rename `aside` to `path`; if a folder with the file `known_by` is there already, leave that.

    Raises:
        StoreError: something else is there.
    """
    for file in aside.rglob("*"):
        flush(file)
    flush(aside)
    try:
        aside.rename(path)
    except OSError as error:
        if not (path / known_by).is_file():
            raise StoreError(f"{path} is neither empty nor a store; choose another folder") from error
    flush(path.parent)


def remove_folder(path: Path) -> None:
    """Returns when the folder is gone, if it was there."""
    shutil.rmtree(path, ignore_errors=True)
