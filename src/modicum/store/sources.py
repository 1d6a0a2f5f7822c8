"""What can be put into a store: compact records, PEFT folders and folders of runs, read without any model.

A run says more than its adapter: metrics, seed, the digest of its recipe and one of its data become the version's.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modicum.errors import ConfigError, CorruptAdapterError, did_you_mean
from modicum.store.record import MAGIC, SUFFIX, Record, decode

if TYPE_CHECKING:
    import os

Kind = Literal["record", "folder", "run"]
_CONFIG = "adapter_config.json"
_REPORT, _PIPELINE, _SWEEP = "report.json", "pipeline.json", "summary.json"
_ADAPTER, _TUNED, _CHOSEN = "adapter", "tune", "chosen"
#: splits whose metrics are a version's; what was measured before training is not
_SPLITS = ("validation", "test")


@dataclass(frozen=True)
class Found:
    """An adapter that was found on the disk, and what is known about it."""

    path: Path
    kind: Kind
    #: bytes of a record are kept as they are, so that its digest stays
    record: Record | bytes
    metrics: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    data_digest: str | None = None


def kind_of(path: Path) -> Kind | None:
    """What `path` is by the look of it; None for nothing that can be put."""
    if path.is_file():
        return "record" if path.suffix == SUFFIX else None
    if (path / _CONFIG).is_file():
        return "folder"
    if (path / _PIPELINE).is_file() and (path / _TUNED / _REPORT).is_file():
        return "run"
    return "run" if (path / _REPORT).is_file() and (path / _ADAPTER / _CONFIG).is_file() else None


def read_source(path: str | os.PathLike, *, dtype: str = "auto") -> Found:
    """The adapter at `path`: a `.modicum` file, a PEFT folder of any method, or the folder of a run.

    Numbers of folders are stored as `dtype`; with `auto` in the type they have there.

    Raises:
        ConfigError: nothing there that can be put, or not as `dtype`.
        CorruptAdapterError: it is damaged.
    """
    source = Path(path)
    kind = kind_of(source)
    if source.is_file() and (kind == "record" or _is_record(source)):
        data = source.read_bytes()
        decode(data)
        return Found(source, "record", data)
    if kind is None:
        raise ConfigError(f"nothing to put at {source}: {_looked_for(source)}")
    from modicum.store.folders import record_of_folder

    if kind == "folder":
        return Found(source, "folder", record_of_folder(source, dtype))
    return _run(source, dtype)


def _run(folder: Path, dtype: str) -> Found:
    """The adapter of a run or of a pipeline, with what its reports say."""
    from modicum.store.folders import record_of_folder

    pipeline = folder / _PIPELINE
    run = folder / _TUNED if pipeline.is_file() else folder
    chosen = folder / _CHOSEN
    report = _report(run / _REPORT)
    metrics = _metrics(report.get("metrics"))
    if pipeline.is_file():
        measured = (_report(pipeline).get("measure") or {}).get("adapted") or {}
        found = {name: one.get("value") for name, one in measured.items() if isinstance(one, dict)}
        # what training measured is not what a chosen sub-network does
        metrics = ({} if chosen.is_dir() else metrics) | _metrics({"test": found})
    record = record_of_folder(chosen if chosen.is_dir() else run / _ADAPTER, dtype)
    seed = report.get("seed")
    return Found(
        folder,
        "run",
        replace(record, recipe_digest=report.get("recipe_digest")),
        metrics,
        seed if isinstance(seed, int) else None,
        _data_digest(report),
    )


def _report(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptAdapterError(f"{file} cannot be read ({error}); run the recipe again") from error
    if not isinstance(values, dict):
        raise CorruptAdapterError(f"{file} is no report; run the recipe again")
    return values


def _metrics(splits: Any) -> dict[str, float]:
    return {
        f"{split}.{name}": float(value)
        for split in _SPLITS
        for name, value in ((splits or {}).get(split) or {}).items()
        if name != "n" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _data_digest(report: dict[str, Any]) -> str | None:
    """A digest of what the data were: their options, their counts, and the contents of files that are still there."""
    options = (report.get("recipe") or {}).get("data")
    if not isinstance(options, dict):
        return None
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([options, report.get("data")], sort_keys=True).encode())
    for split in ("train", *_SPLITS):
        file = options.get(split)
        if isinstance(file, str) and Path(file).is_file():
            with Path(file).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()


def _is_record(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _looked_for(path: Path) -> str:
    if not path.exists():
        there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        return f"there is no such file or folder{did_you_mean(path.name, there)}"
    if path.is_file():
        return (
            f"it is no record ({SUFFIX}); bases are put with `modicum store put-basis`, and what `modicum store "
            "export` wrote with `modicum store import`"
        )
    if (path / _SWEEP).is_file():
        return "it holds a sweep; name the folder of one of its runs, or put all of them with `put-many`"
    if (path / "config.json").is_file():
        return "it holds a model; name the folder of an adapter"
    return f"a folder needs {_CONFIG} (PEFT), or {_REPORT} and {_ADAPTER}/ (a run); `put-many` looks through folders"
