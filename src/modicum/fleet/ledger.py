"""The state of a job on the disk: whose rows there are, what has been done with them, what became of each user.

One SQLite file in the folder of the job, readable by its owner alone. Every change is there as a whole or not at all,
also after a kill. Users' rows are only in it while the job runs; `forget_rows` erases them.
"""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, final

from modicum.data.files import Row, Rows
from modicum.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

FILE = "fleet.sqlite"
_FORMAT = 2
_TABLES = """
CREATE TABLE facts(name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE users(
  id INTEGER PRIMARY KEY, user TEXT NOT NULL UNIQUE, file TEXT NOT NULL, other TEXT,
  rows INTEGER NOT NULL DEFAULT 0, bytes INTEGER NOT NULL DEFAULT 0, name TEXT, parent TEXT,
  state TEXT, detail TEXT NOT NULL DEFAULT '{}'
);
CREATE TABLE rows(user INTEGER NOT NULL, file TEXT NOT NULL, line INTEGER NOT NULL, data TEXT NOT NULL);
CREATE TABLE unread(file TEXT NOT NULL, line INTEGER NOT NULL, fault TEXT NOT NULL);
CREATE TABLE cohorts(cohort INTEGER PRIMARY KEY, seconds REAL NOT NULL, tokens INTEGER);
"""


@dataclass(frozen=True)
class User:
    """One user as gathered, before its rows are looked at."""

    id: int
    user: str
    #: the file of its first row, and another one where it turned up too
    file: str
    other: str | None
    rows: int
    #: characters of its rows, as JSON
    bytes: int
    #: name of its adapter, and the version that training goes on from
    name: str | None
    parent: str | None

    @property
    def order(self) -> tuple[int, int, int]:
        """What cohorts are sorted by: users with as many rows, and rows as long, are together."""
        return self.rows, self.bytes, self.id


@dataclass(frozen=True)
class Outcome:
    """What became of one user."""

    user: str
    #: stored, base (which is better), faulty, diverged
    state: str
    #: everything else that is known: version, metrics, steps, rows, notes
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """What became of the users of one cohort, and what that took."""

    outcomes: list[Outcome]
    #: of whoever trained it, alone or beside others; its adapters are then in the store
    seconds: float
    #: of all its passes, padding included, unless users stop early
    tokens: int


