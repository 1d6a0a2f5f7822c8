"""The adapter store: immutable versions under names, aliases that move atomically, and a log of who did what."""

from __future__ import annotations

import contextlib
import copy
import getpass
import itertools
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, final

from modicum.errors import ConfigError, CorruptAdapterError, StoreError
from modicum.store.catalogue import audit, labels, pointers, removal, replay
from modicum.store.catalogue.audit import Draft, Head
from modicum.store.catalogue.lookup import Found, Name, Version, describe, find_name, resolve
from modicum.store.catalogue.names import Reference, check_alias, check_name, check_text, reference
from modicum.store.catalogue.pointers import ANYTHING, Expected
from modicum.store.catalogue.publish import Prepared, Put, prepare, publish
from modicum.store.catalogue.schema import TABLES
from modicum.store.engine.interface import MovedError
from modicum.store.engine.sqlite import INDEX, SEGMENT_BYTES, Embedded
from modicum.store.reading import Frozen, Readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from modicum.store.catalogue.removal import Purged
    from modicum.store.engine.interface import Backend, Change, Compacted, Snapshot
    from modicum.store.record import Record

T = TypeVar("T")
#: bytes of records in one change of `put_many`
_BATCH_BYTES = 1 << 26
#: how often a read is repeated that compactions and purges keep overtaking
_TRIES = 8
PRODUCTION = "production"
#: what the address of a store on PostgreSQL begins with
SCHEMES = ("postgresql://", "postgres://")


@dataclass(frozen=True)
class Verified:
    """What a check of a whole store found."""

    #: entries of the log, versions, and bytes of records that were checked
    entries: int
    versions: int
    bytes: int
    #: everything that is wrong, in words
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


