"""Say how true a compressed or adapted model stays to its base on text, without any labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, ModelArgument, SequenceLength, emit, jsonable, progress, size, table

if TYPE_CHECKING:
    from modicum.evaluate.fidelity import Fidelity


def run(
    model: ModelArgument,
    base: Annotated[
        str | None, typer.Option(help="The base model; unset: what the folder says it was made from.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", "-a", help="A .modicum file or PEFT folder for MODEL.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A text file, or hub:NAME; unset: the text that modicum bundles.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Sequences of the text; 0 for all.")] = 64,
    sequence_length: SequenceLength = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 4,
    dtype: Annotated[str, typer.Option(help="Number type: auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    layers: Annotated[bool, typer.Option("--layers", help="Also a table of the layers.")] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare MODEL with its base token by token: KL divergence, agreement, perplexity, layer errors, bits, memory.

    MODEL is dense, sparse, quantized, extracted or carries an adapter, and has the tokenizer of its base.
    """
    from modicum.compress.calibration import evaluation_sequences
    from modicum.evaluate.fidelity import measure_fidelity

    def read(tokenizer: Any) -> tuple[Any, str]:
        found = evaluation_sequences(text, tokenizer, sequences, sequence_length)
        return found.ids, found.source

    with progress("sequences") as advance:
        found = measure_fidelity(
            model,
            read,
            base=base,
            adapter=adapter,
            dtype=dtype,
            device=device,
            batch_size=batch_size,
            advance=advance,
        )
    if output is not None:
        import json

        from modicum.store.atomic import write_text

        write_text(output, json.dumps(jsonable(found), indent=2) + "\n")
    emit(found, as_json, lambda it: _show(it, layers))


def _show(found: "Fidelity", layers: bool) -> list[Any]:
    rows = [
        ["KL divergence, nats per token", _number(found.kl.value), _ends(found.kl)],
        [
            "  median, 99 %, largest",
            ", ".join(map(_number, (found.kl_median, found.kl_p99, found.kl_max))),
            "",
        ],
        ["same likeliest token", f"{found.top1_agreement.value:.2%}", _ends(found.top1_agreement)],
        ["perplexity", f"{found.perplexity:.4f}, base {found.base_perplexity:.4f}", ""],
        ["  ratio", f"{found.perplexity_ratio.value:.4f}", _ends(found.perplexity_ratio)],
        ["bits per weight", f"{found.bits_per_weight:.2f}, base {found.base_bits_per_weight:.2f}", ""],
        ["weights in memory", f"{size(found.weight_bytes)}, base {size(found.base_weight_bytes)}", ""],
    ]
    for kind in ("linear", "block"):
        errors = [layer for layer in found.layers if layer.kind == kind]
        if errors:
            worst = max(errors, key=lambda layer: layer.error)
            mean = sum(layer.error for layer in errors) / len(errors)
            rows.append(
                [f"output error, mean of {kind}s", f"{mean:.4f}", f"worst {worst.error:.4f} ({worst.name})"]
            )
    title = f"{found.model} against {found.base}: {found.tokens:,} tokens of {found.text}"
    shown = [table(title, ["", "value", "95 % interval"], rows)]
    if layers:
        errors = [[layer.name, layer.kind, f"{layer.error:.4f}"] for layer in found.layers]
        shown.append(table("relative output errors on the base's inputs", ["layer", "kind", "error"], errors))
    return [*shown, *(f"note: {note}" for note in found.notes)]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _ends(found: Any) -> str:
    return "" if found.low is None else f"{found.low:.4g} to {found.high:.4g}"
