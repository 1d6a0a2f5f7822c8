"""Views of the PostgreSQL backend, and changes: rows in a transaction, objects in a bucket, written before it ends."""

from __future__ import annotations

import functools
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from modicum.errors import CorruptAdapterError
from modicum.store.engine.interface import Located, Payload, Stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from psycopg import Connection

    from modicum.store.engine.bucket import Bucket

#: values in one IN (…), and objects in one request
_AT_ONCE = 500
#: what SQLite's words for tables are here; names are compared byte by byte, as SQLite does
_TYPES = {
    "INTEGER": "BIGINT",
    "BLOB": "BYTEA",
    "REAL": "DOUBLE PRECISION",
    "TEXT": 'TEXT COLLATE "C"',
    " WITHOUT ROWID": "",
}
_AND_DIGEST = (
    "SELECT found.*, found.object, digest FROM ({}) found LEFT JOIN objects ON objects.id = found.object"
)


def tables_here(tables: str) -> str:
    """The catalogue's tables in the words of PostgreSQL."""
    return re.sub("|".join(_TYPES), lambda word: _TYPES[word[0]], tables)


@functools.cache
def _query(text: str) -> Any:
    return text.replace("%", "%%").replace("?", "%s")


def _read_already(one: Stored) -> Located:
    return Located(one.digest, len(one.data), lambda _: one.data)


class PostgresView:
    """A consistent view of the rows, and the objects they name."""

    def __init__(self, db: Connection, bucket: Bucket) -> None:
        self._db, self._bucket = db, bucket

    def rows(self, query: str, *values: Any) -> list[tuple]:
        """All rows of a query."""
        return self._db.execute(_query(query), values).fetchall()

    def rows_of(
        self,
        query: str,
        keys: Sequence[Any],
        *values: Any,
        wanted: int | None = None,  # noqa: ARG002 - a bucket fetches them all at once
    ) -> list[tuple]:
        """All rows of a query for many keys, in any order: `{}` in it is a list of some of them, before the values."""
        return [row for part in _parts(keys) for row in self.rows(query.format(_marks(part)), *part, *values)]

    def pages(self, query: str) -> Iterator[list[tuple]]:
        """All rows of a query, some thousand at a time."""
        with self._db.cursor("pages") as cursor:
            cursor.execute(_query(query))
            while rows := cursor.fetchmany(5000):
                yield rows

    def rows_located(self, query: str, *values: Any) -> list[tuple[tuple, Located]]:
        """All rows of a query, each with the object that its column `object` names; one statement."""
        rows = self.rows(_AND_DIGEST.format(query), *values)
        stored = self._stored([row[-2:] for row in rows])
        return [(row[:-2], _read_already(one)) for row, one in zip(rows, stored, strict=True)]

    def locate(self, objects: Sequence[int]) -> list[Located]:
        """The objects with these numbers, in this order; a bucket is asked for all of them at once."""
        return [_read_already(one) for one in self.load(objects)]

    def load(self, objects: Sequence[int]) -> list[Stored]:
        """The objects with these numbers, in this order, unchecked.

        Raises:
            CorruptAdapterError: one is listed and not there, or not listed.
        """
        query = "SELECT id, digest FROM objects WHERE id IN ({})"
        digests = dict(self.rows_of(query, list(dict.fromkeys(objects))))
        return self._stored([(number, digests.get(number)) for number in objects])

    def _stored(self, listed: Sequence[tuple[int, bytes | None]]) -> list[Stored]:
        """The objects with these numbers and digests."""
        for number, digest in listed:
            if digest is None:
                raise CorruptAdapterError(
                    f"the index names no object {number}; run verify, and restore the store from a backup"
                )
        digests = [digest for _, digest in listed if digest is not None]
        found = self._bucket.get(dict.fromkeys(digests))
        for digest in digests:
            if digest not in found:
                raise CorruptAdapterError(
                    f"object {digest.hex()} is missing in {self._bucket.url}; put the same record again, or restore it "
                    "from a backup"
                )
        return [Stored(digest, found[digest]) for digest in digests]


class PostgresChange(PostgresView):
    """The one change of a moment; its owner begins and ends the transaction."""

    #: the number of this change among those that left objects to nobody, once it has
    _burial: int | None = None

    def run(self, query: str, *values: Any) -> int:
        """How many rows the statement changed."""
        return self._db.execute(_query(query), values).rowcount

    def run_many(self, query: str, rows: Iterable[tuple]) -> None:
        """Returns when the statement ran for every one of `rows`."""
        with self._db.cursor() as cursor:
            cursor.executemany(_query(query), rows)

    def add(self, payloads: Sequence[Payload]) -> list[int]:
        """The number of each object, with one use more; what is new is in the bucket."""
        wanted = {payload.digest: payload.data for payload in payloads}
        known = dict(self.rows_of("SELECT digest, id FROM objects WHERE digest IN ({})", list(wanted)))
        fresh = [digest for digest in wanted if digest not in known]
        # what is damaged or missing is made whole: this is the moment
        there = self._bucket.get(known)
        bad = [digest for digest in known if there.get(digest) != wanted[digest]]
        for part in _parts(fresh + bad):
            self._bucket.put({digest: wanted[digest] for digest in part})
        following = self.rows("SELECT coalesce(max(id), 0) + 1 FROM objects")[0][0]
        known |= {digest: following + index for index, digest in enumerate(fresh)}
        self.run_many(
            "INSERT INTO objects(id, digest, size, uses) VALUES (?, ?, ?, 0)",
            ((known[digest], digest, len(wanted[digest])) for digest in fresh),
        )
        self.run_many("DELETE FROM dead WHERE digest = ?", ((digest,) for digest in fresh))
        numbers = [known[payload.digest] for payload in payloads]
        uses = ((times, number) for number, times in Counter(numbers).items())
        self.run_many("UPDATE objects SET uses = uses + ? WHERE id = ?", uses)
        return numbers

    def drop(self, objects: Iterable[int]) -> int:
        """Bytes of the objects that have no use left after one less for each time that `objects` names them."""
        freed = 0
        for number, times in Counter(objects).items():
            self.run("UPDATE objects SET uses = uses - ? WHERE id = ?", times, number)
            found = self.rows("SELECT digest, size FROM objects WHERE id = ? AND uses <= 0", number)
            for digest, size in found:
                query = "INSERT INTO dead(digest, size, burial) VALUES (?, ?, ?)"
                self.run(query, digest, size, self._number())
                self.run("DELETE FROM objects WHERE id = ?", number)
                freed += size
        return freed

    def erase(self, digests: Iterable[bytes]) -> int:
        """Bytes of dead objects with these digests, which are to be removed from now on, whoever still reads them."""
        freed = 0
        for digest in set(digests):
            query = "UPDATE dead SET erase = 1 WHERE digest = ? AND erase = 0 RETURNING size"
            freed += sum(size for (size,) in self.rows(query, digest))
        return freed

    def erased(self, places: Iterable[int]) -> None:
        """Returns when the places are listed no longer."""
        self.run_many("DELETE FROM dead WHERE id = ?", ((number,) for number in places))

    def _number(self) -> int:
        if self._burial is None:
            self._burial = burials(self) + 1
            self.run("UPDATE settings SET value = ? WHERE key = 'burials'", self._burial)
        return self._burial


def burials(view: PostgresView) -> int:
    """How many changes have left objects to nobody so far."""
    return int(view.rows("SELECT value FROM settings WHERE key = 'burials'")[0][0])


def _parts(values: Sequence[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), _AT_ONCE):
        yield list(values[start : start + _AT_ONCE])


def _marks(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))
