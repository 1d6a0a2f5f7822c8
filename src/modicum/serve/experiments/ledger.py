"""One SQLite file, one thread that writes to it in batches, and any number that read."""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, final

from modicum.errors import ModicumError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")
#: changes in one transaction, and seconds that those which nobody waits for wait for others
_BATCH, _LINGER = 1000, 0.02
#: changes that nobody waits for and that are kept while the disk takes none
_KEPT = 100_000
_TIMEOUT = 10.0


@dataclass(frozen=True)
class _Item:
    change: Callable[[sqlite3.Connection], Any]
    urgent: bool
    done: Future = field(default_factory=Future)


@final
class Ledger:
    """A file whose changes are acknowledged once they are on the disk, many of them in one flush."""

    def __init__(self, path: Path, tables: str) -> None:
        """The ledger in the file `path`, readable by its owner alone, made with `tables` if need be.

        Raises:
            StoreError: it cannot be opened, or is damaged.
        """
        self.path = path
        #: changes that nobody waited for and that were given up
        self.lost = 0
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._kept: deque[_Item] = deque()
        self._closed = False
        with self._said():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            db = self._connect()
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.executescript(f"BEGIN IMMEDIATE; {tables} COMMIT;")
            except BaseException:
                db.close()
                raise
        self._thread = threading.Thread(target=self._run, args=(db,), name="experiments-writer", daemon=True)
        self._thread.start()

    def submit(self, change: Callable[[sqlite3.Connection], T], *, urgent: bool = True) -> Future[T]:
        """What the change returns, once it is on the disk; before it raises a `ModicumError` it must not change a row.

        Without `urgent` it may wait a moment for others, and is tried again if the disk takes nothing.
        """
        if self._closed:
            raise StoreError(f"{self.path} has been closed")
        item = _Item(change, urgent)
        self._queue.put(item)
        return item.done

    def do(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """What the change returns, once it is on the disk.

        Raises:
            StoreError: the disk takes nothing; nothing was changed.
        """
        return self.submit(change).result()

    def read(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """What `action` makes of the file as of one moment."""
        with self._said(), contextlib.closing(self._connect()) as db:
            db.execute("BEGIN")
            return action(db)

    def close(self) -> None:
        """Returns when all that was submitted is on the disk, and the file is closed."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
            self._thread.join()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=_TIMEOUT, isolation_level=None, check_same_thread=False)
        for pragma in ("synchronous=FULL", "secure_delete=ON", "foreign_keys=OFF"):
            db.execute(f"PRAGMA {pragma}")
        return db

    def _run(self, db: sqlite3.Connection) -> None:
        with contextlib.closing(db):
            going_on = True
            while going_on:
                batch, going_on = self._gathered()
                # what could not be written earlier comes before what is about it, and does not take that along
                if earlier := list(self._kept):
                    self._kept.clear()
                    self._write(db, earlier)
                self._write(db, batch)
            self.lost += len(self._kept)

    def _gathered(self) -> tuple[list[_Item], bool]:
        """What is to be written now, and whether more may come."""
        batch: list[_Item] = []
        until = None
        while len(batch) < _BATCH:
            try:
                item = self._queue.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
            except queue.Empty:
                return batch, True
            if item is None:
                return batch, False
            batch.append(item)
            now = time.monotonic()
            until = min(until or now + _LINGER, now if item.urgent else now + _LINGER)
        return batch, True

    def _write(self, db: sqlite3.Connection, batch: list[_Item]) -> None:
        results: list[tuple[_Item, Any, BaseException | None]] = []
        try:
            with self._said():
                db.execute("BEGIN IMMEDIATE")
                for item in batch:
                    try:
                        results.append((item, item.change(db), None))
                    except ModicumError as error:
                        results.append((item, None, error))
                db.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 - whoever waits is told
            if db.in_transaction:
                db.execute("ROLLBACK")
            if len(batch) > 1 and not isinstance(error.__cause__, sqlite3.OperationalError):
                # it is the fault of one of them
                for item in batch:
                    self._write(db, [item])
            else:
                self._failed(batch, error)
            return
        for item, result, error in results:
            if error is not None:
                item.done.set_exception(error)
            else:
                item.done.set_result(result)

    def _failed(self, batch: list[_Item], error: Exception) -> None:
        for item in batch:
            if item.urgent:
                item.done.set_exception(error)
            elif len(self._kept) < _KEPT and isinstance(error.__cause__, sqlite3.OperationalError):
                self._kept.append(item)
            else:
                self.lost += 1

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"the experiments in {self.path} cannot be read or changed: {error}") from error
