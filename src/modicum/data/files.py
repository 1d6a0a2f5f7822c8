"""Rows from files: JSON lines, JSON, CSV, Parquet and plain text, also compressed; or from the hub."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.errors import DataError, did_you_mean, listing

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator

    from modicum.data.options import Split

BUNDLED = "bundled:"
#: names under which folders keep a split
SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
_COMPRESSED = (".gz", ".xz")

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows with the place each one came from."""

    source: str
    rows: list[Row]
    #: file name and line (or row) number of each row, for messages
    places: list[tuple[str, int]]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the first rows, in order."""
        return list(dict.fromkeys(name for row in self.rows[:100] for name in row))

    def where(self, index: int) -> str:
        """`file:line` of the row at `index`."""
        name, line = self.places[index]
        return f"{name}:{line}"

    def subset(self, indices: list[int]) -> Rows:
        """The rows at `indices`, in that order."""
        return Rows(self.source, [self.rows[i] for i in indices], [self.places[i] for i in indices])

    def sample(self, count: int | None, seed: int) -> Rows:
        """At most `count` rows drawn by `seed`, in their original order; all when `count` is None."""
        if count is None or count >= len(self):
            return self
        drawn = np.random.default_rng(seed).permutation(len(self))[:count]
        return self.subset(sorted(drawn.tolist()))


def load_rows(source: str, split: Split = "train", hub_config: str | None = None) -> Rows:
    """The rows of `source`: a file, a folder, `bundled:NAME`, or a data set on the hub.

    Raises:
        DataError: nothing there, unknown file type, unreadable rows (all of them are listed), or no rows at all.
    """
    if source.startswith(BUNDLED):
        files = [_bundled(source.removeprefix(BUNDLED), split)]
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            files = _in_folder(path, split)
        elif path.is_file():
            files = [path]
        else:
            if _looks_local(source):
                raise DataError(_missing_message(path))
            return from_hub(source, split, hub_config)
    return read_files(files, source)


def has_split(source: str, split: Split) -> bool:
    """Whether a bundled task or a folder holds rows of `split` by name."""
    if source.startswith(BUNDLED):
        if source.partition("/")[2] not in ("", split):
            return False  # it names one split, and only that is meant
        try:
            return _bundled(source.removeprefix(BUNDLED), split).is_file()
        except (DataError, KeyError, ValueError, OSError):
            return False
    path = Path(source).expanduser()
    return path.is_dir() and bool(_named_for(path, split))


def read_files(files: list[Path], source: str = "") -> Rows:
    """The rows of all `files`, one after the other; see `load_rows`."""
    rows: list[Row] = []
    places: list[tuple[str, int]] = []
    faults: list[str] = []
    for file in files:
        for line, row in stream(file):
            if isinstance(row, str):
                faults.append(f"{file}:{line}: {row}")
            else:
                rows.append(row)
                places.append((file.name, line))
    if faults:
        raise DataError(f"{len(faults)} unreadable rows: " + listing(faults, 10))
    if not rows:
        raise DataError(f"{source or listing([str(f) for f in files])} holds no rows")
    return Rows(source or str(files[0]), rows, places)


def stream(file: Path) -> Iterator[tuple[int, Row | str]]:
    """(line, row) of one file after the other, without holding them; a row that cannot be read is its fault, a string.

    Raises:
        DataError: unknown file type, or the file is damaged.
    """
    reader = _READERS.get(_kind(file))
    if reader is None:
        known = sorted(_READERS)
        raise DataError(
            f"{file}: unknown file type {_kind(file)!r}{did_you_mean(_kind(file), known)}; readable are "
            f"{', '.join(known)}, each also compressed as .gz or .xz"
        )
    try:
        yield from reader(file)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file} is damaged or not what its name says: {error}") from error


def files_below(folder: Path) -> list[Path]:
    """All files below `folder` that `stream` reads, in order of their paths; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if path.is_file() and _kind(path) in _READERS)
    return sorted(
        path for path in found if not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open(file: Path) -> io.TextIOBase:
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix.lower(), open)
    return opener(file, "rt", encoding="utf-8-sig", newline="")


# Readers yield (line, row); a row that cannot be read is its fault as a string.


