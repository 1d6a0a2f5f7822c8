"""Train, evaluate and report on adapters of many users at once."""

import typer

from modicum.cli._fleet import evaluate, report, train

app = typer.Typer(
    no_args_is_help=True,
    help="Train one adapter for each of many users, on one base model, in shared batches.\n\n"
    "A fleet is one YAML: whose rows there are, the method, the store that adapters go to. Each adapter becomes what "
    "`modicum tune` would make of that user's rows alone.",
)
for verb in (train.train, evaluate.eval_, report.report):
    app.command(verb.__name__.rstrip("_"))(verb)
