"""A store's contents at any place that fsspec reaches: a folder, S3, and so on; only what is new travels.

    manifest-000012.json      {"number": 12, "catalogue": {"file": …, "bytes": …}, "packs": {…}, …, "digest": …}
    catalogue-DIGEST.jsonl    one line for each record (where it lies) and one for each version (see `carried`)
    packs/DIGEST.pack         records, one after another; never changed

Files are named by the BLAKE2b-256 of their bytes. The manifest is written last and states its own digest: the one
with the highest number that is whole counts, so that until a sync has ended the one before does. Then whatever the
new manifest does not name is deleted. A pack with a record that the store no longer has is written anew without it:
what was purged leaves the place with the next sync.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from modicum.errors import (
    ConfigError,
    ConflictError,
    CorruptAdapterError,
    MissingExtraError,
    ModicumError,
    StoreError,
)
from modicum.store.archive import public
from modicum.store.atomic import flush
from modicum.store.carried import Carried, TakenIn, take_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modicum.store.reading import Readable
    from modicum.store.store import Store

FORMAT = 1
_PACK_BYTES = 1 << 25
_MANIFEST = re.compile(r"manifest-(\d{6,12})\.json")
_FILE = re.compile(r"(packs/[0-9a-f]{64}\.pack|catalogue-[0-9a-f]{64}\.jsonl)")
#: packs that a pull keeps in memory
_HELD = 4


@dataclass(frozen=True)
class Pushed:
    """What a sync to a place did."""

    url: str
    #: number of the manifest, versions and records that the place has now
    number: int
    versions: int
    records: int
    #: records and bytes that travelled; files that were deleted
    sent: int
    sent_bytes: int
    deleted: int


@dataclass
class _Catalogue:
    """What a place holds: (pack, start, size) of every record, and the versions as they were written."""

    records: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    versions: list[Carried] = field(default_factory=list)


def push(store: Store, url: str, *, progress: Callable[[int, int], None] | None = None) -> Pushed:
    """What was done so that the place `url` holds what `store` does at this moment.

    `progress(n, all)` is told of every n records more that are there. One sync to a place at a time.

    Raises:
        ConfigError: another store is kept there. ConflictError: somebody else synchronized meanwhile.
        StoreError: the place cannot be reached or written; what was there before is still whole.
        MissingExtraError: a package for this kind of place is not installed.
    """
    place = _Place(url)
    with place.said(), store.snapshot() as frozen, tempfile.TemporaryFile() as lines:
        mine = _identity(frozen)
        before = place.manifest()
        if before is not None and before["store"] != mine:
            raise ConfigError(
                f"{place.url} holds another store ({before['location']}); choose an empty place"
            )
        old = {} if before is None else place.catalogue(before).records
        needed, versions = _describe(frozen, lines)
        # packs are kept as they are, or not at all
        stale = {pack for digest, (pack, _, _) in old.items() if digest not in needed}
        kept = {d: at for d, at in old.items() if at[0] not in stale}
        todo = {digest: version for digest, version in needed.items() if digest not in kept}
        sent = _send(place, frozen, todo, progress)
        records = kept | sent
        catalogue = place.put_catalogue(records, lines)
        head = frozen.head()
        number = 1 if before is None else before["number"] + 1
        manifest = {
            "format": FORMAT, "number": number, "store": mine, "location": public(store.location),
            "actor": store.actor, "created": datetime.now(UTC).isoformat(), "entries": head.entries, "head": head.hash,
            "versions": versions, "records": len(records), "catalogue": catalogue, "packs": _packs(records),
        }  # fmt: skip
        place.put_manifest(manifest)
        deleted = place.clean(manifest)
    return Pushed(
        place.url, number, versions, len(records), len(sent), sum(at[2] for at in sent.values()), deleted
    )


def pull(
    store: Store,
    url: str,
    *,
    move_aliases: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> TakenIn:
    """What became in `store` of the versions that the place `url` holds; see `take_in`.

    Raises:
        ConfigError: nothing is kept there. CorruptAdapterError: it is damaged.
        StoreError: the place cannot be reached, or see `Store.put_many`.
    """
    place = _Place(url)
    with place.said():
        manifest = place.manifest()
        if manifest is None:
            raise ConfigError(f"nothing is kept at {place.url}: `modicum store sync URL` sends a store there")
        catalogue = place.catalogue(manifest)

        @functools.lru_cache(maxsize=_HELD)
        def held(pack: str) -> bytes:
            return place.get(pack, manifest["packs"][pack])

        def load(one: Carried) -> bytes:
            pack, start, size = catalogue.records[one.digest]
            return held(pack)[start : start + size]

        source = f"{place.url} (manifest {manifest['number']})"
        return take_in(store, catalogue.versions, load, source, move_aliases=move_aliases, progress=progress)


def _identity(view: Readable) -> str:
    query = "SELECT value FROM settings WHERE key = 'store'"
    found = view._read(lambda rows: rows.rows(query))  # noqa: SLF001 - a question of the same floor
    return bytes(found[0][0]).hex() if found else ""


def _describe(frozen: Readable, lines: IO[bytes]) -> tuple[dict[str, str], int]:
    """(digest -> a version with it, how many versions), after the line of every version was written to `lines`."""
    needed: dict[str, str] = {}
    count = 0
    for version in frozen.versions():
        one = Carried.of(frozen, version)
        needed.setdefault(one.digest, str(one))
        lines.write(one.line().encode() + b"\n")
        count += 1
    return needed, count


def _send(
    place: _Place, frozen: Readable, todo: dict[str, str], progress: Callable[[int, int], None] | None
) -> dict[str, tuple[str, int, int]]:
    """Where each record lies now that it was sent."""
    sent: dict[str, tuple[str, int, int]] = {}
    parts: list[tuple[str, bytes]] = []
    size = 0

    def write() -> None:
        name, start, count = place.put_pack(b"".join(data for _, data in parts)), 0, len(parts)
        for digest, data in parts:
            sent[digest] = (name, start, len(data))
            start += len(data)
        parts.clear()
        if progress is not None:
            progress(count, len(todo))

    for digest, version in todo.items():
        data = frozen.get_bytes(version)
        if size + len(data) > _PACK_BYTES and parts:
            write()
            size = 0
        parts.append((digest, data))
        size += len(data)
    if parts:
        write()
    return sent


def _packs(records: dict[str, tuple[str, int, int]]) -> dict[str, int]:
    """Pack -> its size: the end of what lies last in it."""
    sizes: dict[str, int] = {}
    for pack, start, size in records.values():
        sizes[pack] = max(sizes.get(pack, 0), start + size)
    return dict(sorted(sizes.items()))


class _Place:
    """The files at one URL."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = public(url)
        with self.said():
            self._fs, self._root = fsspec.core.url_to_fs(url)
        self._root = self._root.rstrip("/")
        #: local files are flushed, and their folder is the owner's alone
        self._local = "file" in (
            self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        )

    @contextlib.contextmanager
    def said(self) -> Iterator[None]:
        """Turns what the libraries of file systems say inside into errors that name the place."""
        try:
            yield
        except ModicumError:
            raise
        except ImportError as error:
            raise MissingExtraError(f"{self.url}: {error}") from error
        except Exception as error:  # every file system has errors of its own
            raise StoreError(
                f"{self.url}: {type(error).__name__} {error}; what was there before counts"
            ) from error

    def manifest(self) -> dict[str, Any] | None:
        """The manifest that counts: the highest that is whole."""
        found = None
        names = [name for name in self._names() if _MANIFEST.fullmatch(name)]
        for name in sorted(names, key=lambda one: int(_MANIFEST.fullmatch(one)[1]), reverse=True):  # pyright: ignore[reportOptionalSubscript]
            found = _manifest(self._fs.cat_file(self._path(name)))
            if found is not None:
                break
        if names and found is None:
            raise CorruptAdapterError(f"{self.url}: none of its manifests is whole; choose an empty place")
        if found is not None and found["format"] > FORMAT:
            raise StoreError(
                f"{self.url} has format {found['format']}, this modicum knows {FORMAT}: upgrade modicum"
            )
        return found

    def catalogue(self, manifest: dict[str, Any]) -> _Catalogue:
        """What the place holds, every line checked."""
        found = _Catalogue()
        packs = manifest["packs"]
        try:
            for line in self.get(manifest["catalogue"]["file"], manifest["catalogue"]["bytes"]).splitlines():
                values = json.loads(line)
                if "record" in values:
                    pack, start, size = values["at"]
                    if not (start >= 0 and size >= 0 and start + size <= packs[pack]):
                        raise ValueError(f"a record of {size} bytes at {start} of {pack}")  # noqa: TRY301 - one place words it
                    found.records[values["record"]] = (pack, start, size)
                else:
                    found.versions.append(Carried.read(values))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptAdapterError(f"{self.url}: its catalogue cannot be read ({error})") from error
        lost = [str(one) for one in found.versions if one.digest not in found.records]
        if lost:
            raise CorruptAdapterError(f"{self.url}: no record of {lost[0]} and {len(lost) - 1} more is there")
        return found

    def get(self, name: str, size: int) -> bytes:
        """The contents of a file that is named by their digest."""
        if not _FILE.fullmatch(name):
            raise CorruptAdapterError(
                f"{self.url}: its manifest names {name[:80]!r}, which is no file of a store"
            )
        path = self._path(name)
        there = self._fs.size(path)
        data = self._fs.cat_file(path) if there == size else b""
        if there != size or hashlib.blake2b(data, digest_size=32).hexdigest() not in name:
            raise CorruptAdapterError(
                f"{self.url}: {name} is damaged; sync to an empty place, and keep this one"
            )
        return data

    def put_pack(self, data: bytes) -> str:
        """The name of a pack with these contents, which is there now."""
        name = f"packs/{hashlib.blake2b(data, digest_size=32).hexdigest()}.pack"
        self._put(name, data)
        return name

    def put_catalogue(self, records: dict[str, tuple[str, int, int]], versions: IO[bytes]) -> dict[str, Any]:
        """File and size of the catalogue, which is there now."""
        lines = [
            json.dumps({"record": digest, "at": at}, separators=(",", ":")) for digest, at in records.items()
        ]
        versions.seek(0)
        data = "".join(f"{line}\n" for line in lines).encode() + versions.read()
        name = f"catalogue-{hashlib.blake2b(data, digest_size=32).hexdigest()}.jsonl"
        self._put(name, data)
        return {"file": name, "bytes": len(data)}

    def put_manifest(self, manifest: dict[str, Any]) -> None:
        """Returns when `manifest` is the one that counts."""
        data = json.dumps({**manifest, "digest": _digest(manifest)}, indent=1).encode()
        self._put(f"manifest-{manifest['number']:06}.json", data)
        if self.manifest() != manifest:
            raise ConflictError(f"{self.url}: somebody else synchronized to it meanwhile; sync again")

    def clean(self, manifest: dict[str, Any]) -> int:
        """How many files were deleted because `manifest` does not name them."""
        named = {f"manifest-{manifest['number']:06}.json", manifest["catalogue"]["file"], *manifest["packs"]}
        ours = [name for name in self._names() if _MANIFEST.fullmatch(name) or _FILE.fullmatch(name)]
        # manifests first: one must never name what is gone
        unnamed = sorted(set(ours) - named, key=lambda name: (not _MANIFEST.fullmatch(name), name))
        for name in unnamed:
            self._fs.rm_file(self._path(name))
        return len(unnamed)

    def _put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        parent = path.rpartition("/")[0]
        if self._local:
            Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True)
            Path(parent).mkdir(mode=0o700, exist_ok=True)
        else:
            self._fs.makedirs(parent, exist_ok=True)
        self._fs.pipe_file(path, data)
        if self._local:
            Path(path).chmod(0o600)
            flush(Path(path))
            flush(Path(parent))

    def _names(self) -> list[str]:
        """The names of all files, as they are named in a manifest."""
        self._fs.invalidate_cache()
        found = []
        for folder in ("", "packs/"):
            with contextlib.suppress(FileNotFoundError):
                paths = self._fs.ls(self._path(folder).rstrip("/"), detail=False)
                found += [folder + path.rstrip("/").rpartition("/")[2] for path in paths]
        return found

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _manifest(data: bytes) -> dict[str, Any] | None:
    """The manifest in `data`, None if it is cut short or changed."""
    try:
        values = json.loads(data)
        stated = values.pop("digest")
        whole = stated == _digest(values)
        sizes = [values["catalogue"]["bytes"], values["number"], values["format"], *values["packs"].values()]
        whole = whole and all(isinstance(size, int) and size >= 0 for size in sizes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return values if whole else None


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=32).hexdigest()