@final
class Store(Readable):
    """Versions of adapters in one folder, for any number of reading and writing processes and threads.

    What a method has returned from is on the disk and stays there; what it was interrupted in has not happened.
    """

    def __init__(
        self,
        location: str | os.PathLike,
        *,
        create: bool = False,
        actor: str | None = None,
        timeout: float = 60.0,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        """The store in the folder `location`, made if need be with `create`; or one on PostgreSQL.

        That is `postgresql://user@host/database?objects=s3://bucket/folder&schema=modicum`: rows are in the schema,
        records where fsspec finds the objects. Once it is made, it knows them, and `objects` may be left out.

        `actor` is who the log says did it (otherwise `$MODICUM_ACTOR`, otherwise user@machine); `timeout`: seconds
        to wait for other writers; `segment_bytes` counts when a store is made.

        Raises:
            StoreError: there is no store, or it is damaged, or of a newer format.
        """
        self._backend = _opened(location, create, timeout, segment_bytes)
        self.actor = check_text(actor or os.environ.get("MODICUM_ACTOR") or _user(), "actor")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self._backend.location!r})"

    def acting(self, actor: str) -> Store:
        """The same store, for changes that the log says `actor` made; it is open as long as this one."""
        other = copy.copy(self)
        other.actor = check_text(actor, "actor")
        return other

    def close(self) -> None:
        """Returns when no file is held open any more."""
        self._backend.close()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Frozen]:
        """The store as of this moment, whatever is put, moved or compacted meanwhile; purges go through."""
        with contextlib.ExitStack() as stack:
            with self._backend.said():
                view = stack.enter_context(self._backend.snapshot(pinned=True))
            yield Frozen(self._backend, view)

    def put(self, name: str, record: Record | bytes, **about: Any) -> Version:
        """The new version of `name`, numbered one higher than the last; `about` as in `Put`.

        Raises:
            ConfigError: a name or a number is not allowed.
            NotStoredError: the parent is not in the store.
            CorruptAdapterError: the record is damaged, or its numbers are not finite.
            StoreError: the disk is full, or the store is busy.
        """
        prepared = prepare(Put(name, record, **about))
        with self._change() as change:
            number = publish(change, self.actor, [prepared])[0]
            return describe(change, resolve(change, Reference(name, number)))

    def put_many(
        self,
        items: Iterable[Put | tuple[str, Record | bytes]],
        *,
        batch: int = 2000,
        progress: Callable[[int], None] | None = None,
    ) -> list[int]:
        """The version that each of the items has become, in their order.

        Up to `batch` items are one change; `progress(n)` is told how many are safe so far. If one is refused, its
        batch is not kept, and earlier ones are.

        Raises:
            ConfigError, NotStoredError, CorruptAdapterError, StoreError: see `put`.
        """
        versions: list[int] = []
        prepared = (prepare(item if isinstance(item, Put) else Put(*item)) for item in items)
        for group in _groups(prepared, batch):
            with self._change() as change:
                versions += publish(change, self.actor, group)
            if progress is not None:
                progress(len(versions))
        return versions

    def alias(self, version: str | Reference, alias: str, *, expected: Expected = ANYTHING) -> None:
        """Returns when `alias` points at the version, if it pointed at version `expected` (None: at nothing) before.

        Raises:
            ConflictError: it points elsewhere; somebody else was first.
            NotStoredError: no such version.
            ConfigError: aliases may not be called so.
        """
        wanted = reference(version)
        self._about(
            wanted,
            lambda change, name, found: pointers.move(
                change, name, check_alias(alias), found.version, expected
            ),
        )

    def promote(
        self, version: str | Reference, to: str = PRODUCTION, *, expected: Expected = ANYTHING
    ) -> None:
        """Returns when the alias `to` points at the version, e.g. `promote("ada@canary")`; see `alias`."""
        self.alias(version, to, expected=expected)

    def rollback(self, name: str, alias: str = PRODUCTION, *, expected: Expected = ANYTHING) -> int:
        """The version that `alias` points at again; called twice, it goes back two steps.

        Raises:
            NotStoredError: it has been nowhere else.
            ConflictError: it does not point at version `expected`.
        """
        draft = self._named(
            name, lambda change, one: pointers.back(change, one, check_alias(alias), expected)
        )
        assert draft.version is not None
        return draft.version

    def unalias(self, name: str, alias: str, *, expected: Expected = ANYTHING) -> None:
        """Returns when there is no such alias any more; see `alias`."""
        self._named(name, lambda change, one: pointers.unset(change, one, check_alias(alias), expected))

    def tag(self, version: str | Reference, *tags: str) -> None:
        """Returns when the version has the tags."""
        self._about(reference(version), lambda change, name, found: labels.tag(change, name, found, tags))

    def untag(self, version: str | Reference, *tags: str) -> None:
        """Returns when the version has none of the tags."""
        self._about(reference(version), lambda change, name, found: labels.untag(change, name, found, tags))

    def measure(self, version: str | Reference, metrics: Mapping[str, float]) -> None:
        """Returns when the version has these metrics; others that it has stay."""
        self._about(
            reference(version), lambda change, name, found: labels.measure(change, name, found, metrics)
        )

    def note(self, version: str | Reference, text: str | None) -> None:
        """Returns when `text` is the version's note; None takes it away. Earlier notes stay in the log."""
        self._about(reference(version), lambda change, name, found: labels.note(change, name, found, text))

    def experiment(self, about: Mapping[str, Mapping[str, Any]]) -> None:
        """Returns when the log has an entry under every name in `about`: what an experiment does with that adapter.

        Raises:
            NotStoredError: there is no such name; nothing is logged then.
        """
        with self._change() as change:
            named = [(find_name(change, check_name(name)), detail) for name, detail in about.items()]
            drafts = [
                Draft("experiment", name.id, name.pseudonym, detail=dict(detail)) for name, detail in named
            ]
            audit.append(change, self.actor, drafts)

    def remove(self, name: str, version: int) -> None:
        """Returns when the version is in the store no longer; `gc` gives its space back, `purge` overwrites it at once.

        Its number is not used again.

        Raises:
            ConflictError: an alias points at it.
            NotStoredError: there is no such version.
        """
        self._about(Reference(check_name(name), version), removal.remove)

    def purge(self, name: str, version: int | None = None) -> Purged:
        """What was erased: a version, or `name` with all it ever had, from disk, tables and log; the log says so.

        Equal records that other versions have stay, and are named.

        Raises:
            ConflictError: an alias points at the version.
            NotStoredError: there is no such version.
            StoreError: readers keep old pages of the index from being emptied; `gc` finishes it.
        """
        check_name(name)
        with self._change() as change:
            one = find_name(change, name)
            if version is None:
                purged = removal.purge_name(change, self.actor, one)
            else:
                found = resolve(change, Reference(name, version))
                purged = removal.purge_version(change, self.actor, one, found)
        self._erase(purged.entry)
        return purged

    def gc(self, dead: float = 0.3) -> Compacted:
        """What came free: segments with more than the share `dead` of nobody's, and what killed processes left.

        Erasures that were interrupted are finished first. Others read and write meanwhile.
        """
        if not 0 <= dead < 1:
            raise ConfigError(f"dead = {dead}, must be at least 0 and below 1")
        self._erase()
        done = self._backend.compact(dead)
        if done.segments:
            detail = {"segments": done.segments, "bytes": done.bytes, "moved": done.moved}
            with self._change() as change:
                audit.append(change, self.actor, [Draft("compact", detail=detail)])
        return done

    def verify(
        self,
        *,
        records: bool = True,
        expected: Head | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Verified:
        """Everything that is wrong: index, log against its hashes, catalogue against the log, records against digests.

        Without `records` payload is not read. `expected`: an earlier `head()` that was kept elsewhere. `progress(n)`
        is told how many bytes of records have been read.
        """
        faults: list[str] = []
        entries = versions = size = 0
        try:
            with self._backend.said(), self._backend.snapshot() as view:
                entries = replay.check_chain(view, faults.append, expected)
                versions = replay.check_state(view, faults.append)
        except StoreError as error:
            faults.append(str(error))
        if records:
            try:
                with self._backend.said():
                    size = self._backend.check(faults.append, progress)
            except StoreError as error:
                faults.append(str(error))
        return Verified(entries, versions, size, tuple(faults))

    def backup(self, target: str | os.PathLike) -> int:
        """Bytes written to the new folder `target`, a store as of one moment; others go on meanwhile.

        Raises:
            ConfigError: `target` exists.
            StoreError: no room, or the store is damaged.
        """
        return self._backend.backup(Path(target))

    @contextlib.contextmanager
    def _change(self) -> Iterator[Change]:
        with self._backend.said(), self._backend.change() as change:
            yield change

    def _read(self, action: Callable[[Snapshot], T], *, single: bool = False) -> T:
        damaged = False
        for _ in range(_TRIES):
            try:
                with self._backend.said(), self._backend.snapshot(single=single) as view:
                    return action(view)
            except MovedError:
                continue
            except CorruptAdapterError:
                # may have been purged while it was read; if so, it is not there in the next view
                if damaged:
                    raise
                damaged = True
        raise StoreError(f"{self._backend.location}: objects move faster than they can be read; run verify")

    def _about(self, wanted: Reference, action: Callable[[Change, Name, Found], Draft]) -> None:
        with self._change() as change:
            found = resolve(change, wanted)
            audit.append(change, self.actor, [action(change, find_name(change, wanted.name), found)])

    def _named(self, name: str, action: Callable[[Change, Name], Draft]) -> Draft:
        check_name(name)
        with self._change() as change:
            draft = action(change, find_name(change, name))
            audit.append(change, self.actor, [draft])
        return draft

    def _erase(self, purge: int | None = None) -> int:
        """Bytes that were waiting to be overwritten and are; the log says so."""
        places = self._backend.erase()
        if places:
            detail = {"bytes": sum(places.values()), "objects": len(places)}
            with self._change() as change:
                change.erased(places)
                audit.append(
                    change, self.actor, [Draft("erased", detail=detail | ({"purge": purge} if purge else {}))]
                )
        return sum(places.values())


def _opened(location: str | os.PathLike, create: bool, timeout: float, segment_bytes: int) -> Backend:
    if str(location).startswith(SCHEMES):
        from modicum.store.engine.postgres import Postgres

        if create:
            Postgres.create(str(location), TABLES)
        return Postgres(str(location), TABLES, timeout=timeout)
    folder = Path(location)
    if create and not folder.joinpath(INDEX).is_file():
        Embedded.create(folder, TABLES, segment_bytes)
    return Embedded(folder, timeout=timeout)


def _groups(items: Iterator[Prepared], most: int) -> Iterator[list[Prepared]]:
    """The items in groups of up to `most`, and of no more bytes than one change should write."""
    if most < 1:
        raise ConfigError(f"batch = {most}, must be at least 1")
    while group := list(itertools.islice(items, 1)):
        size = len(group[0].payload.data)
        while len(group) < most and size < _BATCH_BYTES and (item := next(items, None)) is not None:
            group.append(item)
            size += len(item.payload.data)
        yield group


def _user() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # no entry in the user database, as in many containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
