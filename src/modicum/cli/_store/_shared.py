"""What the commands of `modicum store` share: where the store is, who acts, and how versions are shown."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import Advance, progress, table
from modicum.errors import ConfigError

if TYPE_CHECKING:
    from modicum.store import Store

StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        "-s",
        envvar="MODICUM_STORE",
        help="The store: its folder, or postgresql://USER@HOST/DATABASE?objects=URL.",
    ),
]
ActorOption = Annotated[
    str | None,
    typer.Option(envvar="MODICUM_ACTOR", help="Who the log says did it; user@machine without."),
]
Reference = Annotated[str, typer.Argument(metavar="VERSION", help="NAME, NAME@3 or NAME@ALIAS.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The name of an adapter.")]
ExpectedOption = Annotated[
    str | None,
    typer.Option(
        "--expected", help="Only if the alias points at this version now; 'none' if it must not exist yet."
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Type of numbers that come from folders: auto (as they are), bfloat16, float16, float32, int8 or int4."
    ),
]
CreateFlag = Annotated[bool, typer.Option("--create", help="Make the store if there is none.")]
TagOption = Annotated[list[str] | None, typer.Option("--tag", help="A tag; may be given several times.")]


@contextlib.contextmanager
def opened(location: str, actor: str | None = None, *, create: bool = False) -> Iterator["Store"]:
    """The store at `location`."""
    from modicum.store import Store

    with Store(location, create=create, actor=actor) as store:
        yield store


@contextlib.contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function `tell(steps, total)` that shows `progress` from its first call on, which says the total."""
    with contextlib.ExitStack() as stack:
        bar: list[Advance] = []

        def tell(steps: int, total: int) -> None:
            bar[:] = bar or [stack.enter_context(progress(what, total))]
            bar[0](steps)

        yield tell


def expected(text: str | None) -> Any:
    """What `--expected` means to `Store.alias`."""
    from modicum.store.catalogue.pointers import ANYTHING

    if text is None:
        return ANYTHING
    if text == "none":
        return None
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--expected {text!r} must be the number of a version, or none")
    return int(text)


def metrics(pairs: Sequence[str] | None) -> dict[str, float]:
    """The metrics in `name=value` pairs."""
    found = {}
    for pair in pairs or ():
        name, _, text = pair.partition("=")
        try:
            found[name] = float(text)
        except ValueError:
            raise ConfigError(
                f"cannot read the metric {pair!r}; write name=number, e.g. accuracy=0.91"
            ) from None
    return found


def plain(text: Any) -> str:
    """`text` as it may be shown on a terminal: whoever wrote it, no control characters and no markup."""
    from rich.markup import escape

    return escape(re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", str(text)))


def moment(at: datetime) -> str:
    """A time on the clock of this machine, to the second."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def rows(title: str, found: Sequence[tuple[str, Any]]) -> Any:
    """A table of what is known, one thing per line, without what is empty."""
    shown = [[name, plain(value)] for name, value in found if value not in (None, "", (), [])]
    return table(title, ["", "what"], shown)


def number(value: float | None) -> str:
    """A measured number, or nothing."""
    return "" if value is None else f"{value:.6g}"


def done(title: str, **found: Any) -> Any:
    """A function for `emit` that shows what a change did."""
    return lambda _: rows(title, [(name.replace("_", " "), value) for name, value in found.items()])
