"""Try versions of adapters on the users of a running server: arms, feedback, decision, promotion."""

import typer

from modicum.cli._experiment import change, look, make

app = typer.Typer(
    no_args_is_help=True,
    help="Experiments on a running server (`--url` or $MODICUM_URL, the key of an admin in $MODICUM_KEY).\n\n"
    "Users who ask for the experiment's name in place of a model get one of its versions, always the same one; what "
    "they say of the answers decides.",
)
for verb in (
    make.create, look.list_, look.show, change.start, change.weigh, change.stop, change.promote, change.rollback,
    change.delete, change.forget,
):  # fmt: skip
    app.command(verb.__name__.rstrip("_"))(verb)
