"""Whether a store is whole, its space, and copies of it."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import Advance, JsonFlag, emit, progress, size, table
from modicum.cli._store._shared import ActorOption, StoreOption, done, opened, plain, rows
from modicum.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from modicum.store.catalogue.audit import Head


def verify(
    store: StoreOption,
    records: Annotated[
        bool, typer.Option("--records/--no-records", help="Read all records too, not only index and log.")
    ] = True,
    head: Annotated[
        str | None, typer.Option(help="A head of the log that was noted elsewhere, as `log` shows it.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check index, log, catalogue and every record; exits with 1 if anything is wrong.

    Bases that versions need and the store lacks are listed, with the command that makes them; they are no fault.
    """
    from modicum.store import missing_bases

    with opened(store) as found:
        total = None
        with contextlib.suppress(StoreError):  # what is wrong is said below
            total = found.stats(largest=0).kept_bytes
        with progress("checked bytes", total if records else None) as advance:
            checked = found.verify(records=records, expected=_head(head), progress=_steps(advance))
        bases = missing_bases(found) if checked.ok else []
    emit({**vars(checked), "ok": checked.ok, "missing_bases": bases}, as_json, _verified)
    if not checked.ok:
        raise typer.Exit(1)


def gc(
    store: StoreOption,
    dead: Annotated[
        float, typer.Option(min=0, help="Rewrite segments of which more than this share is nobody's.")
    ] = 0.3,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Give back the space of what was removed, and finish what was interrupted; others go on meanwhile."""
    with opened(store, actor) as found:
        result = found.gc(dead)
    shown = done("gc", segments=result.segments, freed=size(result.bytes), moved=size(result.moved),
                 damaged="; ".join(result.faults))  # fmt: skip
    emit(result, as_json, shown)
    if result.faults:
        raise typer.Exit(1)


def backup(
    target: Annotated[Path, typer.Argument(help="The new folder to write.")],
    store: StoreOption,
    as_json: JsonFlag = False,
) -> None:
    """Write a copy of the whole store as of one moment, log included; a store itself. Others go on meanwhile."""
    with opened(store) as found:
        written = found.backup(target)
    emit({"output": target, "bytes": written}, as_json, done("backup", written=target, size=size(written)))


def _steps(advance: Advance) -> Any:
    """A function that is told a sum and passes on how much it has grown."""
    last = 0

    def tell(done_so_far: int) -> None:
        nonlocal last
        advance(done_so_far - last)
        last = done_so_far

    return tell


def _head(text: str | None) -> "Head | None":
    from modicum.store.catalogue.audit import Head

    if text is None:
        return None
    entries, colon, hashed = text.partition(":")
    if not colon or not entries.isdigit() or len(hashed) != 64:
        raise ConfigError(f"--head {text!r} must be what `modicum store log` shows: ENTRIES:HASH")
    return Head(int(entries), hashed)


def _verified(result: dict[str, Any]) -> list[Any]:
    counts = [(name, f"{result[name]:,}") for name in ("entries", "versions", "bytes")]
    missing = [[one.example, f"{one.versions:,}", plain(one.command)] for one in result["missing_bases"]]
    columns = ["needed by", "versions", "made by"]
    return [
        rows("verify", counts),
        *(f"WRONG: {plain(fault)}" for fault in result["faults"]),
        *([table("bases that are not in this store", columns, missing)] if missing else []),
        "Nothing is wrong." if result["ok"] else f"{len(result['faults'])} things are wrong.",
    ]
