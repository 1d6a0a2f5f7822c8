"""What users say of answers: by response, or by user and experiment; once for each, the last word counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, ConflictError, NotStoredError
from modicum.serve.experiments.assignment import owner, pseudonym
from modicum.serve.experiments.design import KINDS

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

    from modicum.serve.experiments.tables import Experiment

#: the same for what is another tenant's and for what never was
_UNKNOWN = "no answer of an experiment that this could be about was given to you"


@dataclass(frozen=True)
class Feedback:
    """What one user says; either `response`, or `experiment` and `user`."""

    kind: str
    given: Any
    response: str | None = None
    experiment: str | None = None
    user: str | None = None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Feedback:
        """The feedback in the body of a request, such as `{"response_id": "chatcmpl-…", "thumbs": "up"}`.

        Raises:
            ConfigError: all that is wrong with it.
        """
        kinds = [kind for kind in KINDS if kind in body]
        wrong = [
            f"unknown field {name!r}" for name in body.keys() - {*KINDS, "response_id", "experiment", "user"}
        ]
        if len(kinds) != 1:
            wrong.append(f"give one of {', '.join(KINDS)}")
        about = {name for name in ("response_id", "experiment", "user") if body.get(name) is not None}
        if about not in ({"response_id"}, {"experiment", "user"}):
            wrong.append("say what it is about: either response_id, or experiment and user")
        wrong += [f"{name} must be text" for name in sorted(about) if not _is_text(body[name])]
        if wrong:
            raise ConfigError("this is no feedback: " + "; ".join(wrong))
        kind = kinds[0]
        return cls(kind, body[kind], body.get("response_id"), body.get("experiment"), body.get("user"))


@dataclass(frozen=True)
class _Answer:
    """The answer that it is about."""

    experiment: Experiment
    user: bytes
    arm: str
    at: float


def give(
    db: sqlite3.Connection, known: Mapping[str, Experiment], tenant: str, said: Feedback, now: float
) -> dict[str, Any]:
    """What was taken down, as JSON; given twice about the same it replaces what was there.

    Raises:
        NotStoredError: the tenant got no such answer.
        ConflictError: the experiment has ended, or it is too late.
        ConfigError: the value is not what the experiment asks for.
    """
    about = (
        _by_response(db, known, tenant, said)
        if said.response is not None
        else _by_user(db, known, tenant, said)
    )
    if about is None:
        raise NotStoredError(_UNKNOWN)
    design = about.experiment.design
    if about.experiment.state != "running":
        raise ConflictError(f"the experiment {design.name!r} has ended; feedback is no longer taken")
    if now > about.at + design.patience:
        raise ConflictError(f"too late: feedback is taken for {design.patience:g} seconds after the answer")
    if said.kind != design.feedback:
        raise ConfigError(f"the experiment {design.name!r} asks for {design.feedback}, not {said.kind}")
    value = design.value(said.given)
    key = (about.experiment.id, about.user, said.response or "")
    before = db.execute(
        "SELECT value FROM feedback WHERE experiment = ? AND user = ? AND response = ?", key
    ).fetchone()
    db.execute(
        "INSERT INTO feedback(experiment, user, response, arm, value, at) VALUES (?, ?, ?, ?, ?, ?) "
        "ON CONFLICT(experiment, user, response) DO UPDATE SET value = excluded.value",
        (*key, about.arm, value, now),
    )
    # what is said of another arm than the first one, after a change of weights, is no outcome of this user
    query = "UPDATE users SET rated = ? WHERE experiment = ? AND user = ? AND arm = ? AND rated IS NULL"
    db.execute(query, (now, about.experiment.id, about.user, about.arm))
    return {
        "object": "feedback",
        "experiment": design.name,
        said.kind: said.given,
        "replaced": before is not None,
    }


def _by_response(
    db: sqlite3.Connection, known: Mapping[str, Experiment], tenant: str, said: Feedback
) -> _Answer | None:
    query = "SELECT experiment, owner, user, arm, at FROM exposures WHERE response = ? ORDER BY id LIMIT 1"
    row = db.execute(query, (said.response,)).fetchone()
    if row is None:
        return None
    number, owned, *rest = row
    found = next((one for one in known.values() if one.id == number), None)
    return None if found is None or owned != owner(found.salt, tenant) else _Answer(found, *rest)


def _by_user(
    db: sqlite3.Connection, known: Mapping[str, Experiment], tenant: str, said: Feedback
) -> _Answer | None:
    found = known.get(said.experiment or "")
    if found is None:
        return None
    user = pseudonym(found.salt, tenant, said.user or "")
    query = "SELECT arm FROM users WHERE experiment = ? AND user = ?"
    row = db.execute(query, (found.id, user)).fetchone()
    if row is None:
        return None
    query = "SELECT max(at) FROM exposures WHERE experiment = ? AND user = ?"
    (last,) = db.execute(query, (found.id, user)).fetchone()
    return None if last is None else _Answer(found, user, row[0], last)


def _is_text(value: Any) -> bool:
    # JSON can write half of a character, which no file takes
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value
