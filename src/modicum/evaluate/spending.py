"""What lies in folders of results took and stores: runs, sweeps, comparisons, evaluations and their base models."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import DataError, listing
from modicum.evaluate.resources import Prices, cost, together, total, total_cost

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

#: what a base model that was only read took
_NOTHING = {"cpu_seconds": 0.0, "gpu_seconds": None, "energy_joules": 0.0}


@dataclass(frozen=True)
class Entry:
    """One thing that took resources or stores bytes; `resources` as of `Resources.as_dict`, None where not measured.

    `kind`: run, unfinished run, sweep, evaluation or base. `stored_bytes`: of the adapters (or models) of a run or a
    sweep, of the files of an evaluation or a base.
    """

    folder: str
    kind: str
    resources: dict[str, Any] | None
    stored_bytes: int | None


def spending(folders: Sequence[Path], prices: Prices | None = None, months: float = 1.0) -> dict[str, Any]:
    """What is found below `folders`, entry by entry and in total, with its `cost` where there are `prices`.

    A sweep stands for its runs, and a base model, where it is a folder, counts once however many runs share it.
    Peaks of the total are the highest. `months`: how long all of it is stored.

    Raises:
        DataError: folders in which there is nothing of the kind.
    """
    found: dict[Path, Entry] = {}
    bases: dict[Path, Entry] = {}
    empty = []
    for folder in folders:
        seen = dict(_entries(folder, bases, in_sweep=False))
        found |= seen
        if not seen:
            empty.append(str(folder))
    if empty:
        raise DataError(
            f"no run, sweep, comparison or evaluation in {listing(empty)}: they are known by their report.json, "
            "summary.json or resources.json"
        )
    entries = [*found.values(), *bases.values()]
    costs = [_cost(entry, prices, months) for entry in entries]
    measured = [entry.resources for entry in entries if entry.resources is not None]
    return {
        "entries": [{**asdict(entry), "cost": price} for entry, price in zip(entries, costs, strict=True)],
        "total": {
            "resources": total(measured) if measured else None,
            "stored_bytes": sum(entry.stored_bytes or 0 for entry in entries),
            "cost": total_cost([price for price in costs if price is not None]) if prices else None,
        },
        "prices": asdict(prices) if prices else None,
        "months": months,
    }


def _cost(entry: Entry, prices: Prices | None, months: float) -> dict[str, Any] | None:
    if prices is None:
        return None
    used: Mapping[str, Any] | None = _NOTHING if entry.kind == "base" else entry.resources
    return cost(used, entry.stored_bytes, prices, months)


def _entries(folder: Path, bases: dict[Path, Entry], *, in_sweep: bool) -> Iterator[tuple[Path, Entry]]:
    """What is in `folder` and below it, by its resolved path; base models go to `bases`."""
    place = folder.resolve()
    report, summary = _read(folder / "report.json"), _read(folder / "summary.json")
    is_sweep = summary.get("kind") == "sweep"
    if report.get("kind") == "run":
        _add_base(report, bases)
    if is_sweep:
        runs = [run for file in folder.glob("*/*/report.json") if (run := _read(file)).get("kind") == "run"]
        stored = sum(_stored(run) or 0 for run in runs)
        yield place, Entry(str(folder), "sweep", summary.get("resources"), stored)
    elif report.get("kind") == "run" and not in_sweep:
        yield place, Entry(str(folder), "run", report.get("resources"), _stored(report))
    elif not report and not in_sweep:
        attempts = [_read(file).get("total") for file in sorted(folder.glob("checkpoints/resources-*.json"))]
        known = [one for one in attempts if one]
        if known:
            yield place, Entry(str(folder), "unfinished run", together(known), None)
    evaluated = _read(folder / "resources.json").get("total")
    if evaluated:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        yield place, Entry(str(folder), "evaluation", evaluated, size)
    for child in sorted(folder.iterdir() if folder.is_dir() else ()):
        if child.is_dir() and child.name != "checkpoints" and not child.name.startswith("."):
            yield from _entries(child, bases, in_sweep=in_sweep or is_sweep)


def _add_base(report: Mapping[str, Any], bases: dict[Path, Entry]) -> None:
    name = report["recipe"]["model"]["name_or_path"]
    path = Path(name)
    if path.is_dir() and path.resolve() not in bases:
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        bases[path.resolve()] = Entry(name, "base", None, size)


def _stored(report: Mapping[str, Any]) -> int | None:
    return (report.get("stored_bytes") or {}).get("total")


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
