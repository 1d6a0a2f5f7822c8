"""Finished comparisons as one, where they were made in the same way; refused with every difference where not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.compare.conditions import agreement, differences, flat
from modicum.compare.result import COMPARISON, FORMAT, RUNS, conclude
from modicum.errors import ConfigError, listing
from modicum.train import artifacts

if TYPE_CHECKING:
    from collections.abc import Sequence

#: conditions that may differ without changing what a metric means, but times or the last digits
_MAY_DIFFER = ("model", "processor", "cores", "threads", "workers", "device", "versions", "data.sources")


def join(folders: Sequence[str | Path], output: str | Path, *, overwrite: bool = False) -> dict[str, Any]:
    """The comparison with the cells of all finished comparisons in `folders`, written to `output` and judged anew.

    Raises:
        ConfigError: a folder holds none or an unfinished one; they differ in model, data, templates, metric, split,
            budget, seeds or in what a compression of the same name is; a cell is in several of them. Every fault.
    """
    target = Path(output).expanduser()
    found, faults = _read(folders)
    if len({Path(folder).resolve() for folder in folders}) < max(2, len(folders)):
        faults.append("joining takes at least two comparisons, each once")
    if target.resolve() in {Path(folder).resolve() for folder in folders}:
        faults.append(f"the output {target} is one of the comparisons: set another one")
    elif (target / COMPARISON).is_file() and not overwrite:
        faults.append(f"{target} holds a comparison: --overwrite to replace it, or set another output")
    names = list(found)
    first = found[names[0]] if names else {}
    for name in names[1:]:
        faults += [f"{names[0]} and {name} differ in {one}" for one in _differences(first, found[name])]
    faults += _twice(found)
    if faults:
        raise ConfigError("these comparisons cannot be joined:\n" + "\n".join(faults))
    joined = _joined(found, target.name)
    target.mkdir(parents=True, exist_ok=True)
    rows = [{"source": name, **row} for name in names for row in _rows(Path(name))]
    artifacts.write_table(target / RUNS, rows)
    artifacts.write_json(target / COMPARISON, joined)
    return artifacts.read_json(target / COMPARISON) or joined


def _read(folders: Sequence[str | Path]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    found, faults = {}, []
    for folder in map(Path, folders):
        values = artifacts.read_json(folder / COMPARISON)
        if values is None or values.get("kind") != "comparison":
            inside = sorted(str(file.parent) for file in folder.glob(f"*/{COMPARISON}"))
            hint = f"; there are some inside: {listing(inside)}" if inside else ""
            faults.append(f"{folder} holds no comparison{hint}")
        elif values["format"] != FORMAT:
            faults.append(f"{folder} has format {values['format']}, this version of modicum reads {FORMAT}")
        else:
            missing = [
                f"{cell['compression']}/{cell['label']}"
                for cell in values["cells"]
                if cell["state"] == "missing"
            ]
            if missing:
                faults.append(f"{folder} is not finished, --resume it first: {listing(missing)} are missing")
            found[str(folder)] = values
    return found, faults


def _differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    said = differences(agreement(first), agreement(second))
    mine, its = first["compressions"], second["compressions"]
    for name in mine.keys() & its.keys():
        said += [f"the compression {name}: {one}" for one in differences(flat(mine[name]), flat(its[name]))]
    return said


def _twice(found: dict[str, dict[str, Any]]) -> list[str]:
    where: dict[tuple[str, str], list[str]] = {}
    for name, values in found.items():
        for cell in values["cells"]:
            where.setdefault((cell["compression"], cell["label"]), []).append(name)
    return [
        f"the cell {compression}/{label} is in {' and in '.join(names)}"
        for (compression, label), names in where.items()
        if len(names) > 1
    ]


def _joined(found: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    parts = list(found.values())
    digest = hashlib.blake2b(" ".join(sorted(part["digest"] for part in parts)).encode(), digest_size=8)
    together = {
        key: {at: value for part in reversed(parts) for at, value in part[key].items()}
        for key in ("compressions", "untrained")
    }
    shared = {at: value for part in reversed(parts) for at, value in part["base"]["shared_bytes"].items()}
    head = {
        **parts[0],
        "name": name,
        "digest": digest.hexdigest(),
        **together,
        "base": {"shared_bytes": shared},
        "conditions": _conditions(parts),
        "sources": list(found),
    }
    return conclude(head, [cell for part in parts for cell in part["cells"]])


def _conditions(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The conditions of the first comparison, with a note on each that others do not share."""
    views = [flat(part["conditions"]) for part in parts]
    notes = list(
        dict.fromkeys(
            difference
            for view in views[1:]
            for difference in differences(views[0], view)
            if difference.startswith(_MAY_DIFFER)
        )
    )
    return {**parts[0]["conditions"], **({"differs between the joined": notes} if notes else {})}


def _rows(folder: Path) -> list[dict[str, Any]]:
    if not (folder / RUNS).is_file():
        return []
    from pyarrow import parquet

    return parquet.read_table(folder / RUNS).to_pylist()
