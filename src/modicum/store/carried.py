"""Versions on their way from one store to another: what is said about each, and how a store takes them in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.errors import CorruptAdapterError, NotStoredError
from modicum.store.catalogue.listing import Filter
from modicum.store.catalogue.lookup import find_name
from modicum.store.catalogue.names import Reference, check_alias, check_label, check_name, reference
from modicum.store.catalogue.publish import Put, check_metrics
from modicum.store.objects import digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from modicum.store.catalogue.lookup import Version
    from modicum.store.reading import Readable
    from modicum.store.store import Store

_BATCH = 500
_BATCH_BYTES = 1 << 26
_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Carried:
    """A version as it travels: everything but its record, which is known by its digest."""

    name: str
    version: int
    digest: str
    bytes: int
    aliases: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    note: str | None = None
    #: `name@version`, and the digest of its record
    parent: str | None = None
    parent_digest: str | None = None
    data_digest: str | None = None
    seed: int | None = None
    #: who put it where it comes from, and when
    actor: str = ""
    created: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @classmethod
    def of(cls, store: Readable, version: Version) -> Carried:
        """What is to be told about a version of `store`."""
        same = {name: getattr(version, name) for name in _SAME}
        # a parent that was removed or purged since has nothing that could be looked up elsewhere
        parent = (version.parent or "").startswith("purged:") or _digest(store, version.parent)
        told = {"parent": version.parent, "parent_digest": parent} if isinstance(parent, str) else {}
        return cls(**same, **told, created=version.created.isoformat(timespec="microseconds"))

    def line(self) -> str:
        """It as one line of JSON, without what is empty."""
        values = {key: value for key, value in asdict(self).items() if value not in (None, (), {}, "")}
        return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    @classmethod
    def read(cls, values: Any) -> Carried:
        """It from the values of such a line; every value is checked, whoever wrote it.

        Raises:
            CorruptAdapterError: something is missing, unknown, of another type, or a name that is not allowed.
        """
        if not isinstance(values, dict):
            raise CorruptAdapterError(f"a version is an object, not {type(values).__name__}")
        faults = [f"unknown {key!r}" for key in values.keys() - _TYPES.keys()]
        faults += [f"no {key!r}" for key in ("name", "version", "digest", "bytes") if key not in values]
        faults += [
            f"{key} = {str(value)[:40]!r}"
            for key, value in values.items()
            if key in _TYPES and (not isinstance(value, _TYPES[key]) or isinstance(value, bool))
        ]
        if not faults:
            faults = _wrong(values)
        if faults:
            raise CorruptAdapterError(f"a version that cannot be read: {'; '.join(sorted(faults)[:5])}")
        lists = {key: tuple(values[key]) for key in ("aliases", "tags") if key in values}
        return cls(**{**values, **lists})


_SAME = (
    "name", "version", "digest", "bytes", "aliases", "tags", "metrics", "note", "data_digest", "seed", "actor",
)  # fmt: skip
_TYPES: dict[str, type] = {
    "name": str, "version": int, "digest": str, "bytes": int, "aliases": list, "tags": list, "metrics": dict,
    "note": str, "parent": str, "parent_digest": str, "data_digest": str, "seed": int, "actor": str, "created": str,
}  # fmt: skip


@dataclass(frozen=True)
class TakenIn:
    """What became of versions that came from elsewhere."""

    stored: int
    #: here already
    known: int
    #: `name@version` there -> what it is stored as here, where that number was taken or past
    renumbered: dict[str, str]
    #: `name@alias`es that point at another version here and were left alone
    aliases_kept: tuple[str, ...]
    #: versions whose parent is not here
    without_parent: tuple[str, ...]


def take_in(
    store: Store,
    versions: Sequence[Carried],
    load: Callable[[Carried], bytes],
    source: str,
    *,
    move_aliases: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TakenIn:
    """What became of `versions`, whose records `load` gives; each batch is stored as a whole.

    A version keeps its number where that is above all that its name had here. It is not stored again where the name
    has the same record under that number, or, the number being taken or past, under another one. `source` is what the
    log says about where they come from. Aliases that `store` has stay where they point unless `move_aliases`. Parents
    that are not in `store` are left out. `progress(done, all)`.

    Raises:
        CorruptAdapterError: a record is not the one that was announced; its batch is not stored.
        StoreError: see `Store.put_many`.
    """
    job = _Intake(store, source, load)
    order = _parents_first(versions)
    for version in order:
        job.recognize(version)
    for done, version in enumerate(order, 1):
        if str(version) not in job.became:
            job.take(version)
        if progress is not None:
            progress(done, len(versions))
    job.write()
    kept = job.point(versions, move=move_aliases)
    return TakenIn(job.stored, len(versions) - job.stored, job.renumbered, kept, tuple(job.orphans))


class _Intake:
    """Gathers versions to batches; what they became is known after each."""

    def __init__(self, store: Store, source: str, load: Callable[[Carried], bytes]) -> None:
        self._store, self._source, self._load = store, source, load
        self._batch: list[Put] = []
        self._size = 0
        self._latest: dict[str, int] = {}
        #: name -> digest -> versions that were here before
        self._mine: dict[str, dict[str, list[str]]] = {}
        #: versions that were here and are one of those that came
        self._taken: set[str] = set()
        #: `name@version` there -> here
        self.became: dict[str, str] = {}
        self.renumbered: dict[str, str] = {}
        self.stored = 0
        self.orphans: list[str] = []

    def recognize(self, one: Carried) -> None:
        """Returns when a version that is here under its number is known to be."""
        if one.version <= self._latest_of(one.name) and _digest(self._store, str(one)) == one.digest:
            self._is(one, str(one))

    def take(self, one: Carried) -> None:
        """Returns when a version is known, or waits to be written."""
        latest = self._latest_of(one.name)
        number = one.version
        if number <= latest:
            found = self._known(one)
            if found is not None:
                self._is(one, found)
                return
            number = latest + 1
        data = self._load(one)
        if digest_of(data).hex() != one.digest:
            raise CorruptAdapterError(
                f"{one}: its record is not the one with digest {one.digest}; get it again"
            )
        parent = self._parent(one)
        self._latest[one.name] = number
        self.became[str(one)] = here = f"{one.name}@{number}"
        if number != one.version:
            self.renumbered[str(one)] = here
        put = Put(
            one.name,
            data,
            parent=parent,
            data_digest=one.data_digest,
            seed=one.seed,
            metrics=one.metrics,
            tags=one.tags,
            note=one.note,
            version=number,
            source=f"{self._source}: {one}, put by {one.actor or 'somebody'} {one.created}".rstrip(),
        )
        self._batch.append(put)
        self._size += len(data)
        if len(self._batch) == _BATCH or self._size >= _BATCH_BYTES:
            self.write()

    def write(self) -> None:
        if self._batch:
            self.stored += len(self._store.put_many(self._batch, batch=len(self._batch)))
        self._batch, self._size = [], 0

    def point(self, versions: Iterable[Carried], *, move: bool) -> tuple[str, ...]:
        """The aliases that were left alone, after the others were set."""
        kept = []
        for one in versions:
            for alias in one.aliases:
                target = self.became[str(one)]
                now = self._where(Reference(one.name, alias))
                if now == target:
                    continue
                if now is None or move:
                    self._store.alias(target, alias)
                else:
                    kept.append(f"{one.name}@{alias}")
        return tuple(kept)

    def _parent(self, one: Carried) -> str | None:
        if one.parent is None:
            return None
        if one.parent in self.became:
            return self.became[one.parent]
        if one.parent_digest is not None and _digest(self._store, one.parent) == one.parent_digest:
            return one.parent
        self.orphans.append(str(one))
        return None

    def _where(self, wanted: Reference) -> str | None:
        try:
            return str(self._store.show(wanted))
        except NotStoredError:
            return None

    def _is(self, one: Carried, here: str) -> None:
        self.became[str(one)] = here
        self._taken.add(here)

    def _known(self, one: Carried) -> str | None:
        """The version here with the same record, under a number that nothing else became."""
        if one.name not in self._mine:
            self._mine[one.name] = {}
            for version in self._store.versions(Filter(name=one.name)):
                self._mine[one.name].setdefault(version.digest, []).append(str(version))
        mine = self._mine[one.name].get(one.digest, ())
        return next((version for version in mine if version not in self._taken), None)

    def _latest_of(self, name: str) -> int:
        """The highest number that the name ever had here, removed versions included; 0 for a new name."""
        if name not in self._latest:
            try:
                read = self._store._read  # noqa: SLF001 - a question of the same floor
                self._latest[name] = read(lambda view: find_name(view, name).latest)
            except NotStoredError:
                self._latest[name] = 0
        return self._latest[name]


def _digest(store: Readable, version: str | None) -> str | None:
    if version is None:
        return None
    try:
        return store.show(version).digest
    except NotStoredError:
        return None


def _parents_first(versions: Sequence[Carried]) -> list[Carried]:
    """The versions in an order in which parents, and lower numbers of a name, come before; as far as that goes."""
    order = sorted(versions, key=lambda one: (one.created, one.name, one.version))
    level: dict[str, int] = {}
    last: dict[str, int] = {}
    for one in order:
        above = level.get(one.parent or "", -1)
        level[str(one)] = last[one.name] = max(above + 1, last.get(one.name, 0))
    return sorted(order, key=lambda one: (level[str(one)], one.name, one.version))


def _wrong(values: Mapping[str, Any]) -> list[str]:
    faults = []
    checks: list[Callable[[], Any]] = [
        lambda: check_name(values["name"]),
        lambda: [check_alias(alias) for alias in values.get("aliases", ())],
        lambda: [check_label(tag, "a tag") for tag in values.get("tags", ())],
        lambda: check_metrics(values.get("metrics", {})),
        lambda: reference(values.get("parent", values["name"])),
        lambda: json.dumps(values, ensure_ascii=False).encode(),
    ]
    for check in checks:
        try:
            check()
        except (ValueError, TypeError, OverflowError) as error:
            faults.append(str(error))
    faults += [
        f"{key} {str(values[key])[:70]!r}"
        for key in ("digest", "parent_digest")
        if key in values and (len(values[key]) != 64 or not _DIGITS.issuperset(values[key]))
    ]
    limits = {"version": (1, 1 << 31), "bytes": (0, 1 << 63), "seed": (-(1 << 63), 1 << 63)}
    return faults + [
        f"{key} {str(values[key])[:70]}"
        for key, (low, high) in limits.items()
        if key in values and not low <= values[key] < high
    ]
