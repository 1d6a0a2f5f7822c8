"""Adapters of a running server: in memory, and in production."""

from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit
from modicum.cli._experiment._shared import URL, KeyOption, UrlOption, server
from modicum.cli._serve._adapters import described, residents
from modicum.cli._store._shared import ExpectedOption, NameArgument, Reference, done, expected

Alias = Annotated[str, typer.Option(help="The alias that moves.")]

app = typer.Typer(
    no_args_is_help=True,
    help="Adapters of a running server (`--url` or $MODICUM_URL, the key of an admin in $MODICUM_KEY).",
)


@app.command("list")
def list_(url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False) -> None:
    """List the adapters in memory, the last used first."""
    emit(server(url, key).get("adapters"), as_json, residents)


@app.command()
def show(name: NameArgument, url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False) -> None:
    """Show the newest versions of an adapter, and what happened to it."""
    emit(server(url, key).get("adapters", name), as_json, described)


@app.command()
def load(
    version: Reference,
    pin: Annotated[bool, typer.Option("--pin", help="Keep it in memory.")] = False,
    url: UrlOption = URL,
    key: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Load a version, so that nobody waits for it."""
    name, selector = _split(version)
    found = server(url, key).post("adapters", name, "load", version=selector, pin=pin)
    emit(found, as_json, done("in memory", **found))


@app.command()
def unpin(version: Reference, url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False) -> None:
    """Let a version leave memory again when room is needed."""
    name, selector = _split(version)
    found = server(url, key).post("adapters", name, "unpin", version=selector)
    emit(found, as_json, done("unpinned", **found))


@app.command()
def unload(
    version: Reference, url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False
) -> None:
    """Take a version out of memory; what runs under it finishes first."""
    name, selector = _split(version)
    found = server(url, key).post("adapters", name, "unload", version=selector)
    emit(found, as_json, done("unload", **found))


@app.command()
def promote(
    version: Reference,
    to: Alias = "production",
    only_if: ExpectedOption = None,
    url: UrlOption = URL,
    key: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Move an alias to a version that the server can serve; it counts from the next request on."""
    name, selector = _split(version)
    body: dict[str, Any] = {"version": selector, "alias": to}
    body |= {} if only_if is None else {"expected": expected(only_if)}
    found = server(url, key).post_exactly("adapters", name, "promote", body=body)
    emit(found, as_json, done("promoted", **found))


@app.command()
def rollback(
    name: NameArgument,
    alias: Alias = "production",
    only_if: ExpectedOption = None,
    url: UrlOption = URL,
    key: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Move an alias back to where it pointed before; it counts from the next request on."""
    body: dict[str, Any] = {"alias": alias} | ({} if only_if is None else {"expected": expected(only_if)})
    found = server(url, key).post_exactly("adapters", name, "rollback", body=body)
    emit(found, as_json, done("rolled back", **found))


def _split(version: str) -> tuple[str, int | str]:
    from modicum.store.catalogue.names import reference

    found = reference(version)
    return found.name, found.selector
