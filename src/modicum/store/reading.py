"""Everything that can be asked of a store; see `Store`."""

from __future__ import annotations

import abc
import itertools
from typing import TYPE_CHECKING, TypeVar, final

from modicum.errors import CorruptAdapterError
from modicum.store.catalogue import audit, listing
from modicum.store.catalogue.listing import Filter, Stats, check_filter
from modicum.store.catalogue.lookup import (
    Version,
    describe,
    find,
    find_located,
    find_name,
    resolve,
    resolve_many,
)
from modicum.store.catalogue.names import Reference, check_name, reference
from modicum.store.engine.interface import Stored
from modicum.store.objects import stated_digest
from modicum.store.record import Record, decode
from modicum.store.stack import Stack, stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from modicum.store.catalogue.audit import Entry, Head
    from modicum.store.catalogue.lookup import Found
    from modicum.store.engine.interface import Backend, Data, Snapshot

T = TypeVar("T")
#: versions looked up, and records read, at a time
_PAGE = 256


class Readable(abc.ABC):
    """What a store and a frozen view of one have in common.

    A version is referred to as `name` or `name@latest` (the newest), `name@3`, or `name@production`.
    """

    _backend: Backend

    @property
    def location(self) -> str:
        """What the user called the store."""
        return self._backend.location

    def _find(self, wanted: Sequence[Reference]) -> Found | None:
        """The first of `wanted` that there is, all seen at one moment."""
        return self._read(
            lambda view: next((found for one in wanted if (found := find(view, one)) is not None), None),
            single=len(wanted) == 1,
        )

    @abc.abstractmethod
    def _read(self, action: Callable[[Snapshot], T], *, single: bool = False) -> T:
        """What `action` makes of a consistent view; it may be done more than once. `single`: it asks one statement."""

    def get(self, version: str | Reference) -> Record:
        """The record of a version, checked to the last bit.

        Raises:
            NotStoredError: no such version; the nearest thing is named.
            CorruptAdapterError: it is damaged.
        """
        return self.get_put(version)[0]

    def get_put(self, version: str | Reference) -> tuple[Record, int]:
        """What `get` gets, and the entry of the log that put it (see `find_put`), seen at one moment."""
        wanted = reference(version)

        def read(view: Snapshot) -> tuple[Record, int] | None:
            found = find_located(view, wanted)
            if found is None:
                return None
            one, located = found
            return _decoded(one, Stored(located.digest, located.read(None)))[1], one.entry

        def look_again(view: Snapshot) -> tuple[Record, int]:
            # says what there is, if it was not put meanwhile
            found = resolve(view, wanted)
            return _records(view, [found])[0], found.entry

        return self._read(read, single=True) or self._read(look_again)

    def get_bytes(self, version: str | Reference) -> bytes:
        """The bytes of a version's record, as in a `.modicum` file, checked to the last bit."""
        wanted = reference(version)
        return self._read(lambda view: bytes(_checked(view, [resolve(view, wanted)])[0][0]))

    def get_many(self, versions: Iterable[str | Reference]) -> Stack:
        """The records of many versions of one kind as one block of numbers, seen at one moment.

        Raises:
            ConfigError: they differ in method, type or tensors; those that do are named.
            NotStoredError, CorruptAdapterError: see `get`.
        """
        wanted = [reference(version) for version in versions]

        def read(view: Snapshot) -> Stack:
            found = resolve_many(view, wanted)
            located = view.locate([one.object for one in found])
            return stack(
                [str(one) for one in found],
                located,
                lambda row, data: _decoded(found[row], Stored(located[row].digest, data))[1],
            )

        return self._read(read)

    def show(self, version: str | Reference) -> Version:
        """Everything known about a version without opening it.

        Raises:
            NotStoredError: no such version; the nearest thing is named.
        """
        wanted = reference(version)
        return self._read(lambda view: describe(view, resolve(view, wanted)))

    def find(self, *versions: str | Reference) -> str | None:
        """`name@3` of the first of these references that refers to something, all seen at one moment; else None."""
        found = self._find([reference(version) for version in versions])
        return found and str(found)

    def find_put(self, *versions: str | Reference) -> tuple[str, int] | None:
        """What `find` finds, and the entry of the log that put it: a number that is never used again.

        A name that was purged begins anew at 1, so that `name@1` may come to mean something else.
        """
        found = self._find([reference(version) for version in versions])
        return found and (str(found), found.entry)

    def names(self, pattern: str = "*", *, after: str = "", limit: int = 100) -> list[str]:
        """Up to `limit` names that match the pattern, in order, behind the name `after`."""
        return self._read(lambda view: listing.names(view, pattern, after, limit))

    def ls(self, wanted: Filter | str | None = None, *, limit: int | None = None) -> list[Version]:
        """The versions that meet the conditions (or whose names match a pattern), by name and version."""
        return list(itertools.islice(self.versions(wanted), limit))

    def versions(self, wanted: Filter | str | None = None) -> Iterator[Version]:
        """The same as a stream; for all of it at one moment, ask a `Store.snapshot()`."""
        for page in self._pages(_as_filter(wanted)):
            yield from self._read(lambda view, page=page: [describe(view, one) for one in page])

    def iterate(self, wanted: Filter | str | None = None) -> Iterator[tuple[str, Record]]:
        """(`name@version`, record) of all versions that meet the conditions, by name and version, as a stream.

        Each page is seen at one moment; for all of it at one moment, iterate over a `Store.snapshot()`.
        """
        for page in self._pages(_as_filter(wanted)):
            records = self._read(lambda view, page=page: _still_there(view, page))
            yield from records

    def log(self, name: str | None = None, *, after: int = 0, limit: int = 1000) -> list[Entry]:
        """The entries of the audit log about `name`, or all, behind entry `after`, oldest first.

        Raises:
            NotStoredError: no such name.
        """

        def read(view: Snapshot) -> list[Entry]:
            number = None if name is None else find_name(view, check_name(name)).id
            return audit.entries(view, number, after, limit)

        return self._read(read)

    def head(self) -> Head:
        """The end of the audit log: note it outside of the store, and `verify` can prove that nothing was rewritten."""
        return self._read(audit.head)

    def stats(self, *, largest: int = 10) -> Stats:
        """What is in the store, and what it takes; with the `largest` names."""
        return self._read(lambda view: listing.stats(view, self._backend.sizes(), largest))

    def _pages(self, wanted: Filter) -> Iterator[list[Found]]:
        after: tuple[str, int] | None = ("", 0)
        while after is not None:
            found, after = self._read(lambda view, after=after: listing.page(view, wanted, after, _PAGE))
            yield found


