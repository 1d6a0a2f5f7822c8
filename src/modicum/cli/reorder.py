"""Put MLP channels and attention heads in the order of their importance; the model computes the same."""

from typing import Annotated, Any

import typer

from modicum.cli._common import (
    JsonFlag,
    ModelArgument,
    OutputOption,
    OverwriteFlag,
    SequenceLength,
    emit,
    table,
)


def run(
    model: ModelArgument,
    output: OutputOption,
    kind: Annotated[list[str] | None, typer.Option(help="mlp or heads; both without.")] = None,
    importance: Annotated[
        str,
        typer.Option(help="activations: what units add on text; weights: products of norms, much rougher."),
    ] = "activations",
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="Text files or hub:NAME data sets to measure on; bundled without."),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to measure on.")] = 64,
    sequence_length: SequenceLength = 256,
    overwrite: OverwriteFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write MODEL with its channels and heads in a new order, most important first, as a normal model folder.

    Narrower sub-networks keep the first channels and heads: run this before training a super-network with elastic
    widths. The logits stay the same up to the order of summation, which is measured before the output appears.
    """
    from modicum.compress.reorder import KINDS, ReorderOptions, reorder_model

    options = ReorderOptions(
        kinds=tuple(kind or KINDS),
        importance=importance,
        calibration=tuple(calibration or ()),
        sequences=sequences,
        sequence_length=sequence_length,
    )
    emit(reorder_model(model, output, options, overwrite=overwrite), as_json, _show)


def _show(result: Any) -> Any:
    rows = []
    for kind in dict.fromkeys(width.kind for width in result.widths):
        mine = [width for width in result.widths if width.kind == kind]
        for index, share in enumerate(result.shares):
            before = sum(width.before[index] for width in mine) / len(mine)
            after = sum(width.after[index] for width in mine) / len(mine)
            rows.append([kind, f"{share:.0%}", f"{before:.1%}", f"{after:.1%}"])
    facts = [
        ["importance by", result.importance],
        ["measured on", result.text],
        ["largest difference of a logit", f"{result.max_difference:.3g} on {result.tokens:,} tokens"],
        ["output", result.output],
    ]
    columns = ["", "first units", "importance before", "after"]
    return [table("reorder", columns, rows), table("", ["", "what"], facts)]
