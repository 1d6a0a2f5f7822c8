"""Suites: which tasks are evaluated on which data, and how; a YAML file each, bundled or one's own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from modicum.data.files import Rows, from_hub, read_files
from modicum.errors import ConfigError, DataError, did_you_mean, listing

if TYPE_CHECKING:
    from collections.abc import Sequence

_FIELDS = ("suite", "protocol", "about", "defaults", "tasks")
_HUB = "hub:"
#: endings under which the files of a data folder are looked for
_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".csv", ".tsv", ".parquet", ".txt", ".txt.gz")


@dataclass(frozen=True)
class Suite:
    """The tasks of one suite: the options of each by its name, as its protocol reads them.

    `folder` is where the file lies: functions that it names are looked for there.
    """

    name: str
    protocol: str
    about: str
    tasks: dict[str, dict[str, Any]]
    folder: Path | None

    def only(self, names: Sequence[str]) -> Suite:
        """This suite with the tasks `names` alone; all of them when `names` is empty.

        Raises:
            ConfigError: names of no task, with the nearest.
        """
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            words = ", ".join(f"{name!r}{did_you_mean(name, self.tasks)}" for name in unknown)
            raise ConfigError(f"the suite {self.name} has no task {words}; it has {', '.join(self.tasks)}")
        chosen = {name: options for name, options in self.tasks.items() if not names or name in names}
        return Suite(self.name, self.protocol, self.about, chosen, self.folder)


def bundled() -> dict[str, list[str]]:
    """The bundled suites: name, and the protocols under which each can be run."""
    found: dict[str, list[str]] = {}
    for entry in sorted(file.name for file in _folder().iterdir() if file.name.endswith(".yaml")):
        name, protocol = entry.removesuffix(".yaml").split(".", 1)
        found.setdefault(name, []).append(protocol)
    return found


def load_suite(name_or_file: str, protocol: str | None = None) -> Suite:
    """The suite in a YAML file, or the bundled one of that name; `protocol` chooses where there are several.

    Raises:
        ConfigError: no such suite or file, another protocol than the file's, or what is wrong in it; all at once.
    """
    if name_or_file.endswith((".yaml", ".yml")) or Path(name_or_file).is_file():
        path = Path(name_or_file)
        if not path.is_file():
            raise ConfigError(f"no suite {path}; bundled are {listing(list(bundled()), 10)}")
        suite = _parsed(path.read_text(encoding="utf-8"), str(path), path.parent)
    else:
        suite = _bundled(name_or_file, protocol)
    if protocol not in {None, suite.protocol}:
        raise ConfigError(
            f"the suite {name_or_file} is for the protocol {suite.protocol}, not {protocol}: results under different "
            "protocols are never mixed; leave --protocol out, or write a suite for it"
        )
    return suite


def task_rows(data_dir: Path, data: str) -> Rows:
    """The rows of the file `data` (endings may be left out) below `data_dir`, or at its own absolute path.

    `hub:NAME`, `hub:NAME:CONFIG` or `hub:NAME:CONFIG:SPLIT` is a data set on the hub, its test split if none is named.

    Raises:
        DataError: no such file, with those that are there; unreadable rows.
    """
    if data.startswith(_HUB):
        name, config, split = [*data.removeprefix(_HUB).split(":", 2), "", ""][:3]
        return from_hub(name, split or "test", config or None)
    wanted = data_dir / data
    candidates = [wanted, *(wanted.with_name(wanted.name + ending) for ending in _ENDINGS)]
    for file in candidates:
        if file.is_file():
            return read_files([file])
    if not wanted.parent.is_dir():
        raise DataError(f"no data {wanted}: the folder {wanted.parent} does not exist")
    there = sorted(entry.name for entry in wanted.parent.iterdir())
    names = [name.partition(".")[0] for name in there]
    raise DataError(
        f"no data {wanted} (endings such as .jsonl.gz may be left out){did_you_mean(wanted.name, names)}; "
        f"{wanted.parent} holds {listing(there, 8) or 'nothing'}"
    )


def _bundled(name: str, protocol: str | None) -> Suite:
    known = bundled()
    if name not in known:
        raise ConfigError(
            f"no suite {name!r}{did_you_mean(name, known)}; bundled are {', '.join(known)}, or give a YAML file"
        )
    if protocol is None and len(known[name]) > 1:
        raise ConfigError(
            f"the suite {name} can be run under the protocols {' and '.join(known[name])}, whose results cannot be "
            "compared: choose one with --protocol"
        )
    chosen = protocol or known[name][0]
    if chosen not in known[name]:
        hint = did_you_mean(chosen, known[name])
        raise ConfigError(
            f"the suite {name} cannot be run under {chosen!r}{hint}, only {' and '.join(known[name])}"
        )
    file = f"{name}.{chosen}.yaml"
    return _parsed((_folder() / file).read_text(encoding="utf-8"), file, None)


def _parsed(text: str, where: str, folder: Path | None) -> Suite:
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is no YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must be a mapping with {', '.join(_FIELDS)}, not {type(raw).__name__}")
    faults = [
        f"unknown field {name!r}{did_you_mean(str(name), _FIELDS)}" for name in raw if name not in _FIELDS
    ]
    faults += [
        f"{name} is missing, or no text" for name in ("suite", "protocol") if not _is_text(raw.get(name))
    ]
    defaults, tasks = raw.get("defaults") or {}, raw.get("tasks")
    if not isinstance(defaults, dict):
        faults.append("defaults must be a mapping of options that all tasks share")
    if not isinstance(tasks, dict) or not tasks:
        faults.append("tasks must name at least one task: a mapping of names to options")
    else:
        faults += [
            f"tasks.{name} must be a mapping of options, and its name a file name (letters, digits, _ . -)"
            for name, options in tasks.items()
            if not isinstance(options, dict) or not re.fullmatch(r"\w[\w.-]*", str(name))
        ]
    if faults:
        raise ConfigError(f"{where}: {'; '.join(faults)}")
    assert isinstance(tasks, dict)
    merged = {str(name): {**defaults, **options} for name, options in tasks.items()}
    return Suite(raw["suite"], raw["protocol"], str(raw.get("about", "")), merged, folder)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _folder() -> Any:
    return resources.files("modicum.evaluate") / "suites"
