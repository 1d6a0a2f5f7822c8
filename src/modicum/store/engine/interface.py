"""What the adapter store asks of the place where it keeps things.

Queries are SQL as SQLite and PostgreSQL both take it, with `?` for values. A change is exclusive: there is one at
a time in the whole store, in whatever process or machine, and it happens as a whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from modicum.errors import ModicumError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

#: bytes that a backend may need beside those of an object, to read it
ROOM = 16
#: the bytes of an object, as they are given or as they were read
Data = bytes | memoryview


class MovedError(ModicumError):
    """An object is no longer where a view says; a fresh view knows. Caught by the store."""


@dataclass(frozen=True)
class Payload:
    """An object to be kept, and the digest it is known by (see `objects.digest_of`)."""

    digest: bytes
    data: bytes


@dataclass(frozen=True)
class Stored:
    """An object as read: the digest under which it is listed, and bytes that are not checked against it yet."""

    digest: bytes
    data: Data


@dataclass(frozen=True)
class Located:
    """An object that is found but not read yet: the digest under which it is listed, and its size."""

    digest: bytes
    size: int
    #: its bytes, unchecked, raising what `Snapshot.load` raises; on memory of `ROOM + size` bytes, if some is given
    read: Callable[[bytearray | None], Data]


@dataclass(frozen=True)
class Compacted:
    """What a compaction did."""

    #: segments (or whatever holds objects) that are gone, and bytes that came free
    segments: int
    bytes: int
    #: bytes of objects that were copied to be kept
    moved: int
    #: objects that could not be moved because they are damaged
    faults: tuple[str, ...] = ()


class Snapshot(Protocol):
    """A consistent view: nothing that others do changes it.

    Beside the catalogue's tables there are `objects(id, digest, size, uses)` and `settings(key, value)`.
    """

    def rows(self, query: str, *values: Any) -> list[tuple]:
        """All rows of a query."""
        ...

    def rows_of(
        self, query: str, keys: Sequence[Any], *values: Any, wanted: int | None = None
    ) -> list[tuple]:
        """All rows of a query for many keys, in any order: `{}` in it is a list of some of them, before the values.

        `wanted`: the column of objects that will be located next, so that the disk may begin to fetch them.
        """
        ...

    def rows_located(self, query: str, *values: Any) -> list[tuple[tuple, Located]]:
        """All rows of a query, in any order, each with where the object is that its column `object` names; see `load`.

        One statement asks for both.
        """
        ...

    def locate(self, objects: Sequence[int]) -> list[Located]:
        """Where the objects with these numbers are, in this order; see `load`."""
        ...

    def load(self, objects: Sequence[int]) -> list[Stored]:
        """The objects with these numbers, in this order.

        Raises:
            MovedError: one is no longer where this view says; a fresh view knows.
            CorruptAdapterError: it is there no more, or cut short.
        """
        ...


class Change(Snapshot, Protocol):
    """A view that also changes, alone in the store until it ends."""

    def run(self, query: str, *values: Any) -> int:
        """How many rows the statement changed."""
        ...

    def run_many(self, query: str, rows: Iterable[tuple]) -> None:
        """Returns when the statement ran for every one of `rows`."""
        ...

    def add(self, payloads: Sequence[Payload]) -> list[int]:
        """The number of each object, which is kept once however often it is added, with one use more."""
        ...

    def drop(self, objects: Iterable[int]) -> int:
        """Bytes of the objects that have no use left after one less for each time that `objects` names them."""
        ...

    def erase(self, digests: Iterable[bytes]) -> int:
        """Bytes of objects with these digests that have no use left, now or since long, and are to be overwritten."""
        ...

    def erased(self, places: Iterable[int]) -> None:
        """Returns when `places` (see `Backend.erase`) are no longer listed as waiting."""
        ...


class Backend(Protocol):
    """Where a store keeps its rows and its objects."""

    #: what the user called it
    location: str

    def snapshot(self, *, pinned: bool = False, single: bool = False) -> AbstractContextManager[Snapshot]:
        """A view for some reads; a `pinned` one stays readable for as long as it takes.

        A `single` one is for one statement, which is a moment by itself and costs no transaction.
        """
        ...

    def change(self) -> AbstractContextManager[Change]:
        """The change that is acknowledged, and seen by others, once the block is left without an error."""
        ...

    def said(self) -> AbstractContextManager[None]:
        """Turns what the database and the system say inside into `StoreError`s that help."""
        ...

    def erase(self) -> dict[int, int]:
        """Place -> bytes of every place that was waiting to be overwritten and now is, traces elsewhere included."""
        ...

    def compact(self, dead: float = 0.5) -> Compacted:
        """What was rewritten: whatever holds objects and of which more than the share `dead` is used by nobody."""
        ...

    def check(self, report: Callable[[str], None], progress: Callable[[int], None] | None = None) -> int:
        """Bytes of objects read and compared with their digests; every fault is reported in words."""
        ...

    def backup(self, target: Path) -> int:
        """Bytes written to `target`, a complete store as of one moment, while others go on."""
        ...

    def sizes(self) -> dict[str, int]:
        """Bytes on disk by part."""
        ...

    def close(self) -> None:
        """Returns when nothing is held any more."""
        ...
