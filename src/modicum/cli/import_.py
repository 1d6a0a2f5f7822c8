"""Read a LoRA-XS checkpoint of the authors' published code and write it as one of ours."""

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table


def run(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="The checkpoint's folder, or its weight file with adapter_config.json beside."),
    ],
    model: Annotated[str, typer.Option(help="The base model: a folder, a hub name, or 'embedded'.")],
    output: Annotated[Path, typer.Option(help="The file (modicum) or folder (peft, lora) to write.")],
    fmt: Annotated[str, typer.Option("--format", help="modicum, peft or lora.")] = "modicum",
    dtype: Annotated[
        str, typer.Option(help="Type of the numbers in a compact record: bfloat16, float16 or float32.")
    ] = "float32",
    basis: Annotated[
        Path | None,
        typer.Option(help="Write the checkpoint's A and B as a basis file too, for other machines."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Read CHECKPOINT, a LoRA-XS adapter of the published code, and write it as an adapter of modicum.

    The checkpoint's own A and B are kept in the basis cache, because the trained numbers mean nothing in any
    other basis. To load the adapter on another machine, write them with --basis and run `modicum basis add`.
    """
    from modicum.store.convert import import_adapter

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
