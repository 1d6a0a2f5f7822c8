"""A subset of a store as one file: versions with their records, labels and lineage, to be taken into another store.

    first line    MODICUM-ARCHIVE 1
    second line   {"store": "…", "created": "…", "actor": "…"}
    then, for each version, by name and number, one line of JSON and, where no earlier version has the same record,
    its record, `bytes` long, and a line break:
                  {"name": "ada", "version": 3, "digest": "…", "bytes": 10320, "here": true, "tags": ["night"], …}
    last line     {"versions": 12, "records": 9, "digest": "…"}: BLAKE2b-256 of everything before it

Nothing but JSON and records (see `record`), both checked before anything is stored: sizes against what the file
holds before memory is taken, names, digests, and the digest of the whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from modicum.errors import ConfigError, CorruptAdapterError, ModicumError
from modicum.store.atomic import new_file
from modicum.store.carried import Carried, TakenIn, take_in
from modicum.store.catalogue.publish import Put, prepare

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from modicum.store.catalogue.listing import Filter
    from modicum.store.store import Store

MAGIC = b"MODICUM-ARCHIVE 1\n"
SUFFIX = ".modicum-archive"
#: no version says more than fits into this
_MOST_LINE = 1 << 20
_AGAIN = "get the file again, or export it again"


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    versions: int
    records: int
    bytes: int


@dataclass(frozen=True)
class Archive:
    """The contents of an archive that was read from end to end and found whole."""

    path: Path
    #: what it says about where it comes from
    source: str
    versions: tuple[Carried, ...]
    #: digest -> (start, size) of the record
    places: dict[str, tuple[int, int]]


def export_archive(
    store: Store,
    path: str | os.PathLike,
    wanted: Filter | str | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Exported:
    """What was written to `path`: the versions that meet the conditions, as of one moment; whole or not at all.

    `progress(n)` is told how many versions are written.

    Raises:
        ConfigError: the file exists and `overwrite` is False, or nothing meets the conditions.
        CorruptAdapterError: a record is damaged.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already; choose another name, or overwrite it")
    seen: set[str] = set()
    versions = 0
    with store.snapshot() as frozen, new_file(target) as stream:
        out = _Digested(stream)
        out.write(MAGIC)
        about = {
            "store": public(store.location),
            "created": datetime.now(UTC).isoformat(),
            "actor": store.actor,
        }
        out.write(_line(about))
        for versions, version in enumerate(frozen.versions(wanted), 1):
            one = Carried.of(frozen, version)
            here = one.digest not in seen
            out.write(_line({**json.loads(one.line()), "here": here}))
            if here:
                seen.add(one.digest)
                out.write(frozen.get_bytes(str(version)) + b"\n")
            if progress is not None:
                progress(versions)
        if not versions:
            raise ConfigError("nothing in the store meets these conditions; `ls` shows what there is")
        end = {"versions": versions, "records": len(seen), "digest": out.digest.hexdigest()}
        out.write(_line(end))
    return Exported(target, versions, len(seen), out.size)


def read_archive(path: str | os.PathLike) -> Archive:
    """The contents of an archive, every line, size and digest of it checked.

    Raises:
        ConfigError: there is no such file, or it is something else.
        CorruptAdapterError: it is damaged, or made by somebody who means harm.
    """
    source = Path(path)
    if not source.is_file():
        folder = "; folders are put with `modicum store put-many`" if source.is_dir() else ""
        raise ConfigError(f"no archive at {source}{folder}")
    try:
        with source.open("rb") as stream:
            return _read(source, stream, source.stat().st_size)
    except CorruptAdapterError as error:
        raise CorruptAdapterError(f"{source}: {error}; {_AGAIN}") from error


def import_archive(
    store: Store,
    path: str | os.PathLike,
    *,
    move_aliases: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TakenIn:
    """What became of the versions in an archive; nothing is stored unless all of it is sound. See `take_in`.

    Raises:
        ConfigError, CorruptAdapterError: see `read_archive`. StoreError: see `Store.put_many`.
    """
    archive = read_archive(path)
    with archive.path.open("rb") as stream:

        def load(one: Carried) -> bytes:
            start, size = archive.places[one.digest]
            stream.seek(start)
            return stream.read(size)

        return take_in(
            store, archive.versions, load, archive.source, move_aliases=move_aliases, progress=progress
        )


def public(location: str) -> str:
    """A location without the name and password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", location)


class _Digested:
    """Writes to a stream and digests what it wrote."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.size = stream, 0
        self.digest = hashlib.blake2b(digest_size=32)

    def write(self, data: bytes) -> None:
        self._stream.write(data)
        self.digest.update(data)
        self.size += len(data)


class _Checked:
    """Reads a stream of a known size, digests what it read, and never asks for more than there is."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size, self.at = stream, size, 0
        self.digest = hashlib.blake2b(digest_size=32)

    def line(self, *, digest: bool = True) -> bytes:
        found = self._stream.readline(_MOST_LINE)
        if not found.endswith(b"\n"):
            raise CorruptAdapterError(f"it is cut short, or has a line that is too long, at {self.at}")
        return self._took(found, digest=digest)

    def take(self, size: int) -> bytes:
        if size > self._size - self.at:
            raise CorruptAdapterError(f"a record of {size} bytes reaches past the end, at {self.at}")
        return self._took(self._stream.read(size))

    def _took(self, found: bytes, *, digest: bool = True) -> bytes:
        self.at += len(found)
        if digest:
            self.digest.update(found)
        return found


def _read(path: Path, stream: IO[bytes], size: int) -> Archive:
    front = stream.read(len(MAGIC))
    if front != MAGIC:
        if front.startswith(MAGIC[:-2]):
            raise CorruptAdapterError("it has a newer format; upgrade modicum")
        raise ConfigError(f"{path} is no archive of a store; `modicum store export` writes one")
    stream.seek(0)
    source = _Checked(stream, size)
    source.take(len(MAGIC))
    about = _object(source.line())
    versions: dict[str, Carried] = {}
    places: dict[str, tuple[int, int]] = {}
    while True:
        before, at = source.digest.hexdigest(), source.at
        values = _object(source.line())
        if "name" not in values:
            break
        here = values.pop("here", None)
        one = Carried.read(values)
        if str(one) in versions:
            raise CorruptAdapterError(f"{one} is in it twice, at {at}")
        if here is True and one.digest not in places:
            places[one.digest] = (source.at, one.bytes)
            _check_record(one, source.take(one.bytes))
            if source.take(1) != b"\n":
                raise CorruptAdapterError(f"a record does not end where it should, at {source.at}")
        elif here is not False or places.get(one.digest, (0, -1))[1] != one.bytes:
            raise CorruptAdapterError(f"the record of {one} is not where it should be, at {at}")
        versions[str(one)] = one
    end = {"versions": len(versions), "records": len(places), "digest": before}
    if values != end or source.at != size:
        raise CorruptAdapterError("it is damaged: its last line is not what it should be")
    said = [str(about.get(key, ""))[:200] for key in ("store", "created")]
    return Archive(path, f"{path.name} from {said[0]} {said[1]}".rstrip(), tuple(versions.values()), places)


def _check_record(one: Carried, data: bytes) -> None:
    try:
        stated = prepare(Put(one.name, data)).payload.digest.hex()
    except ModicumError as error:
        raise CorruptAdapterError(f"{one}: {error}") from error
    if stated != one.digest:
        raise CorruptAdapterError(f"{one}: its record has another digest than it says")


def _object(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptAdapterError(f"a line is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise CorruptAdapterError("a line is no object")
    return values


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
