"""Bases on disk: safetensors files that are written whole or not at all, and a cache of them by content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from modicum.adapters.fingerprint import TOLERANCE, compare
from modicum.errors import CorruptAdapterError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from modicum.adapters.basis import Basis

FORMAT = "modicum-basis-1"


class CacheInfo(NamedTuple):
    """What a cache holds."""

    folder: str
    entries: int
    bytes: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> None:
    """Write one safetensors file with a checksum, whole or not at all; replaces an existing file.

    Raises:
        OSError: the folder cannot be written or the disk is full; no partial file is left.
    """
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    texts |= {"format": FORMAT, "checksum": _checksum(plain, texts)}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(plain, texts))
            file.flush()
            os.fsync(file.fileno())
        Path(partial).chmod(0o644)
        Path(partial).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(partial).unlink()
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file of `write_tensors`.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptAdapterError: it is truncated, altered, of another format, or holds numbers that are not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CorruptAdapterError(f"{path} is no readable safetensors file ({error}). {_RENEW}") from error
    if texts.pop("format", None) != FORMAT:
        raise CorruptAdapterError(f"{path} is no basis file: its metadata lack format = {FORMAT!r}. {_RENEW}")
    if texts.pop("checksum", None) != _checksum(tensors, texts):
        raise CorruptAdapterError(f"{path} is damaged: its checksum does not match its contents. {_RENEW}")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CorruptAdapterError(f"{path} holds NaN or infinite values in {', '.join(broken[:5])}. {_RENEW}")
    return tensors, texts


_RENEW = "Copy it again from where it was made, or rebuild it with `modicum basis build MODEL --output FILE`."


def _checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    state = hashlib.sha256(json.dumps(sorted(texts.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


class BasisCache:
    """A folder of factors by content: one file per (weight digest, specification, canonical size).

    Safe for any number of processes: files appear whole, and two writers of one key write the same content.
    A damaged file counts as absent and is replaced. A folder that cannot be written costs one warning.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        root = os.environ.get("MODICUM_CACHE") or Path.home() / ".cache" / "modicum"
        self.folder = Path(folder) if folder is not None else Path(root) / "basis"
        self._warned = False

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors stored under `key`, None when absent, unreadable or damaged."""
        try:
            return read_tensors(self._path(key))[0]
        except (OSError, CorruptAdapterError):
            return None

    def store(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` under `key`; warns once and goes on when the folder cannot be written."""
        try:
            write_tensors(self._path(key), tensors, {})
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"bases are not cached, they are computed again each time: {self.folder} cannot be written "
                    f"({error.strerror or error}). Set MODICUM_CACHE to a folder with space.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def add(self, basis: Basis) -> Path:
        """The file in which `basis` is now kept under its fingerprint, for `get`.

        Raises:
            OSError: the folder cannot be written.
        """
        name = hashlib.sha256(basis.fingerprint().encode()).hexdigest()[:32]
        path = self.folder / "stored" / f"{name}.safetensors"
        basis.save(path)
        return path

    def get(self, fingerprint: str, ranks: Mapping[str, int] | None = None) -> Basis | None:
        """The added basis that `fingerprint` names, None when there is none.

        `ranks` (layer name -> rank) finds an added basis that holds more layers or columns than the adapter
        uses, and returns that part of it.
        """
        from modicum.adapters.basis import Basis

        for path in sorted((self.folder / "stored").glob("*.safetensors")):
            try:
                basis = Basis.load(path)
            except (OSError, CorruptAdapterError):
                continue
            if ranks is not None:
                if any(name not in basis or basis[name].u.shape[1] < rank for name, rank in ranks.items()):
                    continue
                basis = basis.part(ranks)
            if compare(fingerprint, basis.fingerprint(), basis.columns) <= TOLERANCE:
                return basis
        return None

    def info(self) -> CacheInfo:
        """How many entries and bytes the cache holds."""
        sizes = [path.stat().st_size for path in self._files()]
        return CacheInfo(str(self.folder), len(sizes), sum(sizes))

    def clear(self) -> CacheInfo:
        """What was removed: every entry, added bases included."""
        before = self.info()
        for path in self._files():
            path.unlink(missing_ok=True)
        return before

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def _files(self) -> Iterator[Path]:
        yield from self.folder.glob("*/*.safetensors") if self.folder.is_dir() else ()
