"""Records of an evaluation: what became of every item, and under which conditions, in one Parquet file per task."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from modicum.errors import DataError, listing
from modicum.store.atomic import flush

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

SUFFIX = ".parquet"
#: the key of the file's schema metadata under which the header stands
_KEY = b"modicum"
#: name and Arrow type of every column, in the order of the file
_COLUMNS: dict[str, str] = {
    "task": "string",
    "item": "string",
    "correct": "double",
    "loss": "double",
    "tokens": "int64",
    "prediction": "string",
    "reference": "string",
    "matched": "bool",
    "slices": "string",
}


@dataclass(frozen=True)
class Item:
    """What became of one item.

    `item`: its stable id; `correct`: 1 or 0, or a share; `loss`: summed nats of the scored tokens, `tokens` their
    number; None where the protocol has no such thing. `matched`: whether an answer was found in the prediction.
    `slices`: name and value of the groups that the item belongs to, e.g. `{"subject": "anatomy"}`.
    """

    item: str
    correct: float | None = None
    loss: float | None = None
    tokens: int | None = None
    prediction: str = ""
    reference: str = ""
    matched: bool = True
    slices: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Header:
    """Under which conditions a task was evaluated.

    `template`: digest of the prompt template, and of the examples before a question; `base_fingerprint`: digest of the
    base weights, `items`: digest over the ids of all items of the task, recorded or not yet (`digest_of`); `decoding`:
    how answers were generated or scored, e.g. `{"num_beams": 4, "max_new_tokens": 32}`; `created_with`: name and
    version of the program; `rows`: digest of what the rows hold, empty where the template says it and in older records.
    """

    protocol: str
    protocol_version: str
    suite: str
    task: str
    template: str
    model: str
    adapter: str | None
    base_fingerprint: str
    items: str
    decoding: dict[str, Any] = field(default_factory=dict)
    created_with: str = ""
    rows: str = ""


#: the fields that older records lack, which says nothing about them
_LATER = {"rows"}
#: what two records that are compared, or two halves of one, must share
_COMPARABLE = ("protocol", "protocol_version", "task", "template", "rows", "decoding")
_RESUMABLE = (*_COMPARABLE, "model", "adapter", "base_fingerprint")


@dataclass
class Records:
    """The recorded items of one task, in the order in which they were recorded, and their header."""

    header: Header
    items: list[Item] = field(default_factory=list)

    def __post_init__(self) -> None:
        given, self.items = self.items, []
        self._ids: set[str] = set()
        self.append(given)

    def __len__(self) -> int:
        return len(self.items)

    def __contains__(self, item: str) -> bool:
        return item in self._ids

    @property
    def complete(self) -> bool:
        """Whether every item of the task is recorded."""
        return digest_of(self._ids) == self.header.items

    def append(self, items: Iterable[Item]) -> None:
        """Add `items` in place.

        Raises:
            DataError: items that are recorded already, or twice among these; none is added then.
        """
        new = list(items)
        seen = set(self._ids)
        twice = [one.item for one in new if one.item in seen or seen.add(one.item)]
        if twice:
            raise DataError(f"{self.header.task}: items recorded twice: {listing(twice)}")
        self.items += new
        self._ids = seen

    def column(self, name: str) -> NDArray[Any]:
        """The values of one column, (items,): numbers as float64 with nan for None, else objects."""
        values = [self.header.task if name == "task" else getattr(one, name) for one in self.items]
        if _COLUMNS.get(name) in {"double", "int64", "bool"}:
            return np.array([np.nan if value is None else value for value in values], np.float64)
        result = np.empty(len(values), object)
        result[:] = values
        return result

    def slice_of(self, name: str) -> list[str | None]:
        """The value of the slice `name` of every item, None where an item has no such slice."""
        return [one.slices.get(name) for one in self.items]

    def resumed(self, header: Header, ids: Iterable[str]) -> Self:
        """These records, to be continued under `header` with the items `ids`.

        Raises:
            DataError: they were made under other conditions, or hold items that are not among `ids`.
        """
        faults = _differences(self.header, header, _RESUMABLE)
        foreign = sorted(self._ids - set(ids))
        if foreign:
            faults.append(f"items that the task does not have (or no longer): {listing(foreign)}")
        if faults:
            raise DataError(
                f"{header.task}: the records cannot be continued: {'; '.join(faults)}. Write to another folder, or "
                "start anew without resuming"
            )
        return type(self)(header, list(self.items))

    def write(self, path: Path) -> None:
        """Write all items to the Parquet file `path`, which is there as a whole or not at all."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema().with_metadata({_KEY: json.dumps(asdict(self.header), sort_keys=True).encode()})
        rows = [
            {"task": self.header.task, **asdict(one), "slices": json.dumps(one.slices, sort_keys=True)}
            for one in self.items
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(pa.Table.from_pylist(rows, schema), aside, compression="zstd")
            flush(aside)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        flush(path.parent)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The records in the Parquet file `path`.

        Raises:
            DataError: no file, a damaged one, or one that holds no records.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not Path(path).is_file():
            raise DataError(f"no records {path}")
        try:
            table = pq.ParquetFile(path).read()
        except pa.ArrowException as error:
            raise DataError(f"{path} is damaged or no Parquet file: {error}") from error
        header = _header(table.schema, path)
        items = []
        for row in table.to_pylist():
            row.pop("task")
            items.append(Item(**{**row, "slices": json.loads(row["slices"])}))
        return cls(header, items)


def digest_of(ids: Iterable[str]) -> str:
    """A digest (32 hexadecimal digits) over ids, whatever their order."""
    return hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:32]


def faults_between(a: Records, b: Records) -> list[str]:
    """What forbids comparing `a` with `b` item by item, one sentence per fault; empty if nothing does."""
    faults = _differences(a.header, b.header, _COMPARABLE)
    only_a, only_b = sorted(a._ids - b._ids), sorted(b._ids - a._ids)  # noqa: SLF001, same class
    if only_a or only_b:
        example = listing([*only_a[:2], *only_b[:2]])
        faults.append(
            f"items differ: {len(only_a)} only in the first, {len(only_b)} only in the second ({example})"
        )
    return faults


def _differences(a: Header, b: Header, names: tuple[str, ...]) -> list[str]:
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in names]
    known = [(name, x, y) for name, x, y in pairs if name not in _LATER or (x and y)]
    return [f"{name} differs: {x!r} and {y!r}" for name, x, y in known if x != y]


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.type_for_alias(kind)) for name, kind in _COLUMNS.items()])


def _header(schema: Any, path: Path) -> Header:
    text = (schema.metadata or {}).get(_KEY)
    if text is None or schema.remove_metadata() != _schema():
        columns = ", ".join(f"{name} ({kind})" for name, kind in _COLUMNS.items())
        raise DataError(
            f"{path} holds no records of an evaluation: those have the columns {columns} and a header under "
            f"{_KEY.decode()!r} in the metadata; it has {', '.join(schema.names)}"
        )
    values = json.loads(text)
    known = {one.name for one in fields(Header)}
    wrong = sorted((set(values) ^ known) - _LATER)
    if wrong:
        raise DataError(
            f"{path} was written by another version ({values.get('created_with')}): header {listing(wrong)}"
        )
    return Header(**values)
