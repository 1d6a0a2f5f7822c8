"""Who may use a server: add, list, rotate and revoke API keys."""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, jsonable, table
from modicum.cli._serve._options import State as StateOption

if TYPE_CHECKING:
    from modicum.serve.keys import Keys

Name = Annotated[str, typer.Argument(metavar="NAME", help="Who has the key: the tenant in logs and metrics.")]
Most = Annotated[int | None, typer.Option(min=1, help="The most that the key may have; without, any number.")]

app = typer.Typer(no_args_is_help=True, help="Keys of a server; a running one sees every change at once.")


@app.command()
def add(
    name: Name,
    state: StateOption = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(help="Adapters that it sees, e.g. 'team/*'; may be given several times."),
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="It may use the base model alone.")] = False,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may use the admin's routes and the whole page.")
    ] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="It may read /metrics.")] = False,
    requests_per_minute: Most = None,
    tokens_per_minute: Most = None,
    tokens_per_day: Most = None,
    concurrent: Most = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a key and show it, which happens only once: what is kept is a hash."""
    with _opened(state) as keys:
        secret = keys.add(
            name,
            adapters=tuple(adapters or ()),
            base=base,
            admin=admin,
            metrics=metrics,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            tokens_per_day=tokens_per_day,
            concurrent=concurrent,
        )
    emit({"name": name, "key": secret}, as_json, lambda found: found["key"])


@app.command("list")
def list_(state: StateOption = None, as_json: JsonFlag = False) -> None:
    """List all keys and what they may do; the keys themselves are not kept."""
    with _opened(state) as keys:
        emit({"keys": [jsonable(key) for key in keys.list()]}, as_json, _show)


@app.command()
def rotate(name: Name, state: StateOption = None, as_json: JsonFlag = False) -> None:
    """Make a new secret for a key and show it once; the old one is worth nothing from now on."""
    with _opened(state) as keys:
        secret = keys.rotate(name)
    emit({"name": name, "key": secret}, as_json, lambda found: found["key"])


@app.command()
def revoke(name: Name, state: StateOption = None, as_json: JsonFlag = False) -> None:
    """Take a key away at once; requests that run are finished."""
    with _opened(state) as keys:
        keys.revoke(name)
    emit({"name": name, "revoked": True}, as_json, lambda found: f"revoked {found['name']}")


@contextlib.contextmanager
def _opened(state: StateOption) -> Iterator["Keys"]:
    from modicum.serve.keys import Keys
    from modicum.serve.state import default_state

    with Keys(state or default_state()) as keys:
        yield keys


def _show(found: dict[str, Any]) -> Any:
    limits = ("requests_per_minute", "tokens_per_minute", "tokens_per_day", "concurrent")
    rows = []
    for key in found["keys"]:
        rights = [*key["adapters"], *(right for right in ("base", "admin", "metrics") if key[right])]
        most = [f"{key[name]:,} {name.replace('_', ' ')}" for name in limits if key[name] is not None]
        made = datetime.fromtimestamp(key["created"], UTC).strftime("%Y-%m-%d")
        rows.append(
            [key["name"], ", ".join(rights), ", ".join(most), made, "revoked" if key["revoked"] else ""]
        )
    return table("keys", ["name", "may use", "at most", "made", ""], rows)
