"""Aliases: set, promote, roll back."""

from typing import Annotated

import typer

from modicum.cli._common import JsonFlag, emit
from modicum.cli._store._shared import (
    ActorOption,
    ExpectedOption,
    NameArgument,
    Reference,
    StoreOption,
    done,
    expected,
    opened,
)

_PRODUCTION = "production"


def alias(
    version: Reference,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="The alias, e.g. canary.")],
    store: StoreOption,
    remove: Annotated[bool, typer.Option("--remove", help="Forget the alias and where it has been.")] = False,
    expect: ExpectedOption = None,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Point an alias at a version, or forget it; `rollback` goes back to where it pointed before."""
    if not remove:
        _point(store, version, alias, expect, actor, as_json)
        return
    name = version.partition("@")[0]
    with opened(store, actor) as found:
        found.unalias(name, alias, expected=expected(expect))
    emit({"name": name, "alias": alias, "version": None}, as_json, done("alias", name=name, forgotten=alias))


def promote(
    version: Reference,
    store: StoreOption,
    to: Annotated[str, typer.Option(help="The alias that is moved.")] = _PRODUCTION,
    expect: ExpectedOption = None,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Point an alias, production without --to, at a version, e.g. `promote ada@canary`."""
    _point(store, version, to, expect, actor, as_json)


def rollback(
    name: NameArgument,
    store: StoreOption,
    alias: Annotated[str, typer.Option(help="The alias that goes back.")] = _PRODUCTION,
    expect: ExpectedOption = None,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Point an alias at the version it pointed at before; done twice, it goes back two steps."""
    with opened(store, actor) as found:
        version = found.rollback(name, alias, expected=expected(expect))
    result = {"name": name, "alias": alias, "version": version}
    emit(result, as_json, done("rollback", alias=f"{name}@{alias}", version=f"{name}@{version}"))


def _point(
    store: str, version: str, alias: str, expect: str | None, actor: str | None, as_json: bool
) -> None:
    with opened(store, actor) as found:
        found.alias(version, alias, expected=expected(expect))
        now = found.show(f"{version.partition('@')[0]}@{alias}")
    result = {"name": now.name, "alias": alias, "version": now.version}
    emit(result, as_json, done("alias", alias=f"{now.name}@{alias}", version=now))