@final
class Ledger:
    """The file of one job; a connection belongs to one thread."""

    def __init__(self, folder: Path) -> None:
        """Open the ledger in `folder`, or begin one.

        Raises:
            ConfigError: it is of another format, or no ledger.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        path.touch(mode=0o600)
        self.path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        try:
            # what is erased is overwritten; what is said to be kept is on the disk
            self._db.executescript(
                "PRAGMA secure_delete=ON; PRAGMA synchronous=FULL; PRAGMA journal_mode=WAL;"
            )
            if not self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                with self.change():
                    for statement in _TABLES.strip().rstrip(";").split(";"):
                        self._db.execute(statement)
                    self.note("format", _FORMAT)
            if self.fact("format") == 1:
                self._upgrade()
            found = self.fact("format")
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ConfigError(f"{path} is no ledger of a fleet ({error}); take --overwrite") from error
        if found != _FORMAT:
            self._db.close()
            raise ConfigError(f"{path} has format {found}, this modicum reads {_FORMAT}; upgrade modicum")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    @contextmanager
    def change(self) -> Iterator[None]:
        """Everything within is kept, or nothing of it."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _upgrade(self) -> None:
        """Make format 2 of format 1, which noted the clock between two endings, shared by the workers of the time."""
        with self.change():
            if self.fact("format") != 1:
                return
            self.note("clock", self._db.execute("SELECT total(seconds) FROM cohorts").fetchone()[0])
            self._db.execute("UPDATE cohorts SET seconds = seconds * ?", (self.fact("workers") or 1,))
            self._db.execute("ALTER TABLE cohorts ADD COLUMN tokens INTEGER")
            self.note("format", 2)

    def note(self, name: str, value: Any) -> None:
        """Returns when the fact `name` is `value`."""
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def fact(self, name: str) -> Any:
        """The value of the fact `name`, None if it was not noted."""
        found = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if found is None else json.loads(found[0])

    def clear(self) -> None:
        """Returns when nothing is gathered."""
        for table in ("users", "rows", "unread", "cohorts"):
            self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - our own words

    def add_rows(self, user: str, file: str, rows: Sequence[tuple[int, Row]]) -> None:
        """Returns when the `rows` (line, row) of `file` belong to `user`."""
        found = self._db.execute("SELECT id, file FROM users WHERE user = ?", (user,)).fetchone()
        if found is None:
            made = self._db.execute("INSERT INTO users(user, file) VALUES (?, ?)", (user, file))
            found = (made.lastrowid, file)
        texts = [json.dumps(row, ensure_ascii=False, sort_keys=True, default=str) for _, row in rows]
        self._db.executemany(
            "INSERT INTO rows VALUES (?, ?, ?, ?)",
            [(found[0], file, line, text) for (line, _), text in zip(rows, texts, strict=True)],
        )
        self._db.execute(
            "UPDATE users SET rows = rows + ?, bytes = bytes + ?, other = coalesce(other, ?) WHERE id = ?",
            (len(rows), sum(map(len, texts)), None if file == found[1] else file, found[0]),
        )

    def add_unread(self, file: str, line: int, fault: str) -> None:
        """Returns when it is noted that a row cannot be given to anybody."""
        self._db.execute("INSERT INTO unread VALUES (?, ?, ?)", (file, line, fault))

    def index(self) -> None:
        """Returns when the rows of a user are found at once."""
        self._db.execute("CREATE INDEX IF NOT EXISTS rows_of ON rows(user)")

    def unread(self, limit: int) -> tuple[int, list[str]]:
        """How many rows belong to nobody, and what is wrong with the first ones."""
        count = self._db.execute("SELECT count(*) FROM unread").fetchone()[0]
        rows = self._db.execute("SELECT file, line, fault FROM unread LIMIT ?", (limit,))
        return count, [f"{file}:{line}: {fault}" for file, line, fault in rows]

    def users(self, *, waiting: bool = False) -> list[User]:
        """All users in the order of their first rows; or those of whom nothing is known yet."""
        query = "SELECT id, user, file, other, rows, bytes, name, parent FROM users"
        where = " WHERE state IS NULL" if waiting else ""
        return [User(*row) for row in self._db.execute(f"{query}{where} ORDER BY id")]

    def name_users(self, names: Iterable[tuple[int, str, str | None]]) -> None:
        """Returns when users (by id) have the name of their adapter, and the version it goes on from."""
        self._db.executemany(
            "UPDATE users SET name = ?, parent = ? WHERE id = ?", [(n, p, i) for i, n, p in names]
        )

    def rows_of(self, user: User) -> Rows:
        """The rows of a user."""
        query = "SELECT file, line, data FROM rows WHERE user = ? ORDER BY rowid"
        found = self._db.execute(query, (user.id,)).fetchall()
        places = [(file, line) for file, line, _ in found]
        return Rows(user.user, [json.loads(data) for _, _, data in found], places)

    def settle(self, outcomes: Iterable[Outcome]) -> None:
        """Returns when it is noted what became of users."""
        values = [(one.state, json.dumps(one.detail), one.user) for one in outcomes]
        self._db.executemany("UPDATE users SET state = ?, detail = ? WHERE user = ?", values)

    def finish(self, cohort: int, found: Finished, clock: float) -> None:
        """Returns when it is on the disk what became of a cohort; `clock`: seconds since the one before."""
        with self.change():
            self.settle(found.outcomes)
            self._db.execute("INSERT INTO cohorts VALUES (?, ?, ?)", (cohort, found.seconds, found.tokens))
            self.note("clock", self.clock + clock)

    @property
    def clock(self) -> float:
        """Seconds that passed while cohorts were trained, one or several at a time."""
        return self.fact("clock") or 0.0

    def finished(self) -> dict[int, tuple[float, int | None]]:
        """The cohorts that are finished: the seconds of each, and its tokens (None where they were not noted)."""
        found = self._db.execute("SELECT cohort, seconds, tokens FROM cohorts")
        return {cohort: (seconds, tokens) for cohort, seconds, tokens in found}

    def outcomes(self) -> list[Outcome]:
        """What became of every user of whom it is known, in the order of their first rows."""
        query = "SELECT user, state, detail FROM users WHERE state IS NOT NULL ORDER BY id"
        return [Outcome(user, state, json.loads(detail)) for user, state, detail in self._db.execute(query)]

    def forget_rows(self) -> None:
        """Returns when no row of any user is in the file any more."""
        self._db.execute("DELETE FROM rows")
        self._db.execute("VACUUM")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
