"""Folders full of adapters, put into a store in batches: what is faulty is listed, everything else is stored."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modicum.errors import ConfigError, ModicumError, NotStoredError, did_you_mean, listing
from modicum.store.catalogue.names import check_name
from modicum.store.catalogue.publish import Put, prepare
from modicum.store.record import SUFFIX
from modicum.store.sources import kind_of, read_source

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence

    from modicum.store.store import Store

#: what names are made of, by field of a template
FIELDS = ("path", "parent", "name", "slug")
_BATCH = 500
_BATCH_BYTES = 1 << 26


@dataclass(frozen=True)
class Fault:
    """What was not stored, and why."""

    path: Path
    error: str


@dataclass(frozen=True)
class Bulk:
    """What became of all that was found."""

    #: `name@version` of everything stored
    stored: tuple[str, ...]
    #: what was not put because the newest version under its name is the same record
    known: tuple[Path, ...]
    faults: tuple[Fault, ...]


def find_sources(folders: Sequence[str | os.PathLike]) -> list[tuple[Path, Path]]:
    """(folder, what can be put) for all records, PEFT folders and runs below the folders, in order of their paths.

    Runs and PEFT folders are not looked into, hidden folders and links to folders are left out.

    Raises:
        ConfigError: a folder is missing, or none of them holds anything.
    """
    absent = [str(folder) for folder in folders if not Path(folder).exists()]
    if absent:
        raise ConfigError(f"there is no {listing(absent)}")
    found = [(Path(folder), source) for folder in folders for source in _below(Path(folder))]
    if not found:
        raise ConfigError(
            f"no adapter below {listing([str(f) for f in folders])}: neither {SUFFIX} files nor PEFT folders nor runs"
        )
    return found


def put_folders(
    store: Store,
    folders: Sequence[str | os.PathLike],
    *,
    template: str = "{path}",
    dtype: str = "auto",
    tags: Sequence[str] = (),
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Bulk:
    """What became of every adapter below the folders; each batch is stored as a whole.

    `template` makes names: `{path}` is the path below the folder, `{parent}` that without its last part, which is
    `{name}`; `{slug}` is the path with a `-` for everything that names may not have. Sources of one name become its
    versions, in order. What the newest version under its name already holds is not put again, so that an interrupted
    import goes on where it was. `strict` stores nothing if anything is faulty. `progress(done, all)`.

    Raises:
        ConfigError: the template is wrong, nothing was found, or with `strict`, all that is faulty.
    """
    _check_template(template)
    sources = find_sources(folders)
    puts = _Puts(store, template, dtype, tuple(tags))
    if strict:
        for _ in puts.read(sources):
            pass
        if puts.faults:
            lines = "".join(f"\n  {fault.path}: {fault.error}" for fault in puts.faults)
            raise ConfigError(f"{len(puts.faults)} of {len(sources)} are faulty, nothing was stored:{lines}")
        puts = _Puts(store, template, dtype, tuple(tags))
    stored: list[str] = []
    batch: list[Put] = []
    size = done = 0

    def write() -> None:
        numbers = store.put_many(batch, batch=len(batch))
        stored.extend(f"{put.name}@{number}" for put, number in zip(batch, numbers, strict=True))
        batch.clear()

    for done, put in puts.read(sources):
        if put is not None:
            batch.append(put)
            size += len(put.record) if isinstance(put.record, bytes) else 0
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            write()
            size = 0
        if progress is not None:
            progress(done, len(sources))
    if batch:
        write()
    return Bulk(tuple(stored), tuple(puts.known), tuple(puts.faults))


class _Puts:
    """Reads sources one by one and keeps what is wrong with them."""

    def __init__(self, store: Store, template: str, dtype: str, tags: tuple[str, ...]) -> None:
        self._store, self._template, self._dtype, self._tags = store, template, dtype, tags
        self._newest: dict[str, str | None] = {}
        self.known: list[Path] = []
        self.faults: list[Fault] = []

    def read(self, sources: Sequence[tuple[Path, Path]]) -> Iterator[tuple[int, Put | None]]:
        """(how many have been read, what is to be put) for every source; None for known and faulty ones."""
        for index, (root, path) in enumerate(sources, 1):
            put = None
            try:
                put = self._read(root, path)
            except (ModicumError, OSError) as error:
                self.faults.append(Fault(path, str(error)))
            yield index, put

    def _read(self, root: Path, path: Path) -> Put | None:
        name = check_name(name_of(root, path, self._template))
        found = read_source(path, dtype=self._dtype)
        put = Put(
            name,
            found.record,
            metrics=found.metrics,
            seed=found.seed,
            data_digest=found.data_digest,
            tags=self._tags,
            source=str(path),
        )
        payload = prepare(put).payload
        digest = payload.digest.hex()
        if self._newest_of(name) == digest:
            self.known.append(path)
            return None
        self._newest[name] = digest
        return Put(**{**vars(put), "record": payload.data})

    def _newest_of(self, name: str) -> str | None:
        if name not in self._newest:
            try:
                self._newest[name] = self._store.show(name).digest
            except NotStoredError:
                self._newest[name] = None
        return self._newest[name]


def name_of(root: Path, path: Path, template: str) -> str:
    """The name that a source at `path`, found below `root`, gets."""
    inner = path.relative_to(root) if path != root else Path(path.resolve().name)
    inner = inner.with_name(inner.name.removesuffix(SUFFIX))
    text = inner.as_posix()
    slug = re.sub(r"(^|/)[^A-Za-z0-9_]+", r"\1", re.sub(r"[^A-Za-z0-9_.+=/-]+", "-", text))
    return template.format(
        path=text, parent=inner.parent.as_posix().removeprefix("."), name=inner.name, slug=slug
    )


def _below(folder: Path) -> Iterator[Path]:
    if kind_of(folder) is not None:
        yield folder
        return
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if kind_of(path) is not None:
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _below(path)


def _check_template(template: str) -> None:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ConfigError(f"the template {template!r} cannot be read: {error}") from error
    wrong = [f"{{{field}}}{did_you_mean(field, FIELDS)}" for field in fields if field not in FIELDS]
    if wrong or not fields:
        fault = f"has {listing(wrong)}" if wrong else "gives every adapter one name"
        known = ", ".join(f"{{{field}}}" for field in FIELDS)
        raise ConfigError(f"the template {template!r} {fault}; known: {known}")