def _jsonl(file: Path) -> Iterator[tuple[int, Row | str]]:
    with _open(file) as stream:
        for line, text in enumerate(stream, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except json.JSONDecodeError as error:
                yield line, f"no JSON ({error.msg}, column {error.colno})"
                continue
            yield line, row if isinstance(row, dict) else f"a JSON {type(row).__name__}, must be an object"


def _json(file: Path) -> Iterator[tuple[int, Row | str]]:
    with _open(file) as stream:
        text = stream.read()
    if not text.lstrip().startswith("["):
        yield from _jsonl(file)
        return
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        yield error.lineno, f"no JSON ({error.msg}, column {error.colno})"
        return
    for number, row in enumerate(items, 1):
        yield number, row if isinstance(row, dict) else f"item {number} is no JSON object"


def _csv(file: Path) -> Iterator[tuple[int, Row | str]]:
    with _open(file) as stream:
        reader = csv.DictReader(stream, delimiter="\t" if _kind(file) == ".tsv" else ",")
        for row in reader:
            if None in row or None in row.values():
                found = sum(value is not None for key, value in row.items() if key is not None)
                extra = len(row.get(None) or [])  # pyright: ignore[reportArgumentType, reportCallIssue]
                yield (
                    reader.line_num,
                    f"{found + extra} cells, the header names {len(reader.fieldnames or [])}",
                )
            else:
                yield reader.line_num, dict(row)


def _parquet(file: Path) -> Iterator[tuple[int, Row | str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            number = 0
            for batch in parquet.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pa.ArrowException as error:
        yield 0, f"no readable Parquet ({error})"


def _txt(file: Path) -> Iterator[tuple[int, Row | str]]:
    # one document per file: line breaks are part of a text, and long documents are cut later, not here
    with _open(file) as stream:
        text = stream.read()
    if text.strip():
        yield 1, {"text": text.replace("\r\n", "\n")}


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Row | str]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}


def _bundled(name: str, split: Split) -> Path:
    from modicum.data import bundled

    task, _, wanted = name.partition("/")
    known = list(bundled.names())
    if task not in known:
        raise DataError(f"no bundled task {task!r}{did_you_mean(task, known)}; known: {', '.join(known)}")
    return Path(bundled.path(task, wanted or split))


def _in_folder(folder: Path, split: Split) -> list[Path]:
    """The files of a folder that hold `split`; all data files when none is named after a split."""
    named = _named_for(folder, split)
    if named:
        return named
    files = sorted(file for file in folder.iterdir() if file.is_file() and _kind(file) in _READERS)
    others = [name for name in SPLIT_NAMES if name != split and _named_for(folder, name)]
    if files and not others:
        return files
    found = listing(sorted(file.name for file in folder.iterdir()), 10)
    raise DataError(
        f"folder {folder} holds no {split} rows: expected a file named {' or '.join(SPLIT_NAMES[split])} with one of "
        f"the endings {', '.join(sorted(_READERS))}; it holds {found or 'nothing'}"
    )


def _named_for(folder: Path, split: str) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and _kind(file) in _READERS
        and file.name.split(".")[0].lower() in SPLIT_NAMES[split]
    )


def _looks_local(source: str) -> bool:
    path = Path(source)
    is_file_name = _kind(path) in _READERS or path.suffix.lower() in _COMPRESSED
    return is_file_name or source.startswith((".", "/", "~")) or source.count("/") > 1


def _missing_message(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"no file {path}: the folder {folder} does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    return f"no file {path}{did_you_mean(path.name, names)}; {folder} holds {listing(names, 8) or 'nothing'}"


def from_hub(source: str, split: str, config: str | None) -> Rows:
    """The rows of a data set on the hub, or in a folder that `datasets` reads alike.

    Raises:
        DataError: it cannot be had, or holds no such rows.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(source, config, split=split)
    except Exception as error:  # the hub client raises many kinds, all of which mean "not to be had"
        names = sorted(entry.name for entry in Path.cwd().iterdir())
        raise DataError(
            f"{source!r} is neither a local file or folder{did_you_mean(source, names)} nor a data set that could be "
            f"loaded from the hub (split {split}, configuration {config}): {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no details'}. Offline? Give a local path or bundled:NAME"
        ) from error
    rows = [dict(row) for row in loaded]
    if not rows:
        raise DataError(f"{source} holds no {split} rows")
    return Rows(source, rows, [(source, number) for number in range(1, len(rows) + 1)])
