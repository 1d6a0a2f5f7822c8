"""What is said about versions: tags, notes, metrics."""

from typing import Annotated

import typer

from modicum.cli._common import JsonFlag, emit
from modicum.cli._store._shared import ActorOption, Reference, StoreOption, done, metrics, opened
from modicum.errors import ConfigError


def tag(
    version: Reference,
    tags: Annotated[list[str], typer.Argument(help="Tags to give it.")],
    store: StoreOption,
    remove: Annotated[bool, typer.Option("--remove", help="Take them away instead.")] = False,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Give a version tags, or take them away."""
    with opened(store, actor) as found:
        one = str(found.show(version))
        (found.untag if remove else found.tag)(one, *tags)
        now = found.show(one)
    emit(now, as_json, done("tag", version=now, tags=", ".join(now.tags) or "none"))


def note(
    version: Reference,
    store: StoreOption,
    text: Annotated[str | None, typer.Argument(help="The note.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the note away.")] = False,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a note at a version in place of the one it has; earlier ones stay in the log."""
    if (text is None) != remove:
        raise ConfigError("give the text of the note, or --remove to take it away")
    with opened(store, actor) as found:
        one = str(found.show(version))
        found.note(one, text)
        now = found.show(one)
    emit(now, as_json, done("note", version=now, note=now.note or "none"))


def measure(
    version: Reference,
    pairs: Annotated[list[str], typer.Argument(metavar="NAME=VALUE…", help="Measured numbers.")],
    store: StoreOption,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Give a version metrics; others that it has stay."""
    values = metrics(pairs)
    with opened(store, actor) as found:
        one = str(found.show(version))
        found.measure(one, values)
        now = found.show(one)
    shown = {f"metric_{name}": value for name, value in now.metrics.items()}
    emit(now, as_json, done("measure", version=now, **shown))
