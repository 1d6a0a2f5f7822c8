"""What is in a store: list, show, log, compare, count."""

from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, jsonable, size, table
from modicum.cli._store import _filters as by
from modicum.cli._store import _shown
from modicum.cli._store._shared import Reference, StoreOption, opened, plain


def ls(
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
    limit: Annotated[int | None, typer.Option(min=1, help="List no more than this many.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List versions by name and number; all conditions have to hold."""
    wanted = by.chosen(names, alias, tag, method, base, since, before, metric, newest)
    with opened(store) as found:
        emit({"versions": found.ls(wanted, limit=limit)}, as_json, _shown.versions)


def show(version: Reference, store: StoreOption, as_json: JsonFlag = False) -> None:
    """Show everything known about a version, and whether the basis that it needs is in the store."""
    from modicum.store import basis_state
    from modicum.store.record import peek

    with opened(store) as found:
        one = found.show(version)
        header = peek(found.get_bytes(str(one)))
        about = {
            **jsonable(one),
            "values": header.values,
            "tensors": header.tensors,
            "recipe_digest": header.description.get("recipe_digest"),
            "config": header.description.get("config", {}),
            "metadata": header.description.get("metadata", {}),
            "basis": basis_state(found, str(one)),
        }
        emit(about, as_json, lambda _: _shown.version(one, about))


def log(
    store: StoreOption,
    name: Annotated[str | None, typer.Argument(help="Only what was done to this name.")] = None,
    after: Annotated[
        int | None, typer.Option(min=0, help="Begin behind this entry; the newest without.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show no more than this many entries.")] = 50,
    as_json: JsonFlag = False,
) -> None:
    """Show who did what: the newest entries of the log, and its head, which `verify --head` can check later."""
    with opened(store) as opened_store, opened_store.snapshot() as found:
        head = found.head()
        if after is not None:
            entries = found.log(name, after=after, limit=limit)
        elif name is None:
            entries = found.log(after=max(0, head.entries - limit), limit=limit)
        else:
            entries = found.log(name, limit=head.entries)[-limit:]
    result = {"entries": entries, "head": f"{head.entries}:{head.hash}"}
    emit(result, as_json, _shown.log)


def diff(
    a: Reference,
    b: Annotated[str, typer.Argument(metavar="VERSION", help="The version to compare with.")],
    store: StoreOption,
    as_json: JsonFlag = False,
) -> None:
    """Compare two versions: what is said about them, configuration, metrics, and distance of numbers per layer.

    Distances are those of the stored numbers: |a - b|, the same relative to |a|, and the cosine of the angle.
    """
    from modicum.store import diff as compared

    with opened(store) as found:
        emit(compared(found, a, b), as_json, _shown.difference)


def stats(
    store: StoreOption,
    top: Annotated[int, typer.Option(min=0, help="How many names with the most bytes are listed.")] = 10,
    as_json: JsonFlag = False,
) -> None:
    """Count what a store holds: versions, bytes by part, kinds, and the names with the most bytes."""
    with opened(store) as found:
        emit(found.stats(largest=top), as_json, _stats)


def _stats(found: Any) -> list[Any]:
    counts = [
        [name, f"{getattr(found, name):,}"] for name in ("names", "versions", "objects", "aliases", "entries")
    ]
    sizes = [["records", size(found.record_bytes)], ["records kept once", size(found.kept_bytes)]]
    sizes += [[f"on the disk: {part}", size(count)] for part, count in found.disk.items()]
    kinds = [
        [m, dtype, base or "", f"{count:,}", size(total)] for m, dtype, base, count, total in found.kinds
    ]
    names = [[plain(name), f"{count:,}", size(total)] for name, count, total in found.largest]
    return [
        table("store", ["", "what"], counts + sizes),
        table("kinds", ["method", "type", "base model", "versions", "bytes"], kinds),
        table("largest", ["name", "versions", "bytes"], names),
    ]
