"""One connection for each thread of each process: what both databases want."""

from __future__ import annotations

import os
import threading
import weakref
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, final

from modicum.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable


class _Closes(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closes)
#: connections that belong to a parent process; closing one there would harm the parent
_inherited: list[_Closes] = []


@final
class Connections(Generic[T]):
    """The connections of an open store: each ends with its thread, and a forked child leaves its parent's alone."""

    def __init__(self, location: str) -> None:
        """`location`: the store, for messages."""
        self._location, self._closed, self._mine = location, False, threading.local()
        self._all: weakref.WeakSet[_Held[T]] = weakref.WeakSet()

    def mine(self, make: Callable[[], T]) -> T:
        """The connection of this thread in this process; made if there is none yet, or if it broke.

        Raises:
            StoreError: the store has been closed.
        """
        if self._closed:
            raise StoreError(f"{self._location} has been closed; open it again")
        held: _Held[T] | None = getattr(self._mine, "held", None)
        if held is None or held.process != os.getpid() or getattr(held.db, "closed", False):
            held = self._mine.held = _Held(make())
            self._all.add(held)
        return held.db

    def close(self) -> None:
        """Returns when none is open any more, and none can be made."""
        self._closed = True
        for held in list(self._all):
            held.close()


class _Held(Generic[T]):
    """A connection, and the process that may close it."""

    def __init__(self, db: T) -> None:
        self.process, self.db, self.closed = os.getpid(), db, False

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.process == os.getpid():
            self.db.close()
        else:
            _inherited.append(self.db)

    def __del__(self) -> None:
        self.close()
