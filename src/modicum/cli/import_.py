"""Take over a published LoRA-XS checkpoint, or a model quantized by GPTQ, AWQ or compressed-tensors."""

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, progress, size, table


def run(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="An adapter: its folder, or its weight file with adapter_config.json beside. Or the folder of a "
            "quantized model."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="The file (modicum) or folder (peft, lora, or a quantized model) to write.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="The adapter's base model: a folder, a hub name, or 'embedded'. Adapters need it."),
    ] = None,
    fmt: Annotated[str, typer.Option("--format", help="modicum, peft or lora.")] = "modicum",
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the numbers in a compact record: bfloat16, float16, float32, int8 or int4."
        ),
    ] = "float32",
    basis: Annotated[
        Path | None,
        typer.Option(help="Write the checkpoint's A and B as a basis file too, for other machines."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Read CHECKPOINT and write it as modicum's own: a LoRA-XS adapter of the published code, or a quantized model.

    An adapter: the checkpoint's own A and B are kept in the basis cache, because the trained numbers mean nothing
    in any other basis. To load the adapter on another machine, write them with --basis and run `modicum basis add`.

    A model quantized by GPTQ, AWQ or compressed-tensors: codes and scales are taken over as they are, so the
    weights stay the same, and none of those libraries is needed from then on. Only --output, --overwrite,
    --dry-run and --json apply.
    """
    from modicum.compress.import_quantized import import_quantized, quantization_of
    from modicum.errors import ConfigError
    from modicum.store.convert import import_adapter

    if quantization_of(checkpoint):
        with progress("layers") as advance:
            imported = import_quantized(
                checkpoint,
                output,
                overwrite=overwrite,
                dry_run=dry_run,
                progress=lambda _done, _all, name: advance(1, name),
            )
        emit(imported, as_json, _show_model)
        return
    if model is None:
        raise ConfigError(
            f"{checkpoint} is taken for an adapter (its folder names no quantization that can be read), and an adapter "
            "needs --model, the base model it was trained on"
        )
    result = import_adapter(
        checkpoint,
        model,
        output,
        fmt,
        dtype=dtype,
        basis_file=basis,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    emit(result, as_json, _show)


def _show(result: Any) -> Any:
    rows = [
        ["layers", f"{result.layers}"],
        ["ranks", ", ".join(map(str, result.ranks))],
        ["values", f"{result.written.values:,}"],
        ["would write" if result.written.dry_run else "written", str(result.written.output)],
        ["bytes", f"{result.written.bytes:,}"],
        ["basis fingerprint", result.basis_fingerprint],
        ["basis file", str(result.basis_file or "in the cache only")],
    ]
    return table("import", ["", "what"], rows)


def _show_model(result: Any) -> Any:
    widths = ", ".join(f"{bits} bits: {count} layers" for bits, count in result.bits.items())
    rows = [
        ["quantized by", result.quant_method],
        ["codes", widths],
        ["bits per weight", f"{result.bits_per_weight:.4g}"],
        ["bytes", f"{size(result.bytes_before)} -> {size(result.bytes_after)}"],
        ["would write" if result.dry_run else "written", str(result.output)],
        *(["note", note] for note in result.notes),
    ]
    return table("import", ["", "what"], rows)
