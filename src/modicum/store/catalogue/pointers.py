"""Aliases: names for versions that move atomically, and remember where they have been."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modicum.errors import ConflictError, NotStoredError
from modicum.store.catalogue.audit import Draft

if TYPE_CHECKING:
    from modicum.store.catalogue.lookup import Name
    from modicum.store.engine.interface import Change, Snapshot


class _Any:
    """The value of `expected` that stands for whatever there is."""

    def __repr__(self) -> str:
        return "ANYTHING"


ANYTHING: Final = _Any()
Expected = int | None | _Any


def current(view: Snapshot, name: int, alias: str) -> int | None:
    """The version that an alias points at, or None."""
    found = view.rows("SELECT version FROM aliases WHERE name = ? AND alias = ?", name, alias)
    return found[0][0] if found else None


def move(change: Change, name: Name, alias: str, version: int, expected: Expected = ANYTHING) -> Draft:
    """The entry for the log after `alias` was moved to `version`, if it points at `expected` (None: nowhere).

    Raises:
        ConflictError: it points elsewhere.
    """
    before = current(change, name.id, alias)
    _check(name, alias, before, expected)
    if before is not None and before != version:
        query = "SELECT coalesce(max(depth), 0) + 1 FROM earlier WHERE name = ? AND alias = ?"
        depth = change.rows(query, name.id, alias)[0][0]
        change.run("INSERT INTO earlier VALUES (?, ?, ?, ?)", name.id, alias, depth, before)
    _point(change, name, alias, version)
    return Draft("alias", name.id, name.pseudonym, version, detail={"alias": alias, "from": before})


def unset(change: Change, name: Name, alias: str, expected: Expected = ANYTHING) -> Draft:
    """The entry for the log after `alias` and where it has been were forgotten.

    Raises:
        NotStoredError: there is no such alias.
        ConflictError: it does not point at `expected`.
    """
    before = current(change, name.id, alias)
    _check(name, alias, before, expected)
    if before is None:
        raise NotStoredError(f"{name.name!r} has no alias {alias!r}")
    change.run("DELETE FROM aliases WHERE name = ? AND alias = ?", name.id, alias)
    change.run("DELETE FROM earlier WHERE name = ? AND alias = ?", name.id, alias)
    return Draft("unalias", name.id, name.pseudonym, None, detail={"alias": alias, "from": before})


def back(change: Change, name: Name, alias: str, expected: Expected = ANYTHING) -> Draft:
    """The entry for the log after `alias` was moved to where it pointed before; done twice, it goes two steps back.

    Raises:
        NotStoredError: there is no such alias, or it has been nowhere else.
        ConflictError: it does not point at `expected`.
    """
    before = current(change, name.id, alias)
    _check(name, alias, before, expected)
    query = "SELECT depth, version FROM earlier WHERE name = ? AND alias = ? ORDER BY depth DESC LIMIT 1"
    found = change.rows(query, name.id, alias)
    if before is None or not found:
        raise NotStoredError(
            f"{name.name!r} has no earlier version under {alias!r} to go back to; `log` shows its history"
        )
    depth, version = found[0]
    change.run("DELETE FROM earlier WHERE name = ? AND alias = ? AND depth = ?", name.id, alias, depth)
    _point(change, name, alias, version)
    return Draft("rollback", name.id, name.pseudonym, version, detail={"alias": alias, "from": before})


def forget(change: Change, name: int, version: int) -> None:
    """Returns when no alias can go back to a version that is removed."""
    change.run("DELETE FROM earlier WHERE name = ? AND version = ?", name, version)


def _point(change: Change, name: Name, alias: str, version: int) -> None:
    query = "INSERT INTO aliases VALUES (?, ?, ?) ON CONFLICT(name, alias) DO UPDATE SET version = excluded.version"
    change.run(query, name.id, alias, version)


def _check(name: Name, alias: str, before: int | None, expected: Expected) -> None:
    if not isinstance(expected, _Any) and expected != before:
        points = "is not set" if before is None else f"points at version {before}"
        raise ConflictError(
            f"{name.name}@{alias} {points}, not at {expected} as expected: somebody else moved it; look again"
        )
