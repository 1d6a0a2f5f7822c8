"""Making an experiment."""

from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit
from modicum.cli._experiment._shared import URL, KeyOption, NameArgument, UrlOption, server, show
from modicum.errors import ConfigError


def create(
    name: NameArgument,
    arm: Annotated[
        list[str],
        typer.Option(
            metavar="LABEL=VERSION[:WEIGHT]",
            help="An arm, the control first, e.g. new=ada@7:1; at least two.",
        ),
    ],
    feedback: Annotated[str | None, typer.Option(help="What users say: thumbs, score or outcome.")] = None,
    low: Annotated[float | None, typer.Option(help="The lowest score.")] = None,
    high: Annotated[float | None, typer.Option(help="The highest score.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="The chance that a difference is declared which is none [0.05].")
    ] = None,
    max_users: Annotated[
        int | None, typer.Option(help="It ends undecided after so many users [100000].")
    ] = None,
    window: Annotated[
        float | None, typer.Option(help="Seconds after a user's first feedback in which more counts [3600].")
    ] = None,
    patience: Annotated[
        float | None, typer.Option(help="Seconds after an answer in which feedback is taken [604800].")
    ] = None,
    error_margin: Annotated[
        float | None, typer.Option(help="Errors above the control's share at which an arm is stopped [0.02].")
    ] = None,
    latency_factor: Annotated[
        float | None,
        typer.Option(help="An arm is stopped if too much takes longer than this × the control's p95 [1.5]."),
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="The control answers all; the other arm runs beside it unseen.")
    ] = False,
    start: Annotated[bool, typer.Option("--start", help="Start it at once.")] = False,
    url: UrlOption = URL,
    key: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make an experiment of versions of adapters; requests whose `model` is NAME take part once it is started."""
    fields: dict[str, Any] = {
        "feedback": feedback, "low": low, "high": high, "alpha": alpha, "max_users": max_users, "window": window,
        "patience": patience, "error_margin": error_margin, "latency_factor": latency_factor,
    }  # fmt: skip
    asked = server(url, key)
    found = asked.post("experiments", name=name, arms=[_arm(text) for text in arm], shadow=shadow, **fields)
    if start:
        found = asked.post("experiments", name, "start")
    emit(found, as_json, show)


def _arm(text: str) -> dict[str, Any]:
    label, equals, rest = text.partition("=")
    version, colon, weight = rest.partition(":")
    if not (label and equals and version):
        raise ConfigError(
            f"cannot read the arm {text!r}; write label=version or label=version:weight, e.g. new=ada@7:1"
        )
    return {"label": label, "version": version, **({"weight": weigh(weight)} if colon else {})}


def weigh(text: str) -> float:
    """A weight.

    Raises:
        ConfigError: it is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"the weight {text!r} is no number") from None
