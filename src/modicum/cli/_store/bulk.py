"""Folders full of adapters."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table
from modicum.cli._store._shared import (
    ActorOption,
    CreateFlag,
    DtypeOption,
    StoreOption,
    TagOption,
    counted,
    opened,
    plain,
)

if TYPE_CHECKING:
    from modicum.store.bulk import Bulk


def put_many(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders that are looked through, with all below them.")
    ],
    store: StoreOption,
    template: Annotated[
        str,
        typer.Option(
            help="How names are made: {path} below the folder, {parent} that without its last part {name}, {slug} "
            "the path with - for what names may not have."
        ),
    ] = "{path}",
    strict: Annotated[bool, typer.Option("--strict", help="Store nothing if anything is faulty.")] = False,
    tag: TagOption = None,
    dtype: DtypeOption = "auto",
    create: CreateFlag = False,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Store every record, PEFT folder and run below FOLDERS; what is faulty is listed and makes the exit code 1.

    What the newest version of a name already holds is not stored again, so that an interrupted import goes on.
    """
    from modicum.store import put_folders

    with opened(store, actor, create=create) as kept, counted("adapters") as tell:
        result = put_folders(
            kept, folders, template=template, dtype=dtype, tags=tag or (), strict=strict,
            progress=lambda _, total: tell(1, total),
        )  # fmt: skip
    emit(result, as_json, _bulk)
    if result.faults:
        raise typer.Exit(1)


def _bulk(result: "Bulk") -> list[Any]:
    said = f"{len(result.stored):,} stored, {len(result.known):,} known, {len(result.faults):,} faulty."
    faults = [[plain(fault.path), plain(fault.error)] for fault in result.faults]
    return [*([table("faulty", ["where", "what"], faults)] if faults else []), said]
