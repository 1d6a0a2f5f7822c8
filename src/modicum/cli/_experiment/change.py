"""What becomes of an experiment: start, weigh, stop, promote, rollback, delete, forget."""

from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit
from modicum.cli._experiment._shared import URL, KeyOption, NameArgument, UrlOption, server, show
from modicum.cli._experiment.make import weigh as weight_of
from modicum.cli._store._shared import ExpectedOption, done, expected
from modicum.errors import ConfigError


def start(name: NameArgument, url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False) -> None:
    """Let users take part from their next request on."""
    emit(server(url, key).post("experiments", name, "start"), as_json, show)


def weigh(
    name: NameArgument,
    weights: Annotated[list[str], typer.Argument(metavar="LABEL=WEIGHT…", help="New weights of arms.")],
    url: UrlOption = URL,
    key: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Change how many users the arms get; as few as can be move to another arm."""
    pairs = [text.partition("=") for text in weights]
    if wrong := ["".join(pair) for pair in pairs if not all(pair)]:
        raise ConfigError(f"cannot read {', '.join(map(repr, wrong))}; write label=weight, e.g. new=5")
    found = {label: weight_of(weight) for label, _, weight in pairs}
    emit(server(url, key).post_exactly("experiments", name, "weights", body=found), as_json, show)


def stop(name: NameArgument, url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False) -> None:
    """Give everybody the control again; what was found stays."""
    emit(server(url, key).post("experiments", name, "stop"), as_json, show)


def promote(
    name: NameArgument,
    arm: Annotated[str | None, typer.Option(help="The arm, if not the winner.")] = None,
    only_if: ExpectedOption = None,
    url: UrlOption = URL,
    key: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Put the winner into production, unless somebody moved production since the experiment started."""
    body: dict[str, Any] = {} if arm is None else {"arm": arm}
    # none is said as null, and what is not said is where production pointed at the start
    given = {} if only_if is None else {"expected": expected(only_if)}
    emit(server(url, key).post_exactly("experiments", name, "promote", body=body | given), as_json, show)


def rollback(
    name: NameArgument, url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False
) -> None:
    """Take a promotion back, if production still points where it put it."""
    emit(server(url, key).post("experiments", name, "rollback"), as_json, show)


def delete(
    name: NameArgument, url: UrlOption = URL, key: KeyOption = None, as_json: JsonFlag = False
) -> None:
    """Delete an experiment that does not run, with all that it counted; the store's log keeps what was done."""
    emit(server(url, key).delete("experiments", name), as_json, done("deleted", experiment=name))


def forget(
    tenant: Annotated[str, typer.Argument(help="The name of the key that the user was asked for with.")],
    user: Annotated[str, typer.Argument(help="What requests called the user.")],
    url: UrlOption = URL,
    key: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Erase what all experiments know of a user; outcomes that were counted stay as nobody's."""
    found = server(url, key).post("users", "purge", tenant=tenant, user=user)
    emit(found, as_json, done("forgotten", rows=found["erased"]))
