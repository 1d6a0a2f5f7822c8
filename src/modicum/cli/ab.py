"""Say which of several versions is better on the same items, and whether the items suffice to say so."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table

if TYPE_CHECKING:
    from modicum.evaluate.ab import Comparison, Comparisons


def run(
    records: Annotated[
        list[Path],
        typer.Argument(
            help="Two or more versions: files of records (.parquet), or folders with a file for each task."
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            help="correct, loss or perplexity; unset: correct where the records have it, else loss."
        ),
    ] = None,
    slice_by: Annotated[
        str | None, typer.Option("--slice", metavar="FIELD", help="Also compare by the values of this slice.")
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="The chance of a difference that is none; intervals hold 1 - alpha.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of drawn permutations.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Compare the versions in RECORDS pair by pair, item by item: difference, interval, test, effect size.

    Records of different protocols, templates, tasks or items are refused. Where no difference is shown, says how many
    items would tell the versions apart.
    """
    from modicum.evaluate.ab import compare

    emit(
        compare(records, metric=metric, slice_by=slice_by, alpha=alpha, seed=seed),
        as_json,
        _show,
    )


def _show(found: "Comparisons") -> list[Any]:
    level = f"{1 - found.alpha:.0%}"
    parts: list[Any] = []
    for title, rows in (("", found.overall), ("by task", found.tasks), ("by slice", found.slices)):
        if rows:
            corrected = f", p corrected for {len(rows)} comparisons" if len(rows) > 1 else ""
            named = " ".join(word for word in (found.metric, title) if word)
            parts.append(
                table(
                    f"{named}: first against second, intervals at {level}{corrected}",
                    _COLUMNS,
                    _rows(rows, found),
                )
            )
    return [*parts, *(row.sentence for row in found.overall), *(f"note: {note}" for note in found.notes)]


_COLUMNS = [
    "items of", "n", "first", "", "second", "", "difference", "test", "p", "effect", "detectable", "better"
]  # fmt: skip


def _rows(rows: "tuple[Comparison, ...]", found: "Comparisons") -> list[list[Any]]:
    from modicum.evaluate.ab import shown, shown_change, shown_difference

    return [
        [
            row.slice or row.task,
            f"{row.n:,}",
            row.first,
            shown(row.first_value, found.metric),
            row.second,
            shown(row.second_value, found.metric),
            shown_difference(row.difference, found.metric),
            row.test,
            f"{row.p_corrected:.2g}",
            _effect(row),
            "" if row.detectable is None else shown_change(row.detectable, found.metric),
            row.better or "not distinguishable",
        ]
        for row in rows
    ]


def _effect(row: "Comparison") -> str:
    if row.test == "McNemar":
        return f"h = {row.effect['cohens_h']:.2f}, {row.effect['wins']} : {row.effect['losses']}"
    return "" if row.effect["d_z"] is None else f"d_z = {row.effect['d_z']:.2f}"