@final
class Frozen(Readable):
    """A store as of one moment, whatever others do to it meanwhile."""

    def __init__(self, backend: Backend, view: Snapshot) -> None:
        self._backend, self._view = backend, view

    def _read(self, action: Callable[[Snapshot], T], *, single: bool = False) -> T:  # noqa: ARG002 - it is open anyway
        with self._backend.said():
            return action(self._view)


def _as_filter(wanted: Filter | str | None) -> Filter:
    return check_filter(wanted if isinstance(wanted, Filter) else Filter(name=wanted))


def _records(view: Snapshot, found: Sequence[Found]) -> list[Record]:
    return [record for _, record in _checked(view, found)]


def _still_there(view: Snapshot, page: Sequence[Found]) -> list[tuple[str, Record]]:
    # between two reads versions may have been removed; whoever looks at one moment misses none
    query = "SELECT 1 FROM versions WHERE name = ? AND version = ? AND object = ?"
    there = [one for one in page if view.rows(query, one.name_id, one.version, one.object)]
    return [(str(one), record) for one, record in zip(there, _records(view, there), strict=True)]


def _checked(view: Snapshot, found: Sequence[Found]) -> list[tuple[Data, Record]]:
    """Bytes and record of each version; `decode` has checked them against the digest that they state."""
    return list(map(_decoded, found, view.load([one.object for one in found])))


def _decoded(one: Found, stored: Stored) -> tuple[Data, Record]:
    try:
        record = decode(stored.data)
    except CorruptAdapterError as error:
        raise CorruptAdapterError(f"{one}: {error}") from error
    if stated_digest(stored.data) != stored.digest:
        raise CorruptAdapterError(
            f"{one}: the store holds another record in its place; restore it from a backup"
        )
    return stored.data, record
