"""The options that choose versions, and the `Filter` they make."""

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from modicum.errors import ConfigError

if TYPE_CHECKING:
    from modicum.store import Filter

Pattern = Annotated[
    str | None, typer.Argument(metavar="[NAMES]", help="A name, or a pattern such as 'team/*' (in quotes).")
]
Alias = Annotated[str | None, typer.Option(help="Only what this alias points at.")]
Tag = Annotated[str | None, typer.Option(help="Only versions with this tag.")]
Method = Annotated[str | None, typer.Option(help="Only this method, e.g. lora_xs or peft:LORA.")]
Base = Annotated[str | None, typer.Option(help="Only of the base model with this fingerprint.")]
Since = Annotated[
    str | None,
    typer.Option(help="Put at this time or later: 2026-11-22, 2026-11-22T14:30, or 7d, 12h, 30m ago."),
]
Before = Annotated[str | None, typer.Option(help="Put before this time.")]
Metric = Annotated[
    list[str] | None,
    typer.Option(
        help="A limit such as 'accuracy>=0.9' or 'loss<=0.5' (in quotes); may be given several times."
    ),
]
Newest = Annotated[bool, typer.Option("--newest", help="Only the newest version of every name.")]

_LIMIT = re.compile(r"(?P<metric>[\w.-]+?)\s*(?P<sign>>=|<=|=)\s*(?P<value>[^<>=]+)")
_AGO = re.compile(r"(\d+)([dhm])")
_UNITS = {"d": "days", "h": "hours", "m": "minutes"}


def chosen(
    pattern: str | None,
    alias: str | None,
    tag: str | None,
    method: str | None,
    base: str | None,
    since: str | None,
    before: str | None,
    metric: list[str] | None,
    newest: bool,
) -> "Filter":
    """The filter that the options make.

    Raises:
        ConfigError: a time or a limit cannot be read.
    """
    from modicum.store import Filter

    return Filter(
        name=pattern,
        alias=alias,
        tag=tag,
        method=method,
        base_fingerprint=base,
        since=_time(since),
        before=_time(before),
        metrics=_limits(metric or []) or None,
        newest=newest,
    )


def _time(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        if ago := _AGO.fullmatch(text):
            return datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        found = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"cannot read the time {text!r}; write 2026-11-22, 2026-11-22T14:30+01:00, or 7d, 12h, 30m for so long ago"
        ) from None
    # without a zone it is what the clock on this machine says
    return found if found.tzinfo else found.astimezone()


def _limits(texts: list[str]) -> dict[str, tuple[float | None, float | None]]:
    found: dict[str, tuple[float | None, float | None]] = {}
    for text in texts:
        match = _LIMIT.fullmatch(text.strip())
        try:
            value = float(match["value"]) if match else None
        except ValueError:
            value = None
        if match is None or value is None:
            raise ConfigError(
                f"cannot read the limit {text!r}; write 'accuracy>=0.9', 'loss<=0.5' or 'seed=1'"
            )
        low, high = found.get(match["metric"], (None, None))
        found[match["metric"]] = (
            value if match["sign"] in (">=", "=") else low,
            value if match["sign"] in ("<=", "=") else high,
        )
    return found
