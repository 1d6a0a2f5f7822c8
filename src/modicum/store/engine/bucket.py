"""Objects as immutable files named by their digest, in any place that fsspec reaches: a folder, S3, GCS, Azure."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from modicum.errors import ConfigError, StoreError
from modicum.store.atomic import flush

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from types import ModuleType

#: files of a folder written at a time
_AT_ONCE = 16


@final
class Bucket:
    """The objects of one store, in a folder of its own beneath `url`, so that stores never take each other's."""

    def __init__(self, url: str, store: bytes) -> None:
        self.url, self._folder = url, f"modicum-{store.hex()}"
        self._process, self._reached = 0, ("", None)
        self._guard = threading.Lock()

    def put(self, objects: Mapping[bytes, bytes]) -> None:
        """Returns when the objects (digest -> bytes) are kept; each is there as a whole or not at all."""
        with self._said() as (root, files):
            named = {self._path(root, digest): data for digest, data in objects.items()}
            if _is_local(files):
                with ThreadPoolExecutor(_AT_ONCE) as pool:  # the disk flushes many side by side
                    list(pool.map(_write, map(Path, named), named.values()))
                for folder in {Path(path).parent for path in named}:
                    flush(folder)
            elif named:
                try:
                    files.pipe(named)
                except FileNotFoundError:  # servers with real folders
                    for folder in {path.rpartition("/")[0] for path in named}:
                        files.makedirs(folder, exist_ok=True)
                    files.pipe(named)

    def get(self, digests: Iterable[bytes]) -> dict[bytes, bytes]:
        """Digest -> bytes, unchecked; what is not there is left out."""
        with self._said() as (root, files):
            paths = {self._path(root, digest): digest for digest in digests}
            if not paths:
                return {}
            found = files.cat(list(paths), on_error="return")
            absent = (FileNotFoundError, NotADirectoryError)
            for value in found.values():
                if isinstance(value, Exception) and not isinstance(value, absent):
                    raise value
            return {paths[path]: data for path, data in found.items() if isinstance(data, bytes)}

    def remove(self, names: Iterable[bytes | str]) -> None:
        """Returns when the objects are gone, if they were there; what is no object goes by its path (see `listed`)."""
        with self._said() as (root, files):
            for name in names:
                path = name if isinstance(name, str) else self._path(root, name)
                with contextlib.suppress(FileNotFoundError):
                    files.rm_file(path)
                    if _is_local(files):
                        flush(Path(path).parent)

    def listed(self) -> dict[bytes | str, int]:
        """Bytes of everything in the folder, by digest; what has no digest for a name by its path."""
        with self._said() as (root, files):
            files.invalidate_cache()
            found: dict[bytes | str, int] = {}
            for path, about in files.find(f"{root}/{self._folder}", detail=True).items():
                found[_digest(path) or path] = int(about.get("size") or 0)
            return found

    def check(self) -> None:
        """Returns when an object could be written, read and removed.

        Raises:
            ConfigError: the address has characters that file systems take for wild cards.
            StoreError: it could not.
        """
        if set(self.url) & set("*?[]"):
            raise ConfigError(f"objects cannot be kept in {self.url!r}: no *, ?, [ or ] in the address")
        digest, data = os.urandom(32), b"may modicum write here?"
        self.put({digest: data})
        found = self.get([digest])
        self.remove([digest])
        if found != {digest: data}:
            raise StoreError(f"{self.url} does not give back what is written to it")

    def _path(self, root: str, digest: bytes) -> str:
        name = digest.hex()
        return f"{root}/{self._folder}/{name[:2]}/{name}"

    @contextlib.contextmanager
    def _said(self) -> Iterator[tuple[str, Any]]:
        """The root and the file system; whatever that raises becomes a `StoreError` that names the place."""
        try:
            yield self._reach()
        except (StoreError, ConfigError):
            raise
        except Exception as error:  # every kind of file system has errors of its own
            raise StoreError(
                f"objects in {self.url} cannot be reached ({type(error).__name__}: {error}): nothing of this change "
                "was kept; look at the address, at the rights, and at the network"
            ) from error

    def _reach(self) -> tuple[str, Any]:
        with self._guard:
            if self._process != os.getpid():  # connections are not shared with a forked child
                files, root = _fsspec().core.url_to_fs(self.url, skip_instance_cache=True)
                self._process, self._reached = os.getpid(), (root.rstrip("/"), files)
        return self._reached


def _fsspec() -> ModuleType:
    try:
        import fsspec.core
    except ImportError as error:
        raise ConfigError("objects of a store need fsspec: pip install 'modicum[postgres]'") from error
    return fsspec


def _is_local(files: Any) -> bool:
    return "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,))


def _digest(path: str) -> bytes | None:
    name = path.rpartition("/")[2]
    with contextlib.suppress(ValueError):
        return bytes.fromhex(name) if len(name) == 64 else None
    return None


def _write(path: Path, data: bytes) -> None:
    """Write `data` aside, flush it, and rename it into place; fsspec does not flush."""
    aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    if not path.parent.is_dir():
        path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        for folder in (path.parent.parent, path.parent.parent.parent):
            flush(folder)
    try:
        handle = os.open(aside, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
