"""Views of the embedded backend, and changes: rows in a SQLite transaction, objects behind the end of a segment."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from modicum.errors import CorruptAdapterError
from modicum.store.engine.interface import Located, MovedError, Payload, Stored
from modicum.store.engine.segments import START, framed

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Sequence

    from modicum.store.engine.interface import Data
    from modicum.store.engine.segments import Segment, Segments

#: bytes put together for one write
_WRITE = 1 << 26
_PLACE = "SELECT digest, segment, start, size FROM objects WHERE id = ?"
_AND_PLACE = (
    "SELECT found.*, found.object, digest, segment, start, objects.size FROM ({}) found "
    "LEFT JOIN objects ON objects.id = found.object"
)
PLACES = "SELECT id, digest, segment, start, size FROM objects WHERE id IN ({})"
#: digest, segment, start, size
_Place = tuple[bytes, int, int, int]
#: keys of a query at a time: the first ones tell whether the disk is waited for, which takes longer than this for one
_FIRST, _FOLLOWING = 1, 8
_WAITED = 1e-4


def marks(values: Sequence[Any]) -> str:
    """As many question marks as there are values."""
    return ", ".join("?" * len(values))


def _listed(number: int, place: Any) -> _Place:
    if place is None or place[0] is None:
        raise CorruptAdapterError(
            f"the index names no object {number}; run verify, and restore the store from a backup"
        )
    return place


def _nothing(query: str, keys: Sequence[Any], values: tuple, wanted: int | None) -> None:
    """A change reads what it needs one by one."""


class View:
    """A consistent view of the rows, and the objects they name."""

    def __init__(
        self,
        db: sqlite3.Connection,
        segments: Segments,
        held: dict[int, Segment],
        fetch: Callable[[str, Sequence[Any], tuple, int | None], None] = _nothing,
    ) -> None:
        """`held`: segments that are open already and may have been unlinked since.

        `fetch` has the pages that a query of `rows_of` needs read from the disk, before it is asked.
        """
        self._db, self._segments, self._held, self._fetch = db, segments, held, fetch

    def rows(self, query: str, *values: Any) -> list[tuple]:
        """All rows of a query."""
        return self._db.execute(query, values).fetchall()

    def rows_of(
        self, query: str, keys: Sequence[Any], *values: Any, wanted: int | None = None
    ) -> list[tuple]:
        """All rows of a query for many keys, in any order: `{}` in it is a list of some of them, before the values.

        `wanted`: the column of objects that will be located next.
        """
        found: list[tuple] = []
        at, fetched = 0, False
        while at < len(keys):
            part, began = keys[at : at + (_FOLLOWING if at else _FIRST)], time.perf_counter()
            found += self.rows(query.format(marks(part)), *part, *values)
            at += len(part)
            if not fetched and time.perf_counter() - began > _WAITED * len(part):
                fetched = True
                self._fetch(query, keys[at:], values, wanted)
        return found

    def rows_located(self, query: str, *values: Any) -> list[tuple[tuple, Located]]:
        """All rows of a query, each with where the object is that its column `object` names; one statement."""
        return [
            (row[:-5], self._located(*_listed(row[-5], row[-4:])))
            for row in self.rows(_AND_PLACE.format(query), *values)
        ]

    def locate(self, objects: Sequence[int]) -> list[Located]:
        """Where the objects with these numbers are, in this order; of several, the disk begins to fetch them."""
        known: dict[int, Any] = {}
        if len(objects) > 1:
            known = {number: place for number, *place in self.rows_of(PLACES, list(dict.fromkeys(objects)))}
        places: list[_Place] = [known.get(number) or self._place(number) for number in objects]
        if known:
            for _, segment, start, size in places:
                self.segment(segment).expect(start, size)
        return [self._located(*place) for place in places]

    def load(self, objects: Sequence[int]) -> list[Stored]:
        """The objects with these numbers, in this order, unchecked."""
        return [Stored(one.digest, one.read(None)) for one in self.locate(objects)]

    def _place(self, number: int) -> _Place:
        return _listed(number, self._db.execute(_PLACE, (number,)).fetchone())

    def _located(self, digest: bytes, segment: int, start: int, size: int) -> Located:
        return Located(digest, size, functools.partial(self.segment(segment).read, start, size))

    def segment(self, number: int) -> Segment:
        """Segment `number`, open.

        Raises:
            MovedError: there is no such file (any more).
        """
        return self._held.get(number) or self._segments.get(number)


class EmbeddedChange(View):
    """The one change of a moment; its owner begins and ends the transaction."""

    def __init__(self, db: sqlite3.Connection, segments: Segments, segment_bytes: int) -> None:
        super().__init__(db, segments, {})
        self._segment_bytes = segment_bytes
        #: segment -> catalogued end before this change, 0 for a new one
        self._before: dict[int, int] = {}

    def run(self, query: str, *values: Any) -> int:
        """How many rows the statement changed."""
        return self._db.execute(query, values).rowcount

    def run_many(self, query: str, rows: Iterable[tuple]) -> None:
        """Returns when the statement ran for every one of `rows`."""
        self._db.executemany(query, rows)

    def add(self, payloads: Sequence[Payload]) -> list[int]:
        """The number of each object, with one use more; what is new is on the disk."""
        known: dict[bytes, int] = {}
        fresh: list[Payload] = []
        following = self.rows("SELECT coalesce(max(id), 0) + 1 FROM objects")[0][0]
        for payload in payloads:
            if payload.digest in known:
                continue
            found = self.rows("SELECT id FROM objects WHERE digest = ?", payload.digest)
            if found and self._same(found[0][0], payload.data):
                known[payload.digest] = found[0][0]
            elif found:  # damaged: this is the moment to have it whole again
                known[payload.digest] = found[0][0]
                self.move([(found[0][0], payload.data)])
            else:
                known[payload.digest] = following + len(fresh)
                fresh.append(payload)
        self.run_many(
            "INSERT INTO objects(id, digest, segment, start, size, uses) VALUES (?, ?, ?, ?, ?, 0)",
            (
                (known[payload.digest], payload.digest, segment, start, len(payload.data))
                for payload, (segment, start) in zip(fresh, self.write([p.data for p in fresh]), strict=True)
            ),
        )
        numbers = [known[payload.digest] for payload in payloads]
        uses = ((times, number) for number, times in Counter(numbers).items())
        self.run_many("UPDATE objects SET uses = uses + ? WHERE id = ?", uses)
        return numbers

    def drop(self, objects: Iterable[int]) -> int:
        """Bytes of the objects that have no use left after one less for each time that `objects` names them."""
        freed = 0
        for number, times in Counter(objects).items():
            self.run("UPDATE objects SET uses = uses - ? WHERE id = ?", times, number)
            if self.rows("SELECT uses FROM objects WHERE id = ?", number)[0][0] <= 0:
                freed += self._bury(number)
                self.run("DELETE FROM objects WHERE id = ?", number)
        return freed

    def erase(self, digests: Iterable[bytes]) -> int:
        """Bytes of dead objects with these digests, which are to be overwritten from now on."""
        wanted = set(digests)
        found = self.rows("SELECT id, digest, size FROM dead WHERE erase = 0")
        hit = [(number, size) for number, digest, size in found if digest in wanted]
        self.run_many("UPDATE dead SET erase = 1 WHERE id = ?", ((number,) for number, _ in hit))
        return sum(size for _, size in hit)

    def erased(self, places: Iterable[int]) -> None:
        """Returns when the places are listed as overwritten."""
        self.run_many("UPDATE dead SET erase = 2 WHERE id = ?", ((number,) for number in places))

    def write(self, objects: Sequence[Data]) -> list[tuple[int, int]]:
        """(segment, start) of each of the objects, in the last segment or in new ones; they are on the disk."""
        places: list[tuple[int, int]] = []
        number, end = self._last()
        batch: list[Data] = []
        size = 0
        for data in objects:
            full = end + size + framed(len(data)) > self._segment_bytes and end + size > START
            if batch and (full or size >= _WRITE):
                places += self._append(number, end, batch)
                batch, end, size = [], end + size, 0
            if full:
                number, end = self.start_segment()
            batch.append(data)
            size += framed(len(data))
        return places + self._append(number, end, batch) if batch else places

    def start_segment(self) -> tuple[int, int]:
        """The number and the end of a new, last segment."""
        number = self._db.execute("INSERT INTO segments(size) VALUES (?)", (START,)).lastrowid
        assert number is not None
        self._before[number] = 0
        return number, self._segments.create(number)

    def move(self, objects: Sequence[tuple[int, Data]]) -> None:
        """Returns when the objects (number, data) lie in the last segment and their old places are nobody's."""
        for number, _ in objects:
            self._bury(number)
        places = self.write([data for _, data in objects])
        self.run_many(
            "UPDATE objects SET segment = ?, start = ?, size = ? WHERE id = ?",
            ((*place, len(data), number) for place, (number, data) in zip(places, objects, strict=True)),
        )

    def undo(self) -> None:
        """Returns when segments end where they did; the best that can be done if the disk refuses."""
        for number, end in self._before.items():
            with contextlib.suppress(OSError):
                if end:
                    os.truncate(self._segments.path(number), end)
                else:
                    self._segments.unlink(number)

    def _append(self, number: int, end: int, objects: list[Data]) -> list[tuple[int, int]]:
        self._before.setdefault(number, end)
        starts = self._segments.append(number, end, objects)
        self.run(
            "UPDATE segments SET size = ? WHERE id = ?",
            end + sum(framed(len(data)) for data in objects),
            number,
        )
        return [(number, start) for start in starts]

    def _last(self) -> tuple[int, int]:
        found = self.rows("SELECT id, size FROM segments ORDER BY id DESC LIMIT 1")
        return found[0] if found else self.start_segment()

    def _bury(self, number: int) -> int:
        digest, segment, start, size = self._place(number)
        self.run(
            "INSERT INTO dead(digest, segment, start, size) VALUES (?, ?, ?, ?)", digest, segment, start, size
        )
        return size

    def _same(self, number: int, data: bytes) -> bool:
        try:
            return bytes(self.load([number])[0].data) == data
        except (CorruptAdapterError, MovedError):
            return False
