"""Protocols: how items become prompts, answers and scores. One file each, imported when it is asked for."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import ValidationError

from modicum.errors import ConfigError, DataError, did_you_mean
from modicum.evaluate.records import digest_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from modicum.data.files import Rows
    from modicum.data.options import Section
    from modicum.evaluate.intervals import Measure
    from modicum.evaluate.records import Item, Records
    from modicum.evaluate.suites import Suite

#: the module of every protocol; each holds a class `Task` and the `VERSION` of what it does
PROTOCOLS: dict[str, str] = {
    "llm-adapters": "llm_adapters",
    "lm-eval": "harness",
    "classifier": "classifier",
    "perplexity": "perplexity",
}


@dataclass
class Subject:
    """What is evaluated: a model on its device with its tokenizer, and how records name it.

    `routes`: the names of its adapters where several share batches; empty where there is one at most. Rows belong
    to adapters by their place among these.
    """

    model: Any
    tokenizer: Any
    name: str
    base_fingerprint: str
    routes: tuple[str, ...] = ()

    def names(self, owners: Iterable[int]) -> list[str]:
        """The names of the adapters of rows, none where there is one at most; what `mixing.routed` takes."""
        return [self.routes[owner] for owner in owners] if self.routes else []


class EvaluationTask(ABC):
    """One task of a suite, its rows read and checked, ready to run on any number of subjects.

    `ids`: the ids of all items; `template`: digest of what the model is shown around them; `rows`: digest of what they
    hold, whatever the limit, empty where the template says it; `decoding`: how it answers; `notes`: what is odd about
    the data without forbidding a run.
    """

    #: the options that a suite may set for a task
    Options: ClassVar[type[Section]]
    #: the kind of model: causal_lm, seq_cls or regression
    kind: str = "causal_lm"
    #: classes of the head, None where there is none or it does not matter
    num_labels: int | None = None

    def __init__(self, name: str, options: Section) -> None:
        self.name, self.options = name, options
        self.ids: list[str] = []
        self.template = self.rows = ""
        self.decoding: dict[str, Any] = {}
        self.notes: list[str] = []

    @classmethod
    @abstractmethod
    def prepare(
        cls, name: str, options: Section, data_dir: Path, folder: Path | None, limit: int | None
    ) -> EvaluationTask:
        """The task `name` on the first `limit` rows of its data below `data_dir`.

        `folder` is that of the suite's file, where functions are looked for.

        Raises:
            ConfigError, DataError: options, template or rows are wrong; all rows are checked, whatever the limit.
        """

    @abstractmethod
    def run(
        self, subject: Subject, done: Sequence[Records], batch_size: int
    ) -> Iterator[list[tuple[int, Item]]]:
        """The items that are not yet in `done`, as they are finished, a batch at a time.

        `done` has records for each adapter of `subject`; every item comes with the place of its adapter there.
        """

    @abstractmethod
    def metrics(self, records: Records, details: Mapping[str, Any]) -> dict[str, Measure]:
        """The metrics of complete or partial records and what `details` said of them, the main one first."""

    def remarks(self, records: Records) -> list[str]:
        """What is odd about the metrics of these records: which of them are undefined, and what stands for them."""
        del records  # most metrics are always defined
        return []

    def bind(self, subject: Subject) -> None:  # noqa: B027, most tasks have no use for it
        """Settle in place what depends on the subject: the items of a text depend on its tokenizer."""

    def details(self, place: int) -> dict[str, Any]:
        """What the last run has to say of the adapter at `place` beyond its items, in plain JSON types.

        Kept beside the records, which may be evaluated again without a run.
        """
        del place  # most tasks have nothing to say
        return {}

    def missing(self, done: Sequence[Records]) -> list[tuple[int, int]]:
        """(adapter, item) by their places, of all that is not yet in `done`."""
        return [
            (place, index)
            for place, records in enumerate(done)
            for index, name in enumerate(self.ids)
            if name not in records
        ]


@dataclass
class Checked:
    """The tasks of a suite that can be run, and what is wrong with the others."""

    tasks: list[EvaluationTask] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def version_of(protocol: str) -> str:
    """The version of what `protocol` does: it changes whenever results do.

    Raises:
        ConfigError: no such protocol. MissingExtraError: its library is not installed.
    """
    return _module(protocol).VERSION


def check(suite: Suite, data_dir: Path, limit: int | None = None) -> Checked:
    """The tasks of `suite` with their rows read and checked, and the faults of those that cannot be run.

    Raises:
        ConfigError: no such protocol. MissingExtraError: its library is not installed.
    """
    kind = cast("type[EvaluationTask]", _module(suite.protocol).Task)
    found = Checked()
    for name, raw in suite.tasks.items():
        try:
            options = _options(kind.Options, raw)
            found.tasks.append(kind.prepare(name, options, data_dir, suite.folder, limit))
        except (ConfigError, DataError) as error:
            found.faults.append(f"{name}: {error}")
    return found


def item_ids(rows: Rows) -> list[str]:
    """The `id` of every row, or file name and line where no row has one.

    Raises:
        DataError: some rows lack an id, or ids occur twice; all of them.
    """
    from modicum.data.checks import Faults

    if not any("id" in row for row in rows.rows):
        return [rows.where(index) for index in range(len(rows))]
    faults, seen = Faults(rows), {}
    for index, row in enumerate(rows.rows):
        name = row.get("id")
        if name in (None, ""):
            faults.add(index, "no id, though other rows have one")
        elif str(name) in seen:
            faults.add(index, f"the id {name!r} is that of {rows.where(seen[str(name)])}")
        seen.setdefault(str(name), index)
    faults.finish()
    return [str(row["id"]) for row in rows.rows]


def held(rows: Rows, ids: Sequence[str], columns: Iterable[str]) -> str:
    """A digest (32 hexadecimal digits) of what `rows` hold in `columns`, whatever the order of the rows."""
    names = sorted(set(columns))
    return digest_of(
        json.dumps([name, *(row.get(column) for column in names)], default=str)
        for name, row in zip(ids, rows.rows, strict=True)
    )


def fingerprint(*parts: Any) -> str:
    """A digest (32 hexadecimal digits) of the text of `parts`."""
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:32]


def _module(protocol: str) -> Any:
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"no protocol {protocol!r}{did_you_mean(protocol, PROTOCOLS)}; known: {', '.join(PROTOCOLS)}"
        )
    return import_module(f"modicum.evaluate.{PROTOCOLS[protocol]}")


def _options(kind: type[Section], raw: Mapping[str, Any]) -> Section:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            name = ".".join(map(str, fault["loc"])) or "options"
            hint = did_you_mean(name, kind.model_fields) if fault["type"] == "extra_forbidden" else ""
            faults.append(f"{name}{hint}: {fault['msg']}")
        raise ConfigError("; ".join(faults)) from error
