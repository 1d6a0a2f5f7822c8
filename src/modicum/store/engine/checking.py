"""Whether an embedded store is whole: the index, every segment, every object, and nothing between them."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from modicum.errors import CorruptAdapterError
from modicum.store.engine.interface import MovedError
from modicum.store.engine.segments import START, framed
from modicum.store.objects import intact

if TYPE_CHECKING:
    from collections.abc import Callable

    from modicum.store.engine.change import View
    from modicum.store.engine.sqlite import Embedded

#: objects between two reports of progress
_OFTEN = 1000


def check(
    store: Embedded, report: Callable[[str], None], progress: Callable[[int], None] | None = None
) -> int:
    """Bytes of objects read and compared with their digests; every fault is reported in words.

    Others may go on changing and compacting: all is seen as of the beginning.
    """
    done = 0
    with store.snapshot(pinned=True) as view:
        try:
            for (said,) in view.rows("PRAGMA integrity_check"):
                if said != "ok":
                    report(f"index: {said}")
            ends = dict(view.rows("SELECT id, size FROM segments ORDER BY id"))
        except sqlite3.DatabaseError as error:
            report(f"index: {error}")
            return 0
        for number, end in ends.items():
            try:
                faults = list(store.segments.faults(view.segment(number), number, end))
            except (MovedError, OSError) as error:
                faults = [f"segment {number} cannot be read: {error}"]
            for fault in faults:
                report(fault)
            query = "SELECT start, size, id, digest FROM objects WHERE segment = ? ORDER BY start"
            places = view.rows(query, number)
            nobodys = view.rows("SELECT start, size FROM dead WHERE segment = ?", number)
            for fault in _gaps(number, end, [(start, size) for start, size, *_ in places] + nobodys):
                report(fault)
            for index, (_, size, one, digest) in enumerate(places):
                _check_object(store, view, one, digest, report)
                done += size
                if progress is not None and index % _OFTEN == 0:
                    progress(done)
        _check_index(view, set(ends), report)
    return done


def _check_index(view: View, segments: set[int], report: Callable[[str], None]) -> None:
    for number, count in view.rows("SELECT segment, count(*) FROM objects GROUP BY segment"):
        if number not in segments:
            report(f"index: {count} objects lie in segment {number}, which is not listed")
    waiting = view.rows("SELECT count(*) FROM dead WHERE erase = 1")[0][0]
    if waiting:
        report(f"{waiting} purged objects are not overwritten yet; gc finishes that")


def _check_object(
    store: Embedded, view: View, one: int, digest: bytes, report: Callable[[str], None]
) -> None:
    try:
        if not intact(view.load([one])[0].data, digest):
            report(f"object {digest.hex()}: its bytes are damaged")
    except MovedError as error:
        with store.snapshot() as now:
            if now.rows("SELECT 1 FROM objects WHERE id = ? AND digest = ?", one, digest):
                report(f"object {digest.hex()}: {error}")  # else it was purged meanwhile
    except (CorruptAdapterError, OSError) as error:
        report(f"object {digest.hex()}: {error}")


def _gaps(number: int, end: int, places: list[tuple[int, int]]) -> list[str]:
    """What is wrong with the places in a segment: they must follow each other from its start to its end."""
    at, found = START, []
    for start, size in sorted(places):
        if start != at:
            found.append(f"index: segment {number} has {start - at} bytes at {at} that nothing accounts for")
        at = start + framed(size)
    if at != end:
        found.append(f"index: segment {number} ends at {end}, its objects at {at}")
    return found
