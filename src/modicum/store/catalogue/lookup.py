"""Finding names and versions, and everything the catalogue says about one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.errors import NotStoredError, did_you_mean, listing
from modicum.store.catalogue.audit import moment, pseudonym
from modicum.store.catalogue.names import LATEST, Reference

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from modicum.store.engine.interface import Located, Snapshot

_COLUMNS = (
    "SELECT n.id, n.name, v.version, v.object, v.size, v.kind, v.entry "
    "FROM names n JOIN versions v ON v.name = n.id "
)
#: where in these columns the object is
_OBJECT = 3
_BY_NUMBER = f"{_COLUMNS} WHERE n.name = ? AND v.version = ?"
_NEWEST = f"{_COLUMNS} WHERE n.name = ? ORDER BY v.version DESC LIMIT 1"
_BY_ALIAS = (
    f"{_COLUMNS} JOIN aliases a ON a.name = n.id AND a.version = v.version WHERE n.name = ? AND a.alias = ?"
)

#: no name has so many versions, and the database no such numbers
_TOO_MANY = 1 << 62


@dataclass(frozen=True)
class Found:
    """Where a version stands in the tables."""

    name_id: int
    name: str
    version: int
    object: int
    size: int
    kind: int
    entry: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Version:
    """One version of one adapter, and what is known about it without opening it."""

    name: str
    version: int
    #: the record's digest, hexadecimal: the same numbers and description have the same one, everywhere
    digest: str
    #: size of the record
    bytes: int
    method: str
    dtype: str
    task_type: str | None
    base_fingerprint: str | None
    basis_fingerprint: Any
    created: datetime
    actor: str
    #: `name@version` it was trained from; digest of its training data; seed
    parent: str | None = None
    data_digest: str | None = None
    seed: int | None = None
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    note: str | None = None

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Name:
    """A name as the tables have it."""

    id: int
    name: str
    #: the highest version it ever had
    latest: int
    salt: bytes

    @property
    def pseudonym(self) -> bytes:
        """What the audit log hashes in place of the name."""
        return pseudonym(self.salt, self.name)


def find_name(view: Snapshot, name: str) -> Name:
    """The row of a name.

    Raises:
        NotStoredError: there is none; the nearest ones are named.
    """
    found = view.rows("SELECT id, name, latest, salt FROM names WHERE name = ?", name)
    if not found:
        raise NotStoredError(f"no adapter {name!r} in the store{_near(view, name)}")
    return Name(*found[0])


def find(view: Snapshot, wanted: Reference) -> Found | None:
    """The version that `wanted` refers to, None if there is no such thing; one statement."""
    found = view.rows(*_query(wanted))
    return Found(*found[0]) if found else None


def find_located(view: Snapshot, wanted: Reference) -> tuple[Found, Located] | None:
    """What `find` finds, and where its record is; one statement."""
    found = view.rows_located(*_query(wanted))
    return (Found(*found[0][0]), found[0][1]) if found else None


def _query(wanted: Reference) -> tuple[Any, ...]:
    """The query for a version, and its values."""
    if wanted.selector == LATEST:
        return _NEWEST, wanted.name
    if isinstance(wanted.selector, int):
        # no version has a number below 1
        return _BY_NUMBER, wanted.name, wanted.selector if 0 < wanted.selector < _TOO_MANY else 0
    return _BY_ALIAS, wanted.name, wanted.selector


def resolve_many(view: Snapshot, wanted: Sequence[Reference]) -> list[Found]:
    """The versions that all of `wanted` refer to, in their order.

    Raises:
        NotStoredError: see `resolve`.
    """
    by_selector: dict[int | str, list[str]] = {}
    for one in dict.fromkeys(wanted):
        by_selector.setdefault(one.selector, []).append(one.name)
    found: dict[Reference, Found] = {}
    for selector, names in by_selector.items():
        if isinstance(selector, int) and not 0 < selector < _TOO_MANY:
            continue
        query, values = _of_many(selector)
        for row in view.rows_of(query, names, *values, wanted=_OBJECT):
            found[Reference(row[1], selector)] = Found(*row)
    return [found.get(one) or resolve(view, one) for one in wanted]


def _of_many(selector: int | str) -> tuple[str, tuple]:
    if selector == LATEST:
        newest = "(SELECT max(w.version) FROM versions w WHERE w.name = n.id)"
        return f"{_COLUMNS} WHERE n.name IN ({{}}) AND v.version = {newest}", ()
    if isinstance(selector, int):
        return f"{_COLUMNS} WHERE n.name IN ({{}}) AND v.version = ?", (selector,)
    alias = "JOIN aliases a ON a.name = n.id AND a.version = v.version"
    return f"{_COLUMNS} {alias} WHERE n.name IN ({{}}) AND a.alias = ?", (selector,)


def resolve(view: Snapshot, wanted: Reference) -> Found:
    """The version that `wanted` refers to.

    Raises:
        NotStoredError: no such name, version or alias; what there is is named.
    """
    found = find(view, wanted)
    if found is not None:
        return found
    name = find_name(view, wanted.name)
    if wanted.selector == LATEST:
        raise NotStoredError(f"all versions of {name.name!r} were removed")
    if isinstance(wanted.selector, int):
        listed = "SELECT version FROM versions WHERE name = ? ORDER BY version DESC LIMIT 6"
        versions = [str(version) for (version,) in view.rows(listed, name.id)]
        raise NotStoredError(
            f"{wanted.name!r} has no version {wanted.selector}; its newest: {listing(versions)}"
        )
    aliases = [alias for (alias,) in view.rows("SELECT alias FROM aliases WHERE name = ?", name.id)]
    raise NotStoredError(
        f"{wanted.name!r} has no alias {wanted.selector!r}{did_you_mean(wanted.selector, aliases)}; "
        f"it has {listing(aliases) or 'none'}"
    )


def describe(view: Snapshot, found: Found) -> Version:
    """Everything the catalogue says about a version."""
    one = (found.name_id, found.version)
    kind = view.rows("SELECT method, dtype, task, base, basis FROM kinds WHERE id = ?", found.kind)[0]
    query = (
        "SELECT audit.at, actors.actor, audit.digest, audit.detail FROM audit JOIN actors ON actors.id = audit.actor "
        "WHERE audit.seq = ?"
    )
    at, actor, digest, detail = view.rows(query, found.entry)[0]
    about = json.loads(detail or "{}")
    note = view.rows("SELECT note FROM notes WHERE name = ? AND version = ?", *one)
    aliases = view.rows("SELECT alias FROM aliases WHERE name = ? AND version = ? ORDER BY alias", *one)
    tags = view.rows("SELECT tag FROM tags WHERE name = ? AND version = ? ORDER BY tag", *one)
    metrics = "SELECT metric, value FROM metrics WHERE name = ? AND version = ? ORDER BY metric"
    return Version(
        name=found.name,
        version=found.version,
        digest=digest.hex(),
        bytes=found.size,
        method=kind[0],
        dtype=kind[1],
        task_type=kind[2],
        base_fingerprint=kind[3],
        basis_fingerprint=None if kind[4] is None else json.loads(kind[4]),
        created=moment(at),
        actor=actor,
        parent=_parent(view, about.get("parent")),
        data_digest=about.get("data"),
        seed=about.get("seed"),
        aliases=tuple(alias for (alias,) in aliases),
        tags=tuple(tag for (tag,) in tags),
        metrics=dict(view.rows(metrics, *one)),
        note=note[0][0] if note else None,
    )


def _parent(view: Snapshot, parent: list[int] | None) -> str | None:
    if parent is None:
        return None
    name, stands = view.rows("SELECT name, pseudonym FROM names WHERE id = ?", parent[0])[0]
    return f"{name or 'purged:' + bytes(stands).hex()[:12]}@{parent[1]}"


def _near(view: Snapshot, name: str) -> str:
    """The nearest names among the neighbours in the alphabet: a million cannot all be compared."""
    before = view.rows("SELECT name FROM names WHERE name < ? ORDER BY name DESC LIMIT 50", name)
    after = view.rows("SELECT name FROM names WHERE name > ? ORDER BY name LIMIT 50", name)
    return did_you_mean(name, [found for (found,) in before + after])
