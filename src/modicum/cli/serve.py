"""Serve one base model with thousands of adapters over the OpenAI API, and say who may use it."""

from typing import Any

import typer
from typer.core import TyperGroup

from modicum.cli._serve import adapters, keys, start


class _Group(TyperGroup):
    """A group whose command `start` may be left out: `modicum serve MODEL`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = ["start", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Serve one base model with thousands of adapters over the OpenAI API: `modicum serve MODEL --store STORE`.\n\n"
    "Only this machine is let in until there are keys (`modicum serve keys add`).",
)
app.command("start")(start.start)
app.add_typer(keys.app, name="keys")
app.add_typer(adapters.app, name="adapters")
