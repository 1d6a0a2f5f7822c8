"""Files of the state folder: small SQLite databases that only their owner reads."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

from modicum.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator


def default_state() -> Path:
    """The state folder where none is named: `$MODICUM_STATE`, else `modicum` where the system keeps states."""
    if named := os.environ.get("MODICUM_STATE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "modicum"


def open_database(path: Path, tables: str) -> sqlite3.Connection:
    """The database `path` with the `tables`, made if need be; any thread may use it, one at a time.

    A commit is on the disk when it returns.

    Raises:
        StoreError: it cannot be opened.
    """
    with said(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.executescript(tables)
        except BaseException:
            db.close()
            raise
        return db


@contextlib.contextmanager
def changing(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """`db` in a change that happens as a whole, or, if an error leaves the block, not at all."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


@contextlib.contextmanager
def said(path: Path) -> Iterator[None]:
    """Words what SQLite and the file system raise as `StoreError`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"cannot use {path}: {error}") from error
