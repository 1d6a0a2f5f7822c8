"""Whether the catalogue is what its audit log says: the chain is hashed again, the log replayed, every row compared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.store.catalogue.audit import BEGINNING, Head, chained, content, head, pseudonym
from modicum.store.catalogue.publish import kind_digest

if TYPE_CHECKING:
    from collections.abc import Callable

    from modicum.store.engine.interface import Snapshot

_PAGE = 2000
#: entries that go with their version when that is purged
_PRIVATE = {"put", "tag", "untag", "metrics", "note"}


@dataclass
class _State:
    """What the log says about one name so far."""

    latest: int = 0
    #: version -> (digest, kind, entry); None where a purge took them from the log
    versions: dict[int, tuple[bytes, int, int] | None] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    earlier: dict[str, list[int]] = field(default_factory=dict)
    tags: set[tuple[int, str]] = field(default_factory=set)
    metrics: dict[tuple[int, str], float] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    purged: bool = False


def check_chain(view: Snapshot, report: Callable[[str], None], expected: Head | None = None) -> int:
    """How many entries the log has; reported is every one that does not follow from the one before.

    `expected`, noted elsewhere, catches a log that was written anew as a whole.
    """
    query = (
        "SELECT audit.seq, audit.at, actors.actor, audit.action, audit.name, names.name, names.salt, names.pseudonym, "
        "audit.version, audit.digest, audit.detail, audit.content, audit.hash FROM audit "
        "LEFT JOIN actors ON actors.id = audit.actor LEFT JOIN names ON names.id = audit.name "
        "WHERE audit.seq > ? ORDER BY audit.seq LIMIT ?"
    )
    last, link, at = 0, BEGINNING, 0
    while rows := view.rows(query, last, _PAGE):
        for (
            seq,
            when,
            actor,
            action,
            number,
            name,
            salt,
            stands,
            version,
            digest,
            detail,
            part,
            hashed,
        ) in rows:
            who = None
            if number is not None:
                who = pseudonym(salt or b"", name) if name is not None else stands or b""
            part = content(digest, detail) if part is None else part  # noqa: PLW2901 - what was hashed
            found = chained(link, seq, when, actor, action, who, version, part)
            if seq != last + 1:
                report(f"log: entries {last + 1} to {seq - 1} are missing")
            if found != hashed:
                report(f"log: entry {seq} ({action}) was changed, or what it is about")
            if when <= at:
                report(f"log: entry {seq} is not later than the one before")
            if expected is not None and seq == expected.entries and hashed.hex() != expected.hash:
                report(f"log: entry {seq} is not the one that was noted elsewhere")
            last, link, at = seq, hashed, when
    ends = head(view)
    if (ends.entries, ends.hash) != (last, link.hex()):
        report(f"log: it ends with entry {last}, it should end with {ends.entries}")
    if expected is not None and last < expected.entries:
        report(f"log: it has {last} entries, {expected.entries} were noted elsewhere")
    return last


def check_state(view: Snapshot, report: Callable[[str], None]) -> int:
    """How many versions there are; reported is every row that is not what the log makes of it."""
    for number, *kind, digest in view.rows("SELECT * FROM kinds"):
        if kind_digest(tuple(kind)) != digest:
            report(f"catalogue: kind {number} was changed")
    count, last = 0, 0
    while names := view.rows(
        "SELECT id, name, latest FROM names WHERE id > ? ORDER BY id LIMIT ?", last, _PAGE
    ):
        first, last = names[0][0], names[-1][0]
        states = _replayed(view, first, last, report)
        rows = _Rows(view, first, last)
        for number, name, latest in names:
            state = states.pop(number, None)
            called = name or f"purged name {number}"
            if state is None:
                report(f"catalogue: {called!r} is not in the log")
            else:
                count += len(state.versions)
                _compare(called, state, rows, number, latest, report, gone=name is None)
        for number in states:
            report(f"catalogue: name {number}, which the log tells of, is missing")
        for stray in sorted(rows.left()):
            report(f"catalogue: rows about name {stray}, which is not listed")
    used = (
        "SELECT count(*) FROM objects LEFT JOIN (SELECT object, count(*) AS n FROM versions GROUP BY object) AS used "
        "ON used.object = objects.id WHERE objects.uses != coalesce(used.n, 0)"
    )
    wrong = view.rows(used)[0][0]
    if wrong:
        report(f"catalogue: {wrong} objects are not used as often as counted")
    return count


class _Rows:
    """The rows of all tables about a range of names, by name."""

    _QUERIES = {  # noqa: RUF012 - never changed
        "versions": "SELECT v.name, v.version, o.digest, v.kind, v.entry, v.size, o.size FROM versions v "
        "LEFT JOIN objects o ON o.id = v.object WHERE v.name BETWEEN ? AND ?",
        "aliases": "SELECT name, alias, version FROM aliases WHERE name BETWEEN ? AND ?",
        "earlier": "SELECT name, alias, version FROM earlier WHERE name BETWEEN ? AND ? ORDER BY name, alias, depth",
        "tags": "SELECT name, version, tag FROM tags WHERE name BETWEEN ? AND ?",
        "metrics": "SELECT name, version, metric, value FROM metrics WHERE name BETWEEN ? AND ?",
        "notes": "SELECT name, version, note FROM notes WHERE name BETWEEN ? AND ?",
    }

    def __init__(self, view: Snapshot, first: int, last: int) -> None:
        self._found: dict[str, dict[int, list[tuple]]] = {}
        for table, query in self._QUERIES.items():
            of: dict[int, list[tuple]] = {}
            for name, *row in view.rows(query, first, last):
                of.setdefault(name, []).append(tuple(row))
            self._found[table] = of

    def take(self, table: str, name: int) -> list[tuple]:
        """The rows about `name`, which are then accounted for."""
        return self._found[table].pop(name, [])

    def left(self) -> set[int]:
        """The names with rows that nobody took."""
        return {name for of in self._found.values() for name in of}


def _replayed(view: Snapshot, first: int, last: int, report: Callable[[str], None]) -> dict[int, _State]:
    query = (
        "SELECT name, seq, action, version, digest, detail, content IS NOT NULL FROM audit "
        "WHERE name BETWEEN ? AND ? ORDER BY name, seq"
    )
    states: dict[int, _State] = {}
    for name, seq, action, version, digest, detail, redacted in view.rows(query, first, last):
        state = states.setdefault(name, _State())
        try:
            about = json.loads(detail or "{}")
            if action == "put":
                state.latest = version
                state.versions[version] = None if redacted else (digest, about["kind"], seq)
            if not redacted:
                _ACTIONS[action](state, version, about)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            report(f"log: entry {seq} cannot be replayed ({action}, {type(error).__name__} {error})")
    return states


def _compare(
    name: str,
    state: _State,
    rows: _Rows,
    number: int,
    latest: int,
    report: Callable[[str], None],
    *,
    gone: bool,
) -> None:
    versions, sizes = {}, []
    for version, digest, kind, entry, size, stored in rows.take("versions", number):
        versions[version] = (digest, kind, entry)
        if size != stored:
            sizes.append(version)
    earlier: dict[str, list[int]] = {}
    for alias, version in rows.take("earlier", number):
        earlier.setdefault(alias, []).append(version)
    found = {
        "versions": (versions, state.versions),
        "aliases": (dict(rows.take("aliases", number)), state.aliases),
        "earlier versions": (earlier, {alias: been for alias, been in state.earlier.items() if been}),
        "tags": (set(rows.take("tags", number)), state.tags),
        "metrics": ({(v, metric): value for v, metric, value in rows.take("metrics", number)}, state.metrics),
        "notes": (dict(rows.take("notes", number)), state.notes),
        "latest version": (latest, state.latest),
        "name": (gone, state.purged),
        "sizes": (sizes, []),
    }
    for what, (has, should) in found.items():
        if has != should:
            report(f"catalogue: the {what} of {name!r} are not what the log says: {has} instead of {should}")


def _put(state: _State, version: int, about: dict[str, Any]) -> None:
    _tag(state, version, about)
    _metrics(state, version, about)
    if "note" in about:
        _note(state, version, about)


def _alias(state: _State, version: int, about: dict[str, Any]) -> None:
    alias, before = about["alias"], about["from"]
    if state.aliases.get(alias) != before:
        raise ValueError(f"{alias} was not at {before}")
    if before is not None and before != version:
        state.earlier.setdefault(alias, []).append(before)
    state.aliases[alias] = version


def _unalias(state: _State, _version: int, about: dict[str, Any]) -> None:
    del state.aliases[about["alias"]]
    state.earlier.pop(about["alias"], None)


def _rollback(state: _State, version: int, about: dict[str, Any]) -> None:
    if state.earlier[about["alias"]].pop() != version:
        raise ValueError(f"{about['alias']} went back to another version")
    state.aliases[about["alias"]] = version


def _tag(state: _State, version: int, about: dict[str, Any]) -> None:
    state.tags |= {(version, tag) for tag in about.get("tags", ())}


def _untag(state: _State, version: int, about: dict[str, Any]) -> None:
    state.tags -= {(version, tag) for tag in about["tags"]}


def _metrics(state: _State, version: int, about: dict[str, Any]) -> None:
    state.metrics |= {(version, metric): value for metric, value in about.get("metrics", {}).items()}


def _note(state: _State, version: int, about: dict[str, Any]) -> None:
    state.notes.pop(version, None)
    if about["note"] is not None:
        state.notes[version] = about["note"]


def _remove(state: _State, version: int, _about: dict[str, Any]) -> None:
    del state.versions[version]
    state.tags = {pair for pair in state.tags if pair[0] != version}
    state.metrics = {key: value for key, value in state.metrics.items() if key[0] != version}
    state.notes.pop(version, None)
    for alias, been in state.earlier.items():
        state.earlier[alias] = [one for one in been if one != version]


def _purge(state: _State, version: int | None, about: dict[str, Any]) -> None:
    if version is not None:
        _remove(state, version, about)
        return
    latest = state.latest
    vars(state).update(vars(_State(latest=latest, purged=True)))


def _experiment(_state: _State, _version: int | None, _about: dict[str, Any]) -> None:
    """Tells of what was tried with a name; moves of aliases have entries of their own."""


_ACTIONS: dict[str, Callable[[_State, Any, dict[str, Any]], None]] = {
    "put": _put,
    "alias": _alias,
    "unalias": _unalias,
    "rollback": _rollback,
    "tag": _tag,
    "untag": _untag,
    "metrics": _metrics,
    "note": _note,
    "remove": _remove,
    "purge": _purge,
    "experiment": _experiment,
}
