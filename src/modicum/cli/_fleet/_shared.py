"""What the commands of `modicum fleet` share."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import table

if TYPE_CHECKING:
    from modicum.fleet.spec import FleetSpec

FileArgument = Annotated[Path, typer.Argument(help="The YAML of the fleet.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A value in place of the file's, e.g. train.epochs=1; may be given several times."
    ),
]


def loaded(file: Path, changes: Sequence[str] | None, output: Path | None = None) -> "FleetSpec":
    """The specification in `file` with changes."""
    from modicum.fleet.spec import load_fleet

    more = [] if output is None else [f"output={str(output)!r}"]
    return load_fleet(file, [*(changes or ()), *more])


def shown(report: dict[str, Any]) -> list[Any]:
    """The tables of a report for a terminal, the longest of them cut."""
    from modicum.fleet.report import tables

    return [table(title, columns, rows[:12]) for title, columns, rows in tables(report)]
