"""Keep versions of many adapters: put, get, promote, roll back, compare, verify, erase, sync."""

import typer

from modicum.cli._store import bulk, carry, check, fetch, label, look, move, put, remove

app = typer.Typer(
    no_args_is_help=True,
    help="Keep versions of adapters in a store: a folder that `init` makes and --store or $MODICUM_STORE names.\n\n"
    "A version is named `ada` or `ada@latest` (the newest), `ada@3`, or `ada@production` by an alias. Every change is "
    "logged with who made it. Also in Python: `from modicum.store import Store`.",
)
for verb in (
    put.init, put.put, bulk.put_many, put.put_basis, fetch.get, look.ls, look.show, look.log, look.diff, look.stats,
    label.tag, label.note, label.measure, move.alias, move.promote, move.rollback, check.verify, check.gc,
    check.backup, remove.remove, remove.purge, carry.export, carry.import_, carry.sync,
):  # fmt: skip
    app.command(verb.__name__.rstrip("_").replace("_", "-"))(verb)
