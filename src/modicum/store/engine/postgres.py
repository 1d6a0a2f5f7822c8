"""The backend for many machines: rows in PostgreSQL, objects in a bucket; see docs/design/store.md."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, LiteralString, Self, final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from modicum.errors import ConfigError, ModicumError, StoreError
from modicum.store.engine import upkeep
from modicum.store.engine.bucket import Bucket
from modicum.store.engine.connections import Connections
from modicum.store.engine.rows import PostgresChange, PostgresView, tables_here

try:
    import psycopg
    from psycopg import errors, sql
    from psycopg.adapt import Dumper, Loader
except ImportError as _error:
    raise ConfigError(
        "a store on PostgreSQL needs psycopg and fsspec: pip install 'modicum[postgres]'"
    ) from _error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modicum.store.engine.interface import Compacted

FORMAT = 1
_TABLES = """
CREATE TABLE settings(key TEXT PRIMARY KEY, value BLOB);
CREATE TABLE objects(
    id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, size INTEGER NOT NULL, uses INTEGER NOT NULL);
CREATE TABLE dead(
    id INTEGER GENERATED ALWAYS AS IDENTITY PRIMARY KEY, digest BLOB NOT NULL, size INTEGER NOT NULL,
    burial INTEGER NOT NULL, erase INTEGER NOT NULL DEFAULT 0);
