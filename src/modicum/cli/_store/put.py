"""The store itself, and what comes into it one by one."""

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit
from modicum.cli._store._shared import (
    ActorOption,
    CreateFlag,
    DtypeOption,
    NameArgument,
    StoreOption,
    TagOption,
    done,
    metrics,
    opened,
)


def init(store: StoreOption, as_json: JsonFlag = False) -> None:
    """Make an empty store; one that is there already is left as it is."""
    with opened(store, create=True) as made:
        emit(
            {"store": made.location, "versions": made.stats(largest=0).versions},
            as_json,
            lambda r: r["store"],
        )


def put(
    name: NameArgument,
    source: Annotated[
        Path, typer.Argument(help="A .modicum file, a PEFT folder (LoRA too), or the folder of a run.")
    ],
    store: StoreOption,
    parent: Annotated[str | None, typer.Option(help="The version it was trained from.")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed it was trained with.")] = None,
    data_digest: Annotated[str | None, typer.Option(help="A digest of its training data.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="A measured number, name=value; may be given several times.")
    ] = None,
    tag: TagOption = None,
    note: Annotated[str | None, typer.Option(help="What is to be known about it.")] = None,
    alias: Annotated[
        str | None, typer.Option(help="An alias that is moved to it in the same change.")
    ] = None,
    dtype: DtypeOption = "auto",
    create: CreateFlag = False,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Store an adapter as the next version of NAME.

    Of a run, metrics, seed, recipe digest and data digest are taken from its report; options go before them.
    """
    from modicum.store import read_source

    found = read_source(source, dtype=dtype)
    about: dict[str, Any] = {
        "parent": parent,
        "seed": found.seed if seed is None else seed,
        "data_digest": found.data_digest if data_digest is None else data_digest,
        "metrics": found.metrics | metrics(metric),
        "tags": tag or (),
        "note": note,
        "alias": alias,
        "source": str(source),
    }
    with opened(store, actor, create=create) as kept:
        one = kept.put(name, found.record, **about)
    shown = done(
        "put", version=one, digest=one.digest, bytes=f"{one.bytes:,}", aliases=", ".join(one.aliases)
    )
    emit(one, as_json, shown)


def put_basis(
    file: Annotated[Path, typer.Argument(help="A basis file, as `modicum basis build --output` writes it.")],
    store: StoreOption,
    actor: ActorOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Store the basis that adapters share, once; records that name its fingerprint find it."""
    from modicum.store import put_basis as stored

    with opened(store, actor) as kept:
        one = stored(kept, file)
    emit(one, as_json, done("basis", version=one, fingerprint=one.basis_fingerprint, bytes=f"{one.bytes:,}"))
