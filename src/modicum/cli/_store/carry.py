"""Between stores: a subset as one file, and the whole at any place that fsspec reaches."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, OverwriteFlag, emit, progress, size
from modicum.cli._store import _filters as by
from modicum.cli._store._shared import ActorOption, CreateFlag, StoreOption, counted, done, opened

if TYPE_CHECKING:
    from modicum.store.carried import TakenIn

MoveFlag = Annotated[
    bool,
    typer.Option(
        "--move-aliases", help="Move aliases that point at other versions here; left alone without."
    ),
]


def export(
    output: Annotated[Path, typer.Argument(help="The file to write, e.g. night.modicum-archive.")],
    store: StoreOption,
    names: by.Pattern = None,
    alias: by.Alias = None,
    tag: by.Tag = None,
    method: by.Method = None,
    base: by.Base = None,
    since: by.Since = None,
    before: by.Before = None,
    metric: by.Metric = None,
    newest: by.Newest = False,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the versions that meet all conditions to one file, with labels, metrics, notes and lineage."""
    from modicum.store import export_archive

    wanted = by.chosen(names, alias, tag, method, base, since, before, metric, newest)
    with opened(store) as found, progress("versions") as advance:
        result = export_archive(found, output, wanted, overwrite=overwrite, progress=lambda _: advance())
    emit(result, as_json, done("export", written=result.path, versions=result.versions, records=result.records,
                               size=size(result.bytes)))  # fmt: skip


def import_(
    archive: Annotated[Path, typer.Argument(help="A file of `modicum store export`.")],
    store: StoreOption,
    move_aliases: MoveFlag = False,
    create: CreateFlag = False,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Take in the versions of an archive; nothing is stored unless all of the file is sound.

    Versions keep their numbers where these are free, and are not stored twice. The log says where they come from.
    Folders of adapters are put with `put-many`.
    """
    from modicum.store import import_archive

    with opened(store, actor, create=create) as found, counted("versions") as tell:
        result = import_archive(
            found, archive, move_aliases=move_aliases, progress=lambda _, total: tell(1, total)
        )
    emit(result, as_json, _taken("import", result))


def sync(
    url: Annotated[
        str, typer.Argument(help="A folder, or a URL that fsspec knows: file://, s3://, gs://, …")
    ],
    store: StoreOption,
    pull: Annotated[bool, typer.Option("--pull", help="Take in what is there, instead of sending.")] = False,
    move_aliases: MoveFlag = False,
    create: Annotated[
        bool, typer.Option("--create", help="With --pull: make the store if there is none.")
    ] = False,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Bring a place up to date with the store; only new records travel, what was removed or purged is deleted there.

    An interrupted sync leaves what the one before left. The place keeps contents; `backup` keeps the log too.
    """
    from modicum.store import pull as take
    from modicum.store import push

    with opened(store, actor, create=pull and create) as found, counted("records") as tell:
        if pull:
            got = take(found, url, move_aliases=move_aliases, progress=lambda _, total: tell(1, total))
            emit(got, as_json, _taken("sync", got))
            return
        sent = push(found, url, progress=tell)
    shown = done("sync", place=sent.url, versions=sent.versions, records=sent.records, sent=sent.sent,
                 sent_bytes=size(sent.sent_bytes), deleted_files=sent.deleted)  # fmt: skip
    emit(sent, as_json, shown)


def _taken(title: str, result: "TakenIn") -> Any:
    return done(
        title,
        stored=result.stored,
        known=result.known,
        renumbered=", ".join(f"{there} is {here}" for there, here in result.renumbered.items()),
        aliases_that_stay_where_they_are=", ".join(result.aliases_kept),
        without_their_parent=", ".join(result.without_parent),
    )
