"""What commands that ask a running server share: where it is, and how experiments are shown."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import table
from modicum.cli._store._shared import plain

if TYPE_CHECKING:
    from modicum.serve.client import Client

UrlOption = Annotated[str, typer.Option(envvar="MODICUM_URL", help="The address of the server.")]
KeyOption = Annotated[
    str | None,
    typer.Option(
        envvar="MODICUM_KEY", help="The key of an admin; better in the variable, where nobody reads it."
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The name of the experiment.")]
URL = "http://127.0.0.1:8000"


def server(url: str, key: str | None) -> "Client":
    """The server that is asked."""
    from modicum.serve.client import Client

    return Client(url, key)


def show(found: dict[str, Any]) -> list[Any]:
    """An experiment as a table of its arms, and a line about where it stands."""
    rows = [_arm(arm) for arm in found["arms"]]
    columns = [
        "arm", "version", "weight", "users", "requests", f"{found['feedback']}, mean", "against control", "errors",
        "p50 s", "p95 s", "tokens",
    ]  # fmt: skip
    columns += ["agreement"] if found["shadow"] else []
    rows = [
        [*row, _number(arm["agreement"])] if found["shadow"] else row
        for row, arm in zip(rows, found["arms"], strict=True)
    ]
    sure = f"intervals hold at all times together, with chance {1 - found['alpha']:.0%}"
    return [table(f"{plain(found['name'])}: {found['state']}", columns, rows), *_said(found), f"note: {sure}"]


def _arm(arm: dict[str, Any]) -> list[Any]:
    difference = arm["difference"]
    against = "control" if arm["control"] else ""
    if difference is not None:
        against = f"{_interval(difference, '+')} {arm['verdict']}"
    return [
        plain(arm["label"]), plain(arm["version"] or "base model"), f"{arm['weight']:g}", arm["users"], arm["requests"],
        _interval(arm["outcome"]), against, f"{arm['errors']} of {arm['requests']}", _number(arm["seconds"]["p50"]),
        _number(arm["seconds"]["p95"]), arm["prompt_tokens"] + arm["generated_tokens"],
    ]  # fmt: skip


def _said(found: dict[str, Any]) -> list[str]:
    lines = [
        f"outcomes of {found['rated_users']} users, {found['waiting_users']} more have begun to say something"
    ]
    if found["reason"]:
        lines.append(
            f"ended: {plain(found['reason'])}" + (f"; winner: {found['winner']}" if found["winner"] else "")
        )
    if found["sample_ratio_p"] is not None and found["sample_ratio_p"] < 0.001:
        lines.append(
            "warning: users are not spread over the arms as the weights say; something loses some of them"
        )
    if found["lost"]:
        lines.append(f"warning: {found['lost']} answers could not be written down")
    return lines


def _interval(found: dict[str, Any], sign: str = "") -> str:
    if found["value"] is None:
        return ""
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
