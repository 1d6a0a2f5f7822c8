"""Taking versions out of the store, and erasing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modicum.errors import ConflictError, listing
from modicum.store.catalogue import audit, pointers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from modicum.store.catalogue.lookup import Found, Name
    from modicum.store.engine.interface import Change

_OF_A_VERSION = ("versions", "tags", "metrics", "notes")
_OF_A_NAME = (*_OF_A_VERSION, "aliases", "earlier")


@dataclass(frozen=True)
class Purged:
    """What a purge did."""

    #: entry of the log that says so, and the name's pseudonym in it
    entry: int
    pseudonym: str
    versions: int
    #: bytes overwritten on the disk
    bytes: int
    #: `name@version` that has the same record and keeps it
    shared: tuple[str, ...] = ()


def remove(change: Change, name: Name, found: Found) -> audit.Draft:
    """The entry for the log after a version was taken out of the catalogue.

    Raises:
        ConflictError: an alias points at it.
    """
    _check_aliases(change, name.id, found)
    digest = _digests(change, name.id, found.version)
    change.drop([found.object])
    _forget(change, found)
    return audit.Draft("remove", name.id, name.pseudonym, found.version, digest[0])


def purge_version(change: Change, actor: str, name: Name, found: Found) -> Purged:
    """What was asked for: a version leaves tables and log, its bytes are marked to be overwritten.

    Raises:
        ConflictError: an alias points at it.
    """
    _check_aliases(change, name.id, found)
    digests = _digests(change, name.id, found.version)
    change.drop([found.object])
    _forget(change, found)
    return _erase(change, actor, name, digests, 1, found.version)


def purge_name(change: Change, actor: str, name: Name) -> Purged:
    """What was asked for: a name with all its versions leaves tables and log, all bytes are marked to be overwritten.

    Versions that were removed earlier count too: their bytes may still be there.
    """
    objects = [number for (number,) in change.rows("SELECT object FROM versions WHERE name = ?", name.id)]
    digests = _digests(change, name.id)
    change.drop(objects)
    for table in _OF_A_NAME:
        change.run(f"DELETE FROM {table} WHERE name = ?", name.id)  # noqa: S608 - names of our own tables
    purged = _erase(change, actor, name, digests, len(objects), None)
    query = "UPDATE names SET name = NULL, salt = NULL, pseudonym = ? WHERE id = ?"
    change.run(query, name.pseudonym, name.id)
    return purged


def _erase(
    change: Change, actor: str, name: Name, digests: list[bytes], versions: int, version: int | None
) -> Purged:
    size = change.erase(digests)
    shared = _shared(change, digests)
    audit.redact(change, name.id, version)
    detail = {"versions": versions, "bytes": size, "shared": len(shared)}
    entry, _ = audit.append(
        change, actor, [audit.Draft("purge", name.id, name.pseudonym, version, detail=detail)]
    )
    return Purged(entry, name.pseudonym.hex(), versions, size, tuple(shared))


def _digests(change: Change, name: int, version: int | None = None) -> list[bytes]:
    """The digests of all records that a name (or one version) ever had, as far as no purge took them from the log."""
    query = "SELECT DISTINCT digest FROM audit WHERE name = ? AND action = 'put' AND digest IS NOT NULL"
    values = (name,) if version is None else (name, version)
    rows = change.rows(query if version is None else f"{query} AND version = ?", *values)
    return [digest for (digest,) in rows]


def _shared(change: Change, digests: Iterable[bytes]) -> list[str]:
    """The versions that still use one of the objects."""
    alive = [
        number
        for digest in digests
        for (number,) in change.rows("SELECT id FROM objects WHERE digest = ?", digest)
    ]
    query = (
        "SELECT names.name, versions.version FROM versions JOIN names ON names.id = versions.name "
        "WHERE versions.object = ?"
    )
    return [f"{name}@{version}" for number in alive for name, version in change.rows(query, number)]


def _forget(change: Change, found: Found) -> None:
    for table in _OF_A_VERSION:
        query = f"DELETE FROM {table} WHERE name = ? AND version = ?"  # noqa: S608 - names of our own tables
        change.run(query, found.name_id, found.version)
    pointers.forget(change, found.name_id, found.version)


def _check_aliases(change: Change, name: int, found: Found) -> None:
    query = "SELECT alias FROM aliases WHERE name = ? AND version = ? ORDER BY alias"
    aliases = [alias for (alias,) in change.rows(query, name, found.version)]
    if aliases:
        raise ConflictError(
            f"{found} is what {listing(aliases)} points at; move the alias first, or roll it back"
        )
