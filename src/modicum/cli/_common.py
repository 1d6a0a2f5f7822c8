"""What several verbs need: output as table or JSON, progress, and overrides of a recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.errors import ConfigError

#: the `--json` option of a verb: `as_json: JsonFlag = False`
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
#: what several verbs that write a model folder take
ModelArgument = Annotated[str, typer.Argument(help="A model folder, a hub name, or 'embedded'.")]
OutputOption = Annotated[Path, typer.Option(help="The folder to write.")]
OverwriteFlag = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
SequenceLength = Annotated[int, typer.Option(help="Tokens in a sequence.")]

#: what verbs take whose work can be spread over machines
RayFlag = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="Work on the Ray cluster that RAY_ADDRESS names, else on one of this machine that ends with it.",
    ),
]

Advance = Callable[..., None]


def emit(result: Any, as_json: bool, table_fn: Callable[[Any], Any]) -> None:
    """Print a dataclass or mapping: as one JSON object, or as what `table_fn(result)` makes of it."""
    if as_json:
        typer.echo(json.dumps(jsonable(result), allow_nan=False))
        return
    from rich.console import Console

    shown = table_fn(result)
    # no terminal has no width of its own: let lines be as long as they are, so that pipes see whole rows
    console = Console(width=None if sys.stdout.isatty() else 200)
    for part in shown if isinstance(shown, (list, tuple)) else [shown]:
        if isinstance(part, str):
            typer.echo(part)
        else:
            console.print(part)


def jsonable(value: Any) -> Any:
    """`value` in plain JSON types; dataclasses become objects, paths strings, nan and inf None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A rich table; columns whose every value reads as a number are set flush right."""
    from rich.table import Table

    result = Table(title=title, title_justify="left")
    cells = [[str(value) for value in row] for row in rows]
    for index, name in enumerate(columns):
        numeric = all(re.match(r"[-+~]?[\d.]", row[index]) or not row[index] for row in cells)
        result.add_column(name, justify="right" if numeric else "left")
    for row in cells:
        result.add_row(*row)
    return result


def size(count: float) -> str:
    """A number of bytes in the largest unit that leaves at least one, with three digits: `144 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.3g} {unit}"


@contextlib.contextmanager
def progress(what: str, total: int | None = None, every: float = 10.0) -> Iterator[Advance]:
    """A function `advance(steps=1, note="")`: a bar on a terminal, else now and then a line on stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda steps=1, note="": bar.update(
                task, advance=steps, description=f"{what} {note}".strip()
            )
        return
    done, last = 0, time.monotonic()

    def advance(steps: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += steps
        if done == total or time.monotonic() - last >= every:
            last = time.monotonic()
            typer.echo(f"{what} {done}{f'/{total}' if total else ''} {note}".rstrip(), err=True)

    yield advance


@contextlib.contextmanager
def layer_progress(what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A function `advance(done, total, name)` that shows `progress` from its first call on, which says the total."""
    with contextlib.ExitStack() as stack:
        bar: list[Advance] = []

        def advance(done: int, total: int, name: str) -> None:
            bar[:] = bar or [stack.enter_context(progress(what, total))]
            # what a resumed run finds finished has no name
            bar[0](1 if name else done, name)

        yield advance


def parse_overrides(pairs: Sequence[str] | None) -> dict[str, Any]:
    """Nested values from `key.sub=value` pairs; values are read as YAML (`1e-3` is a number).

    Raises:
        ConfigError: a pair has no `=`, an empty key, or a key below another pair's value.
    """
    from modicum.train.yaml_lines import yaml_value

    result: dict[str, Any] = {}
    for pair in pairs or ():
        path, equals, text = pair.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise ConfigError(f"cannot read {pair!r}; write key=value or key.sub=value, e.g. alpha=32")
        node = result
        for key in keys[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{pair!r} goes below {key!r}, which another override sets to a value")
        node[keys[-1]] = yaml_value(text)
    return result


def read_prices(file: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The prices in a YAML file, or in its section `prices`, with those of `options` that are given in their places.

    Raises:
        ConfigError: the file is missing, or holds something else.
    """
    from modicum.train.yaml_lines import read_yaml_file

    values: Any = {} if file is None else read_yaml_file(file, "prices")[0]
    if isinstance(values, dict) and isinstance(values.get("prices"), dict):
        # the section of a comparison serves as well
        values = values["prices"]
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: prices are a mapping, such as `cpu_hour: 0.04` and `currency: EUR`")
    return {**values, **{name: value for name, value in options.items() if value is not None}}