"""


@dataclass(frozen=True)
class Address:
    """What `postgresql://user@host/database?objects=s3://bucket/folder&schema=modicum` says."""

    #: for libpq, and for people: without the password
    connection: str
    shown: str
    #: where objects are; the store knows where it was made with, so this may be left out
    objects: str | None
    schema: str

    @classmethod
    def parse(cls, location: str) -> Self:
        """The parts of `location`; whatever it has beside ours is left to libpq.

        Raises:
            ConfigError: it is no such address.
        """
        try:
            parts = urlsplit(location)
            plain = parts.query.replace("+", "%2B")  # which libpq does not take for a space
            query = parse_qsl(plain, keep_blank_values=True, strict_parsing=bool(plain))
        except ValueError as error:
            raise ConfigError(f"no address of a PostgreSQL database: {error}") from error
        ours = {key: value for key, value in query if key in ("objects", "schema")}
        rest = [(key, value) for key, value in query if key not in ours]
        shown = [(key, value) for key, value in query if key not in ("password", "sslpassword")]
        who, at, host = parts.netloc.rpartition("@")
        objects = ours.get("objects") or None
        if objects and "://" not in objects:
            objects = str(Path(objects).absolute())
        return cls(
            f"postgresql://{parts.netloc}{parts.path}?{urlencode(rest, quote_via=quote)}",
            f"postgresql://{who.partition(':')[0]}{at}{host}{parts.path}?{urlencode(shown, safe='/:')}".rstrip(
                "?"
            ),
            objects,
            ours.get("schema") or "modicum",
        )


@final
class Postgres:
    """A store in a schema of a PostgreSQL database and a bucket, for any number of machines."""

    def __init__(self, location: str, tables: str, *, timeout: float = 60.0) -> None:
        """Open the store; a writer waits `timeout` seconds for others. `tables`: those of the catalogue.

        Raises:
            StoreError: there is none, it cannot be reached, or it is of a newer format.
        """
        self.address, self.tables, self.timeout = Address.parse(location), tables, timeout
        self.location = self.address.shown
        self._connections: Connections[psycopg.Connection] = Connections(self.location)
        with self.said():
            found = {key: bytes(value) for key, value in self._settings()}
            if found.get("format") != str(FORMAT).encode():
                self.close()
                raise StoreError(
                    f"{self.location} has format {found.get('format', b'?').decode()}, this modicum knows {FORMAT}: "
                    "upgrade modicum"
                )
            self.number = found["store"]
            self.bucket = Bucket(self.address.objects or found["objects"].decode(), self.number)

    @classmethod
    def create(cls, location: str, tables: str) -> None:
        """Make an empty store with the catalogue's `tables`, as a whole or not at all; an existing one is left alone.

        Raises:
            ConfigError: the address does not say where objects are to be kept.
            StoreError: database or bucket cannot be reached or written.
        """
        address = Address.parse(location)
        with said(address.shown, 60.0), contextlib.closing(connect(address, 60.0)) as db, db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", [f"modicum {address.schema}"])
            if _exists(db, address.schema):
                return
            if address.objects is None:
                raise ConfigError(
                    f"{address.shown} does not say where objects are to be kept: add ?objects=s3://BUCKET/FOLDER, or "
                    "objects= with a folder that all machines share"
                )
            settings = {
                "format": FORMAT, "store": os.urandom(8), "objects": address.objects.encode(), "burials": 0,
            }  # fmt: skip
            Bucket(address.objects, settings["store"]).check()
            db.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(address.schema)))
            db.execute(tables_here(_TABLES + tables).encode())
            with db.cursor() as cursor:
                cursor.executemany("INSERT INTO settings VALUES (%s, %s)", settings.items())

    @contextlib.contextmanager
    def snapshot(self, *, pinned: bool = False, single: bool = False) -> Iterator[PostgresView]:
        """A view for some reads, or a `single` one; compactions spare a `pinned` one, which has its own connection."""
        with contextlib.ExitStack() as stack:
            if pinned:
                db = stack.enter_context(contextlib.closing(connect(self.address, self.timeout)))
                upkeep.pin(
                    PostgresView(db, self.bucket), self.number
                )  # before the view: it may see more, not less
            else:
                db = self.connection()
            if single:
                yield PostgresView(db, self.bucket)
                return
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                if pinned:
                    db.execute("SELECT 1")  # the first query is the moment that the view is of
                yield PostgresView(db, self.bucket)
            finally:
                # the server notices a closed connection later, and until then would spare what nobody sees
                _end(db, "ROLLBACK; SELECT pg_advisory_unlock_all()" if pinned else "ROLLBACK")

    @contextlib.contextmanager
    def change(self) -> Iterator[PostgresChange]:
        """The one change of this moment; acknowledged when the block ends without an error."""
        db = self.connection()
        # every statement sees what was committed before it, and the lock is held until after the commit: changes follow
        # each other as if each were alone
        db.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
        try:
            db.execute(
                "SELECT pg_advisory_xact_lock(%s::bigint)", [int.from_bytes(self.number, "big", signed=True)]
            )
            yield PostgresChange(db, self.bucket)
        except BaseException:
            _end(db)
            raise
        try:
            db.execute("COMMIT")
        except psycopg.OperationalError as error:
            raise StoreError(
                f"{self.location} went away while a change was being committed ({error}): it was kept as a whole or "
                "not at all; look which before you do it again"
            ) from error

    def erase(self) -> dict[int, int]:
        """Place -> bytes of every object that was waiting to be removed and now is."""
        with self.said():
            return upkeep.erase(self)

    def compact(self, dead: float = 0.5) -> Compacted:  # noqa: ARG002 - an object is nobody's as a whole or not at all
        """What was removed: objects that nobody uses and no pinned view sees, and what killed writers left."""
        with self.said():
            return upkeep.compact(self)

    def check(self, report: Callable[[str], None], progress: Callable[[int], None] | None = None) -> int:
        """Bytes of objects read and compared with their digests; every fault is reported in words."""
        return upkeep.check(self, report, progress)

    def backup(self, target: Path) -> int:
        """Bytes written to the new folder `target`: this store as of one moment, as an embedded one."""
        with self.said():
            return upkeep.backup(self, target)

    def sizes(self) -> dict[str, int]:
        """Bytes by part: objects that are used, those of nobody, and all tables with their indexes."""
        tables = (
            "SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
        )
        with self.said():  # a part of the view that is open, if one is
            view = PostgresView(self.connection(), self.bucket)
            return {
                "objects": view.rows("SELECT coalesce(sum(size), 0) FROM objects")[0][0],
                "dead": view.rows("SELECT coalesce(sum(size), 0) FROM dead")[0][0],
                "index": view.rows(tables)[0][0],
            }

    def close(self) -> None:
        """Returns when no connection is held any more."""
        self._connections.close()

    def connection(self) -> psycopg.Connection:
        """The connection of this thread in this process, a new one if it broke."""
        return self._connections.mine(lambda: connect(self.address, self.timeout))

    def said(self) -> contextlib.AbstractContextManager[None]:
        """Turns what PostgreSQL says inside into words that help, and nonsense in rows into damage."""
        return said(self.location, self.timeout)

    def _settings(self) -> list[tuple[str, bytes]]:
        try:
            return self.connection().execute("SELECT key, value FROM settings").fetchall()
        except errors.UndefinedTable:
            raise StoreError(
                f"no store in schema {self.address.schema!r} of {self.location}: make one (`modicum store init`)"
            ) from None


class _Number(Dumper):
    """Whole numbers as literals of no type, so that each takes that of its column, `settings.value` too."""

    oid = 0

    def dump(self, obj: int) -> bytes:
        return str(obj).encode()

    def quote(self, obj: int) -> bytes:
        return f" {obj}".encode()


class _Whole(Loader):
    """Sums of whole numbers, which PostgreSQL gives as `numeric`."""

    def load(self, data: Any) -> int:
        return int(bytes(data))


def connect(address: Address, timeout: float) -> psycopg.Connection:
    """A connection that sees the store's schema, waits `timeout` seconds for locks, and commits durably."""
    db = psycopg.connect(
        address.connection, autocommit=True, client_encoding="utf8", application_name="modicum"
    )
    try:
        db.adapters.register_dumper(int, _Number)
        db.adapters.register_loader("numeric", _Whole)
        db.execute(sql.SQL("SET search_path TO {}").format(sql.Identifier(address.schema)))
        db.execute("SELECT set_config('lock_timeout', %s, false)", [f"{max(1, int(timeout * 1000))}ms"])
        db.execute(
            "SELECT set_config('synchronous_commit', 'on', false) "
            "WHERE current_setting('synchronous_commit') IN ('off', 'local')"
        )
    except BaseException:
        db.close()
        raise
    return db


