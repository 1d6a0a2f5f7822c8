"""Showing what became of a fleet."""

from pathlib import Path
from typing import Annotated

import typer

from modicum.cli._common import JsonFlag, emit
from modicum.cli._fleet._shared import shown


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished job.")],
    as_json: JsonFlag = False,
) -> None:
    """Show the report of a finished job: gains, users whom the base model serves better, users at fault."""
    from modicum.errors import ConfigError
    from modicum.fleet.report import REPORT
    from modicum.train.artifacts import read_json

    found = read_json(folder / REPORT)
    if found is None or found.get("kind") != "fleet":
        raise ConfigError(
            f"{folder} holds no finished fleet; `modicum fleet train FILE --resume` goes on with one"
        )
    emit(found, as_json, shown)
