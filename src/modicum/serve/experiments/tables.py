"""What is kept of experiments: who got which arm, how the answers came out, and what users said of them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from secrets import token_bytes
from typing import TYPE_CHECKING, Any

from modicum.errors import ConflictError, NotStoredError, did_you_mean
from modicum.serve.experiments.design import Arm, Design, State

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

FILE = "experiments.sqlite"
#: a user has no `value` until the window after the first feedback (`rated`) has closed; `place` is the order of that
TABLES = """
CREATE TABLE IF NOT EXISTS experiments(
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, design TEXT NOT NULL, salt BLOB NOT NULL,
    state TEXT NOT NULL, weights TEXT NOT NULL, created REAL NOT NULL, started REAL, ended REAL, reason TEXT,
    winner TEXT, before TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS users(
    experiment INTEGER NOT NULL, user BLOB NOT NULL, arm TEXT NOT NULL, at REAL NOT NULL, rated REAL, value REAL,
    place INTEGER, PRIMARY KEY(experiment, user)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS users_open ON users(experiment, rated) WHERE place IS NULL AND rated IS NOT NULL;
CREATE INDEX IF NOT EXISTS users_closed ON users(experiment, place) WHERE place IS NOT NULL;
CREATE TABLE IF NOT EXISTS exposures(
    id INTEGER PRIMARY KEY, experiment INTEGER NOT NULL, arm TEXT NOT NULL, owner BLOB NOT NULL, user BLOB NOT NULL,
    response TEXT, at REAL NOT NULL, outcome TEXT NOT NULL, seconds REAL NOT NULL, first REAL, slow INTEGER);
CREATE INDEX IF NOT EXISTS exposures_of ON exposures(experiment, arm);
CREATE INDEX IF NOT EXISTS exposures_by ON exposures(experiment, user);
CREATE INDEX IF NOT EXISTS exposures_response ON exposures(response) WHERE response IS NOT NULL;
CREATE TABLE IF NOT EXISTS totals(
    experiment INTEGER NOT NULL, arm TEXT NOT NULL, requests INTEGER NOT NULL, errors INTEGER NOT NULL,
    cancelled INTEGER NOT NULL, timed INTEGER NOT NULL, slow INTEGER NOT NULL, prompt INTEGER NOT NULL,
    generated INTEGER NOT NULL, compared INTEGER NOT NULL, agreement REAL NOT NULL,
    PRIMARY KEY(experiment, arm)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS feedback(
    experiment INTEGER NOT NULL, user BLOB NOT NULL, response TEXT NOT NULL, arm TEXT NOT NULL, value REAL NOT NULL,
    at REAL NOT NULL, PRIMARY KEY(experiment, user, response)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owed(id INTEGER PRIMARY KEY AUTOINCREMENT, actor TEXT NOT NULL, about TEXT NOT NULL);
"""
_DUE = "WHERE experiment = ? AND place IS NULL AND rated IS NOT NULL AND rated <= ?"
_OF_AN_EXPERIMENT = ("users", "exposures", "totals", "feedback")


@dataclass(frozen=True)
class Experiment:
    """An experiment and how far it is."""

    id: int
    design: Design
    salt: bytes
    state: State
    #: with the weights of today
    arms: tuple[Arm, ...]
    created: float
    started: float | None = None
    ended: float | None = None
    #: why it ended
    reason: str | None = None
    #: the label of the arm that was found to be the best
    winner: str | None = None
    #: name of an adapter -> version that production pointed at when the experiment started
    before: dict[str, int | None] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called."""
        return self.design.name


@dataclass(frozen=True)
class Exposure:
    """An answer that a user got from an arm, or that its shadow gave and nobody got."""

    experiment: int
    arm: str
    owner: bytes
    user: bytes
    response: str | None
    at: float
    #: ok, error, cancelled (the client hung up, or had no more patience)
    outcome: str
    seconds: float
    #: seconds to the first token
    first: float | None
    prompt: int
    generated: int
    #: of a shadow: the share of tokens up to which it said the same
    agreement: float | None = None
    shadow: bool = False


@dataclass(frozen=True)
class Totals:
    """All answers of an arm; `slow` of the `timed` ones took longer than the control's limit at that time."""

    requests: int = 0
    errors: int = 0
    cancelled: int = 0
    timed: int = 0
    slow: int = 0
    prompt: int = 0
    generated: int = 0
    compared: int = 0
    agreement: float = 0.0


def load(db: sqlite3.Connection) -> dict[str, Experiment]:
    """All experiments, by name."""
    query = "SELECT id, design, salt, state, weights, created, started, ended, reason, winner, before FROM experiments"
    found = {}
    for number, design, salt, state, weights, *times, before in db.execute(query):
        made, now = Design.read(json.loads(design)), json.loads(weights)
        arms = tuple(dataclasses.replace(arm, weight=now[arm.label]) for arm in made.arms)
        found[made.name] = Experiment(number, made, salt, state, arms, *times, before=json.loads(before))
    return found


def create(db: sqlite3.Connection, design: Design, now: float) -> None:
    """Returns when the experiment is a draft.

    Raises:
        ConflictError: there is one of this name.
    """
    if db.execute("SELECT 1 FROM experiments WHERE name = ?", (design.name,)).fetchone():
        raise ConflictError(f"there is an experiment {design.name!r}: take another name, or delete that one")
    db.execute(
        "INSERT INTO experiments(name, design, salt, state, weights, created, before) "
        "VALUES (?, ?, ?, 'draft', ?, ?, ?)",
        (design.name, json.dumps(design.as_dict()), token_bytes(32), weights_text(design.arms), now, "{}"),
    )


def change(db: sqlite3.Connection, name: str, states: Sequence[State], **columns: Any) -> None:
    """Returns when the experiment has these columns, if it is in one of `states`.

    Raises:
        NotStoredError: there is no such experiment.
        ConflictError: it is in another state.
    """
    check_state(db, name, states)
    said = ", ".join(f"{column} = ?" for column in columns)
    db.execute(f"UPDATE experiments SET {said} WHERE name = ?", (*columns.values(), name))  # noqa: S608 - our own words


def check_state(db: sqlite3.Connection, name: str, states: Sequence[State]) -> int:
    """The number of the experiment, which is in one of `states`; see `change`."""
    found = db.execute("SELECT id, state FROM experiments WHERE name = ?", (name,)).fetchone()
    if found is None:
        names = [known for (known,) in db.execute("SELECT name FROM experiments LIMIT 1000")]
        raise NotStoredError(f"no experiment {name!r}{did_you_mean(name, names)}")
    if found[1] not in states:
        raise ConflictError(
            f"the experiment {name!r} is {found[1]}; this can be done to one that is {' or '.join(states)}"
        )
    return found[0]


def delete(db: sqlite3.Connection, name: str, states: Sequence[State]) -> None:
    """Returns when nothing is left of the experiment; see `change`."""
    number = check_state(db, name, states)
    for table in _OF_AN_EXPERIMENT:
        db.execute(f"DELETE FROM {table} WHERE experiment = ?", (number,))  # noqa: S608 - our own words
    db.execute("DELETE FROM experiments WHERE id = ?", (number,))


def weights_text(arms: Sequence[Arm]) -> str:
    """The weights as they are stored."""
    return json.dumps({arm.label: arm.weight for arm in arms})


def owe(db: sqlite3.Connection, actor: str, about: dict[str, dict[str, Any]]) -> None:
    """Returns when it is noted that the store's log still has to be told this."""
    db.execute("INSERT INTO owed(actor, about) VALUES (?, ?)", (actor, json.dumps(about)))


def owed(db: sqlite3.Connection) -> list[tuple[int, str, dict[str, dict[str, Any]]]]:
    """(number, actor, what) of all that the store's log still has to be told."""
    rows = db.execute("SELECT id, actor, about FROM owed ORDER BY id").fetchall()
    return [(number, actor, json.loads(about)) for number, actor, about in rows]


def told(db: sqlite3.Connection, number: int) -> None:
    """Returns when the log has been told what is owed under this number."""
    db.execute("DELETE FROM owed WHERE id = ?", (number,))


def expose(db: sqlite3.Connection, seen: Exposure, limit: float | None) -> None:
    """Returns when the answer is noted; `limit`: seconds above which it is slow, None if that is not known yet."""
    failed = seen.outcome == "error"
    slow = None if failed or limit is None else int(seen.seconds > limit)
    if not db.execute("SELECT 1 FROM experiments WHERE id = ?", (seen.experiment,)).fetchone():
        return  # deleted meanwhile
    if not seen.shadow:
        row = (seen.experiment, seen.user, seen.arm, seen.at)
        db.execute("INSERT OR IGNORE INTO users(experiment, user, arm, at) VALUES (?, ?, ?, ?)", row)
    db.execute(
        "INSERT INTO exposures(experiment, arm, owner, user, response, at, outcome, seconds, first, slow) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (seen.experiment, seen.arm, seen.owner, seen.user, seen.response, seen.at, seen.outcome, seen.seconds,
         seen.first, slow),
    )  # fmt: skip
    more = Totals(
        1, int(failed), int(seen.outcome == "cancelled"), int(slow is not None), slow or 0, seen.prompt, seen.generated,
        int(seen.agreement is not None), seen.agreement or 0.0,
    )  # fmt: skip
    names = [field.name for field in dataclasses.fields(Totals)]
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in names)
    db.execute(
        f"INSERT INTO totals(experiment, arm, {', '.join(names)}) VALUES (?, ?{', ?' * len(names)}) "  # noqa: S608
        f"ON CONFLICT(experiment, arm) DO UPDATE SET {sums}",
        (seen.experiment, seen.arm, *dataclasses.astuple(more)),
    )


def due(db: sqlite3.Connection, experiment: int, until: float) -> bool:
    """Whether there is a user whose outcome can be fixed; see `close_windows`."""
    return db.execute(f"SELECT 1 FROM users {_DUE} LIMIT 1", (experiment, until)).fetchone() is not None  # noqa: S608


def close_windows(db: sqlite3.Connection, experiment: int, until: float, window: float) -> int:
    """How many users' outcomes are now fixed: those who first said something at `until` or before.

    It is the mean over what they said within `window` seconds of the arm they had first, to three decimals.
    """
    query = (
        "SELECT user, (SELECT avg(f.value) FROM feedback f WHERE f.experiment = users.experiment "  # noqa: S608
        f"AND f.user = users.user AND f.arm = users.arm AND f.at <= rated + ?) FROM users {_DUE} ORDER BY rated, user"
    )
    rows = db.execute(query, (window, experiment, until)).fetchall()
    query = "SELECT coalesce(max(place), 0) FROM users WHERE experiment = ? AND place IS NOT NULL"
    (last,) = db.execute(query, (experiment,)).fetchone()
    db.executemany(
        "UPDATE users SET value = ?, place = ? WHERE experiment = ? AND user = ?",
        ((round(value, 3), place, experiment, user) for place, (user, value) in enumerate(rows, last + 1)),
    )
    return len(rows)


def outcomes(db: sqlite3.Connection, experiment: int) -> dict[str, list[float]]:
    """Arm -> outcomes of its users, in the order in which they were fixed."""
    found: dict[str, list[float]] = {}
    query = "SELECT arm, value FROM users WHERE experiment = ? AND place IS NOT NULL ORDER BY place"
    for arm, value in db.execute(query, (experiment,)):
        found.setdefault(arm, []).append(value)
    return found


def totals(db: sqlite3.Connection, experiment: int) -> dict[str, Totals]:
    """Arm -> its totals."""
    names = ", ".join(field.name for field in dataclasses.fields(Totals))
    rows = db.execute(f"SELECT arm, {names} FROM totals WHERE experiment = ?", (experiment,))  # noqa: S608 - our own
    return {arm: Totals(*rest) for arm, *rest in rows}


def forget(db: sqlite3.Connection, experiment: int, user: bytes) -> int:
    """How many rows were erased about a user; a fixed outcome stays as one of nobody's."""
    count = 0
    for table in ("exposures", "feedback"):
        query = f"DELETE FROM {table} WHERE experiment = ? AND user = ?"  # noqa: S608 - our own words
        count += db.execute(query, (experiment, user)).rowcount
    of_user = "WHERE experiment = ? AND user = ?"
    query = f"DELETE FROM users {of_user} AND value IS NULL"  # noqa: S608 - our own words
    count += db.execute(query, (experiment, user)).rowcount
    query = f"UPDATE users SET user = ? {of_user}"  # noqa: S608 - our own words
    return count + db.execute(query, (token_bytes(len(user)), experiment, user)).rowcount
