"""Say what runs and evaluations took: hours, energy, memory, bytes, and money by your prices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, read_prices, size, table


def run(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Folders of results.")],
    prices: Annotated[
        Path | None, typer.Option("--prices", help="A YAML file of prices, by the names of these options.")
    ] = None,
    cpu_hour: Annotated[
        float | None, typer.Option("--cpu-hour", help="Price of an hour of one processor core in use.")
    ] = None,
    gpu_hour: Annotated[float | None, typer.Option("--gpu-hour", help="Price of an hour of one GPU.")] = None,
    gb_month: Annotated[
        float | None, typer.Option("--gb-month", help="Price of 10⁹ bytes stored for a month.")
    ] = None,
    kwh: Annotated[float | None, typer.Option("--kwh", help="Price of a kilowatt hour.")] = None,
    currency: Annotated[str | None, typer.Option("--currency", help="What the prices are in.")] = None,
    months: Annotated[float, typer.Option("--months", min=0, help="How long results are stored.")] = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Say what the runs, sweeps, comparisons and evaluations in FOLDER... took, one by one and in total."""
    from modicum.evaluate.resources import Prices
    from modicum.evaluate.spending import spending

    options = {
        "cpu_hour": cpu_hour, "gpu_hour": gpu_hour, "gb_month": gb_month, "kwh": kwh, "currency": currency,
    }  # fmt: skip
    given = read_prices(prices, options)
    emit(spending(folders, Prices.of(given) if given else None, months), as_json, _table)


def _table(found: dict[str, Any]) -> Any:
    priced = found["prices"] is not None
    columns = ["folder", "kind", "hours", "CPU h", "GPU h", "memory", "GPU memory", "energy", "stored"]
    rows = [_row(entry["folder"], entry["kind"], entry, priced) for entry in found["entries"]]
    rows.append(_row("total", "", found["total"], priced))
    shown: list[Any] = [table("what it took", [*columns, *(["cost"] if priced else [])], rows)]
    missing = {
        f"{name}: {reason}"
        for entry in found["entries"]
        for name, reason in ((entry["cost"] or {}).get("missing") or {}).items()
    }
    if missing:
        shown.append(f"≥: a part with a price was not measured ({'; '.join(sorted(missing))})")
    notes = [(entry["resources"] or {}).get("energy_note") for entry in found["entries"]]
    shown += [f"energy: {note}" for note in dict.fromkeys(notes) if note]
    return shown


def _row(name: str, kind: str, entry: dict[str, Any], priced: bool) -> list[str]:
    used, price = entry["resources"] or {}, entry["cost"]
    joules, stored = used.get("energy_joules"), entry["stored_bytes"]
    memory, on_gpu = used.get("peak_memory_bytes"), used.get("peak_gpu_memory_bytes")
    least = "≥ " if price and price["missing"] else ""
    return [
        name,
        kind,
        *(_hours(used.get(part)) for part in ("seconds", "cpu_seconds", "gpu_seconds")),
        "" if memory is None else size(memory),
        "" if on_gpu is None else size(on_gpu),
        "" if joules is None else f"{joules / 3.6e6:.3g} kWh",
        "" if stored is None else size(stored),
        *([f"{least}{price['amount']:.4g} {price['currency']}" if price else ""] if priced else []),
    ]


def _hours(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 3600:.3g}"
