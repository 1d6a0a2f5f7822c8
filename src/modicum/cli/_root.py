"""The root command: finds the verbs, imports only the one that is called, and words every error."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from modicum._version import __version__
from modicum.errors import ModicumError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED = 130


@functools.cache
def verbs() -> dict[str, Path]:
    """The file of every verb, by verb, sorted; imports none of them."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    return {file.stem.rstrip("_").replace("_", "-"): file for file in files}


@functools.cache
def summary(verb: str) -> str:
    """The first line of the docstring of the verb's file, which is parsed but not run."""
    text = ast.get_docstring(ast.parse(verbs()[verb].read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


@functools.cache
def load(verb: str) -> Any:
    """The command (or group of commands) of a verb, from its `run` or `app`."""
    module = importlib.import_module(f"modicum.cli.{verbs()[verb].stem}")
    if "app" in vars(module):
        command = get_command(module.app)
    else:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(verb)(module.run)
        command = get_command(app)
    command.name = verb
    return command


class LazyGroup(TyperGroup):
    """A group that knows its verbs by their files and imports one only when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002, the signature is typer's
        """All verbs."""
        return list(verbs())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in that carries the verb's summary only; enough for the list in `--help`."""
        if cmd_name not in verbs():
            ctx.fail(f"no verb {cmd_name!r}{did_you_mean(cmd_name, verbs())}; known: {', '.join(verbs())}")
        return TyperCommand(cmd_name, help=summary(cmd_name), rich_markup_mode=None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, command and remaining arguments of the verb that is called, imported now."""
        name, stand_in, rest = super().resolve_command(ctx, args)
        return name, stand_in and load(stand_in.name), rest


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from (also: MODICUM_DEBUG=1).")
    ] = False,
) -> None:
    """Fine-tune, compress, personalize and serve language models with extremely few parameters."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error, 2 wrong usage, 130 interrupted."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    options = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in options or os.environ.get("MODICUM_DEBUG", "") not in {"", "0"}
    # accepted after the verb too, where people write it
    args = [word for word in options if word != "--debug"] + args[len(options) :]
    try:
        # outside standalone mode typer hands usage errors on, which `--json` has to word itself
        code = get_command(app).main(args, prog_name="modicum", standalone_mode="--json" not in options)
        sys.exit(code if isinstance(code, int) else 0)
    except (KeyboardInterrupt, typer.Abort):
        _report("interrupted", "Interrupted", options)
        sys.exit(INTERRUPTED)
    except typer.TyperException as error:
        _report(error.format_message(), type(error).__name__, options)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001, the last resort of the program
        if debug:
            traceback.print_exc()
        _report(describe(error), type(error).__name__, options)
        sys.exit(1)


def describe(error: Exception) -> str:
    """What went wrong in one message; unexpected errors say how to see more."""
    if isinstance(error, ModicumError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)"


def _report(message: str, kind: str, options: Sequence[str]) -> None:
    if "--json" in options:
        typer.echo(json.dumps({"error": message, "kind": kind}))
    else:
        typer.echo(f"error: {message}", err=True)
