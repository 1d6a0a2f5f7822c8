"""What leaves a store: versions that are removed, and what is erased."""

import sys
from typing import Annotated

import typer

from modicum.cli._common import JsonFlag, emit, size
from modicum.cli._store._shared import ActorOption, Reference, StoreOption, done, opened
from modicum.errors import ConfigError


def remove(
    versions: Annotated[list[str], typer.Argument(help="Versions: NAME@3, or NAME@ALIAS.")],
    store: StoreOption,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Take versions out of the store; `gc` gives their space back, `purge` erases. Numbers are not used again."""
    bare = [version for version in versions if "@" not in version]
    if bare:
        raise ConfigError(f"say which version of {', '.join(bare)}: NAME@3, or NAME@latest for the newest")
    with opened(store, actor) as found:
        named = [found.show(version) for version in versions]
        for one in named:
            found.remove(one.name, one.version)
    gone = [str(one) for one in named]
    emit({"removed": gone}, as_json, done("remove", removed=", ".join(gone)))


def purge(
    version: Reference,
    store: StoreOption,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Erase NAME with all it ever had, or one version: from the disk, the tables and the log, which says so.

    Backups, archives and synchronized places are copies of their own; a place forgets with its next sync.
    """
    name, at, _ = version.partition("@")
    with opened(store, actor) as found:
        one = found.show(version) if at else None
        what = str(one) if one else f"{name} with all its versions"
        if not yes and (as_json or not sys.stdin.isatty()):
            raise ConfigError(f"{what} would be erased for good: pass --yes")
        if not yes:
            typer.confirm(f"Erase {what} for good?", abort=True, err=True)
        purged = found.purge(name, one.version if one else None)
    shown = done(
        "purge",
        erased=what,
        versions=purged.versions,
        overwritten=size(purged.bytes),
        entry=purged.entry,
        known_to_the_log_as=purged.pseudonym[:12],
        stays_as_others_have_it=", ".join(purged.shared),
    )
    emit(purged, as_json, shown)
