"""Putting versions into the store, many in one change."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, ConflictError, CorruptAdapterError
from modicum.store.catalogue import audit, pointers
from modicum.store.catalogue.lookup import Name, resolve
from modicum.store.catalogue.names import LATEST, check_alias, check_label, check_name, check_text, reference
from modicum.store.engine.interface import Payload
from modicum.store.objects import stated_digest
from modicum.store.record import Record, decode, encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modicum.store.engine.interface import Change

#: numbers of versions stay below: what every database holds as a whole number
_END = 1 << 31
_Kind = tuple[str, str, str | None, str | None, str | None]


@dataclass(frozen=True)
class Put:
    """A version to be put: its name, its record (or the bytes of one), and what is to be known about it."""

    name: str
    record: Record | bytes
    #: version it was trained from, as `name@version` or `name@alias`
    parent: str | None = None
    #: digest of the training data
    data_digest: str | None = None
    seed: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Sequence[str] = ()
    note: str | None = None
    #: alias that is moved to the new version in the same change
    alias: str | None = None
    #: its number, above all that the name ever had; the next one unless given
    version: int | None = None
    #: where it was taken from; the log keeps it
    source: str | None = None


@dataclass(frozen=True)
class Prepared:
    """A put after everything that needs no lock: checked, encoded, digested."""

    put: Put
    payload: Payload
    kind: _Kind
    detail: dict[str, Any]


def prepare(put: Put) -> Prepared:
    """`put`, ready to be written.

    Raises:
        ConfigError: the name, a tag, the alias or a metric is not allowed.
        CorruptAdapterError: bytes that are no record, or numbers that are not finite.
    """
    check_name(put.name)
    record = put.record if isinstance(put.record, Record) else decode(put.record)
    data = encode(record) if isinstance(put.record, Record) else bytes(put.record)
    if put.alias is not None:
        check_alias(put.alias)
    detail = {
        "data": None if put.data_digest is None else check_text(put.data_digest, "data_digest"),
        "seed": _seed(put.seed),
        "metrics": check_metrics(put.metrics),
        "tags": sorted({check_label(tag, "a tag") for tag in put.tags}),
        "note": None if put.note is None else check_text(put.note, "note"),
        "source": None if put.source is None else check_text(put.source, "source"),
    }
    for word in (record.method, record.task_type, record.base_fingerprint):
        if not isinstance(word, (str, type(None))) or not (word or "").isprintable():
            raise CorruptAdapterError(f"{put.name}: {word!r} stands where the record should have a word")
    basis = record.basis_fingerprint
    kind = (
        record.method,
        record.dtype,
        record.task_type,
        record.base_fingerprint,
        None if basis is None else json.dumps(basis),
    )
    present = {key: value for key, value in detail.items() if value not in (None, {}, [])}
    return Prepared(put, Payload(stated_digest(data), data), kind, present)


def check_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """`metrics` as plain floats.

    Raises:
        ConfigError: one is no finite number, or its name is not allowed.
    """
    bad = [f"{name} = {value!r}" for name, value in metrics.items() if not _is_number(value)]
    if bad:
        raise ConfigError(f"metrics are finite numbers, not {', '.join(bad)}")
    return {check_label(name, "a metric"): float(value) for name, value in metrics.items()}


def publish(change: Change, actor: str, items: Sequence[Prepared]) -> list[int]:
    """The version that each of the items has become, in their order."""
    batch = _Batch(change, actor)
    numbers = change.add([item.payload for item in items])
    versions = [batch.take(item, number) for item, number in zip(items, numbers, strict=True)]
    batch.write()
    return versions


class _Batch:
    """The rows of one change, gathered and written table by table."""

    def __init__(self, change: Change, actor: str) -> None:
        self._change, self._actor = change, actor
        self._names: dict[str, Name] = {}
        self._new: set[str] = set()
        self._following = change.rows("SELECT coalesce(max(id), 0) + 1 FROM names")[0][0]
        self._kinds: dict[_Kind, int] = {}
        self._versions: list[tuple] = []
        self._labels: dict[str, list[tuple]] = {"tags": [], "metrics": [], "notes": []}
        self._drafts: list[audit.Draft] = []
        self._aliases: list[tuple[Name, str, int]] = []
        self._mine: set[tuple[int, int]] = set()

    def take(self, item: Prepared, number: int) -> int:
        """The version that `item`, kept as object `number`, becomes."""
        put = item.put
        parent = None if put.parent is None else self._parent(put.parent)
        name = self._name(put.name)
        version = name.latest + 1 if put.version is None else put.version
        if not name.latest < version < _END:
            raise ConflictError(f"{put.name!r} has had versions up to {name.latest}; {version} cannot follow")
        self._names[put.name] = name = Name(name.id, name.name, version, name.salt)
        kind, size = self._kind(item.kind), len(item.payload.data)
        detail = {**item.detail, "kind": kind}
        if parent is not None:
            detail["parent"] = parent
        self._mine.add((name.id, version))
        self._versions.append((name.id, version, number, kind, size))
        self._labels["tags"] += [(tag, name.id, version) for tag in detail.get("tags", ())]
        self._labels["metrics"] += [(name.id, version, *pair) for pair in detail.get("metrics", {}).items()]
        if put.note is not None:
            self._labels["notes"].append((name.id, version, put.note))
        self._drafts.append(audit.Draft("put", name.id, name.pseudonym, version, item.payload.digest, detail))
        if put.alias is not None:
            self._aliases.append((name, put.alias, version))
        return version

    def write(self) -> None:
        """Returns when all rows are written."""
        change, new = self._change, [self._names[name] for name in self._new]
        change.run_many(
            "INSERT INTO names(id, name, latest, salt) VALUES (?, ?, ?, ?)",
            sorted((name.id, name.name, name.latest, name.salt) for name in new),
        )
        change.run_many(
            "UPDATE names SET latest = ? WHERE id = ?",
            ((name.latest, name.id) for key, name in self._names.items() if key not in self._new),
        )
        first, _ = audit.append(change, self._actor, self._drafts)
        change.run_many(
            "INSERT INTO versions(name, version, object, kind, size, entry) VALUES (?, ?, ?, ?, ?, ?)",
            ((*row, first + index) for index, row in enumerate(self._versions)),
        )
        change.run_many("INSERT INTO tags VALUES (?, ?, ?)", self._labels["tags"])
        change.run_many("INSERT INTO metrics VALUES (?, ?, ?, ?)", self._labels["metrics"])
        change.run_many("INSERT INTO notes VALUES (?, ?, ?)", self._labels["notes"])
        drafts = [pointers.move(change, name, alias, version) for name, alias, version in self._aliases]
        if drafts:
            audit.append(change, self._actor, drafts)

    def _parent(self, text: str) -> list[int]:
        """Number and version of a parent, which may be an earlier item of the same change."""
        wanted = reference(text)
        mine = self._names.get(wanted.name)
        if mine is not None:
            version = mine.latest if wanted.selector == LATEST else wanted.selector
            if (mine.id, version) in self._mine:
                return [mine.id, int(version)]
        found = resolve(self._change, wanted)
        return [found.name_id, found.version]

    def _name(self, text: str) -> Name:
        found = self._names.get(text)
        if found is None:
            rows = self._change.rows("SELECT id, name, latest, salt FROM names WHERE name = ?", text)
            if rows:
                found = Name(*rows[0])
            else:
                found = Name(self._following + len(self._new), text, 0, os.urandom(16))
                self._new.add(text)
            self._names[text] = found
        return found

    def _kind(self, kind: _Kind) -> int:
        if kind not in self._kinds:
            stands = kind_digest(kind)
            rows = self._change.rows("SELECT id FROM kinds WHERE digest = ?", stands)
            number = rows[0][0] if rows else self._change.rows("SELECT count(*) + 1 FROM kinds")[0][0]
            if not rows:
                query = "INSERT INTO kinds VALUES (?, ?, ?, ?, ?, ?, ?)"
                self._change.run(query, number, *kind, stands)
            self._kinds[kind] = number
        return self._kinds[kind]


def kind_digest(kind: tuple) -> bytes:
    """What a kind of record is known by, and checked with."""
    return hashlib.blake2b(json.dumps(kind).encode(), digest_size=16).digest()


def _seed(seed: int | None) -> int | None:
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ConfigError(f"seed = {seed!r}, must be a whole number")
    return seed


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
