"""Who may ask for what: API keys, in one SQLite file of the state folder.

A key is `mod-` and 256 random bits, shown once and stored as its SHA-256. A slow hash protects passwords that people
think up; what was drawn from 2²⁵⁶ cannot be guessed from any hash, and every request would pay for the slowness.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from modicum.errors import ConfigError, ConflictError, NotStoredError, did_you_mean, too_low
from modicum.serve.state import changing, open_database, said
from modicum.store.catalogue.names import check_label

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator
    from pathlib import Path

FILE = "keys.sqlite"
PREFIX = "mod-"
#: who asks where no key was ever made
LOCAL = "local"
#: what metrics call tenants beyond the first ones
_RESERVED = (LOCAL, "other")
_TABLE = (
    "CREATE TABLE IF NOT EXISTS keys(name TEXT PRIMARY KEY, digest BLOB NOT NULL UNIQUE, about TEXT NOT NULL, "
    "created REAL NOT NULL, revoked REAL);"
)
_PATTERN = re.compile(r"[A-Za-z0-9_.+=/*-]{1,200}", re.ASCII)
#: bytes of a digest by which keys are found; the rest is compared in constant time
_INDEX = 8


@dataclass(frozen=True)
class Key:
    """What the holder of a key may do; its name is the tenant's in metrics, logs and the log of the store."""

    name: str
    #: names of adapters it sees; `*` stands for any characters
    adapters: tuple[str, ...] = ()
    #: whether it may use the base model alone
    base: bool = False
    #: whether it may use the admin's routes
    admin: bool = False
    #: whether it may read the metrics of all tenants
    metrics: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    #: requests at a time
    concurrent: int | None = None
    created: float = 0.0
    revoked: float | None = None

    def sees(self, name: str) -> bool:
        """Whether the adapter `name` exists for this key."""
        return any(_matcher(pattern)(name) for pattern in self.adapters)

    def faults(self) -> list[str]:
        """Everything that is wrong with it."""
        limits = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrent")
        wrong = too_low(self, {name: 1 for name in limits if getattr(self, name) is not None})
        wrong += [
            f"the pattern {pattern!r} matches no adapter: it may have letters, digits, _ . + = - / and *"
            for pattern in self.adapters
            if not _PATTERN.fullmatch(pattern)
        ]
        if self.name in _RESERVED:
            wrong.append(f"the name {self.name!r} is reserved")
        if not (self.adapters or self.base or self.admin or self.metrics):
            wrong.append("it may do nothing: give it adapters, the base model, admin or metrics")
        return wrong


#: everybody, where there are no keys
EVERYBODY = Key(LOCAL, adapters=("*",), base=True, admin=True, metrics=True)


class Keys:
    """The keys of a state folder; every process sees the changes of all others at once."""

    def __init__(self, folder: Path) -> None:
        """The keys in `folder`, which is made if need be, readable by its owner alone."""
        self.path = folder / FILE
        self._lock = threading.RLock()
        self._db = open_database(self.path, _TABLE)
        self._seen: int | None = None
        self._keys: dict[bytes, tuple[bytes, Key]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Returns when the file is closed."""
        with self._lock:
            self._db.close()

    def exist(self) -> bool:
        """Whether a key was ever made; until then everybody on this machine may do everything."""
        return bool(self._current())

    def find(self, secret: str | None) -> Key | None:
        """Who presents `secret`; None if it is no key, or one that was revoked."""
        known = self._current()
        if not known:
            return EVERYBODY
        digest = _digest(secret or "")
        # the time of this look-up tells something of the digest, which tells nothing of the key
        stored, key = known.get(digest[:_INDEX], (bytes(len(digest)), None))
        right = hmac.compare_digest(stored, digest)
        return key if right and key is not None and key.revoked is None else None

    def list(self) -> list[Key]:
        """All keys, revoked ones too, by name."""
        return sorted((key for _, key in self._current().values()), key=lambda key: key.name)

    def add(self, name: str, **about: Any) -> str:
        """The secret of the new key `name`; `about` are the fields of `Key`. It cannot be had again.

        Raises:
            ConfigError: everything that is wrong with it.
            ConflictError: there is or was such a key.
        """
        key = Key(check_label(name, "a key"), **about)
        if wrong := key.faults():
            raise ConfigError(f"cannot make the key {name!r}: " + "; ".join(wrong))
        secret = _new()
        stored = {
            field.name: getattr(key, field.name)
            for field in dataclasses.fields(key)
            if field.name not in {"name", "created", "revoked"}
        }
        row = (name, _digest(secret), json.dumps(stored), time.time())
        with self._change() as db:
            if db.execute("SELECT 1 FROM keys WHERE name = ?", (name,)).fetchone():
                raise ConflictError(
                    f"there is or was a key {name!r}: rotate it for a new secret, or choose another name; names are "
                    "not used again, so that logs stay true"
                )
            db.execute("INSERT INTO keys(name, digest, about, created) VALUES (?, ?, ?, ?)", row)
        return secret

    def rotate(self, name: str) -> str:
        """The new secret of the key `name`; the old one is worth nothing from now on.

        Raises:
            NotStoredError: there is no such key, or it was revoked.
        """
        secret = _new()
        self._update("UPDATE keys SET digest = ? WHERE name = ? AND revoked IS NULL", _digest(secret), name)
        return secret

    def revoke(self, name: str) -> None:
        """Returns when nobody can use the key `name` any more; requests that run are finished.

        Raises:
            NotStoredError: there is no such key, or it was revoked.
        """
        self._update("UPDATE keys SET revoked = ? WHERE name = ? AND revoked IS NULL", time.time(), name)

    def _update(self, query: str, value: bytes | float, name: str) -> None:
        with self._change() as db:
            if not db.execute(query, (value, name)).rowcount:
                active = [key.name for key in self.list() if key.revoked is None]
                raise NotStoredError(f"no key {name!r} in {self.path}{did_you_mean(name, active)}")

    def _current(self) -> dict[bytes, tuple[bytes, Key]]:
        with self._lock, said(self.path):
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
            if version != self._seen:
                rows = self._db.execute("SELECT name, digest, about, created, revoked FROM keys").fetchall()
                self._keys = {row[1][:_INDEX]: (row[1], _read(*row)) for row in rows}
                self._seen = version
            return self._keys

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock, said(self.path), changing(self._db):
            yield self._db
            # the version tells only what other connections changed
            self._seen = None


def _new() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def _read(name: str, _: bytes, about: str, created: float, revoked: float | None) -> Key:
    values = json.loads(about)
    return Key(name, created=created, revoked=revoked, **values | {"adapters": tuple(values["adapters"])})


@functools.lru_cache(maxsize=4096)
def _matcher(pattern: str) -> Any:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.ASCII).fullmatch