@contextlib.contextmanager
def said(location: str, timeout: float) -> Iterator[None]:
    """See `Postgres.said`; for a store that is not open yet."""
    try:
        yield
    except ModicumError:
        raise
    except psycopg.Error as error:
        raise StoreError(_advice(location, timeout, error)) from error
    except OSError as error:
        raise StoreError(f"{location}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise StoreError(
            f"{location} has damaged rows: run verify, and restore it from a backup ({type(error).__name__}: {error})"
        ) from error


def _advice(location: str, timeout: float, error: psycopg.Error) -> str:
    if isinstance(error, errors.LockNotAvailable):
        return (
            f"{location} is busy: another process has been changing it for {timeout:g} seconds; wait, or look into "
            "pg_stat_activity"
        )
    if isinstance(error, errors.InsufficientResources):
        return f"no room in the database of {location} ({error}): nothing of this change was kept; make room"
    if isinstance(error, psycopg.OperationalError):
        return f"{location} cannot be reached ({error}): nothing of this change was kept"
    return (
        f"{location}: PostgreSQL refuses ({type(error).__name__}: {error}): nothing of this change was kept"
    )


def _exists(db: psycopg.Connection, schema: str) -> bool:
    query = "SELECT 1 FROM pg_tables WHERE schemaname = %s AND tablename = 'settings'"
    return db.execute(query, [schema]).fetchone() is not None


def _end(db: psycopg.Connection, statement: LiteralString = "ROLLBACK") -> None:
    """Roll back; a connection that broke has done so itself."""
    with contextlib.suppress(psycopg.OperationalError):
        db.execute(statement)
