"""Evaluating a fleet."""

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from modicum.cli._common import JsonFlag, emit, progress, table
from modicum.cli._fleet._shared import FileArgument, SetOption, loaded


def eval_(
    file: FileArgument,
    part: Annotated[
        Literal["test", "held_out", "all"],
        typer.Option(help="Which rows: test or held_out as in training, or all of users.source."),
    ] = "test",
    alias: Annotated[str, typer.Option(help="Which version of each adapter.")] = "latest",
    changes: SetOption = None,
    output: Annotated[Path | None, typer.Option(help="Write one row per user to this Parquet file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure every user's adapter in the store against the base model, on that user's rows, many users in a batch."""
    from modicum.fleet.evaluate import evaluate_fleet
    from modicum.train.artifacts import write_table

    spec = loaded(file, changes)
    with progress("users") as advance, tempfile.TemporaryDirectory() as folder:
        found = evaluate_fleet(spec, Path(folder), part=part, alias=alias, advance=advance)
    users = found.pop("table")
    if output is not None:
        write_table(output, users)
    emit(found, as_json, _table)


def _table(found: dict[str, Any]) -> list[Any]:
    rows = [[name, f"{m['before']:.4f}", f"{m['after']:.4f}"] for name, m in found["metrics"].items()]
    kept = found["gains"]["kept"]
    levels = [f"{100 * float(level):g} %: {value:.4f}" for level, value in kept["quantiles"].items()]
    return [
        table(f"{found['users']:,} users, {found['part']} rows, means", ["metric", "base", "adapters"], rows),
        f"gain in {found['metric']}: mean {kept['mean']:.4f}; {', '.join(levels)}; better for {kept['better']:.1%}",
        f"{found['without_adapter']} users have no adapter, {len(found['faults'])} no rows that can be used",
    ]
