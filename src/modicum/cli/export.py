"""Write an adapter in another format, or a whole low-bit model in the format of another engine."""

from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table


def run(
    model: Annotated[str, typer.Option(help="The base model: a folder, a hub name, or 'embedded'.")],
    output: Annotated[
        Path, typer.Option(help="The file (modicum, gguf) or folder (all other formats) to write.")
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="A .modicum file or a PEFT folder; absent to export the model itself.")
    ] = None,
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            help="Of an adapter: lora (a standard LoRA, exactly equal, for software without modicum), modicum "
            "(one compact file) or peft (a PEFT folder of the same method). Of a model: gguf, openvino, onnx, "
            "compressed-tensors or gptq.",
        ),
    ] = "lora",
    sub_network: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file with the sub-network of an elastic adapter to write; unset: the active one."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the numbers in a compact record: bfloat16, float16, float32, int8 or int4."
        ),
    ] = "bfloat16",
    allow_inexact: Annotated[
        bool, typer.Option("--allow-inexact", help="Write a model that the engine cannot hold exactly.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write an adapter, or a model without one, in another format, and say what it takes and what it costs."""
    from modicum.compress.export import formats
    from modicum.errors import ConfigError
    from modicum.store.convert import FORMATS

    if adapter is None and fmt in FORMATS:
        raise ConfigError(
            f"the format {fmt} is one of adapters: name one with --adapter; to export the model itself, choose "
            f"--format {', '.join(formats())}"
        )
    if adapter is not None and fmt in formats():
        raise ConfigError(
            f"the format {fmt} takes a whole model: first `modicum merge --model {model} --adapter {adapter} "
            "--output MERGED`, then export MERGED without --adapter"
        )
    if adapter is None and sub_network is not None:
        raise ConfigError("--sub-network belongs to an adapter: name it with --adapter")
    if adapter is None or fmt not in FORMATS:
        _export_model(model, output, fmt, allow_inexact, overwrite, dry_run, as_json)
        return
    from modicum.store.convert import activate, export_adapter, load_for

    loaded = load_for(model, adapter)[0]
    if sub_network is not None:
        activate(loaded, sub_network)
    result = export_adapter(loaded, output, fmt, dtype=dtype, overwrite=overwrite, dry_run=dry_run)
    emit(result, as_json, _show)


def _export_model(
    model: str, output: Path, fmt: str, allow_inexact: bool, overwrite: bool, dry_run: bool, as_json: bool
) -> None:
    from modicum.compress.export import export_model, formats
    from modicum.errors import ConfigError, did_you_mean
    from modicum.models.loading import load_base, load_tokenizer
    from modicum.store.convert import FORMATS

    known = (*FORMATS, *formats())
    if fmt not in known:
        raise ConfigError(f"no format {fmt!r}{did_you_mean(fmt, known)}; known: {', '.join(known)}")
    loaded = load_base(model, dtype="float32")
    result = export_model(loaded, load_tokenizer(model), output, fmt, allow_inexact, overwrite, dry_run)
    emit(result, as_json, _show_model)


def _show(result: Any) -> Any:
    done = "would write" if result.dry_run else "written"
    rows = [
        ["format", result.format],
        [done, str(result.output)],
        ["values", f"{result.values:,}"],
        ["bytes", f"{result.bytes:,}"],
    ]
    return table("export", ["", "what"], rows)


def _show_model(result: Any) -> Any:
    rows = [
        ["format", result.format],
        ["would write" if result.dry_run else "written", str(result.output)],
        *([name, f"{size:,} bytes"] for name, size in result.files.items()),
        ["same grid", "yes" if result.exact else "no"],
        ["rounded", result.precision],
        ["weight error", f"{result.max_weight_error:.3%} at most, {result.mean_weight_error:.3%} on average"],
        ["of an update of 2 %", f"{result.max_update_error:.1%} at most"],
        *(["worst layer", f"{e.name} ({e.home}): {e.weight_error:.3%}"] for e in result.worst_layers[:3]),
        *(["note", note] for note in result.notes),
    ]
    return table("export", ["", "what"], rows)
