"""Time models side by side: prefill and decode apart, against a baseline in the same run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, jsonable, progress, size, table

if TYPE_CHECKING:
    from modicum.evaluate.latency import Latency, Spread


def run(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Models to time: folders (dense, sparse, quantized, extracted), hub names, 'embedded', adapter "
            "folders that name their base model, or with --random a config.json."
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What the others are compared with: one of the models or adapters, or another model. Unset: the base "
            "model that an extracted or quantized folder or an adapter was made from."
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Time the first model with this adapter, unmerged, too. Repeatable."),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    generate: Annotated[int, typer.Option(help="Tokens to decode after it; 0 for prefill only.")] = 32,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    repeats: Annotated[int, typer.Option(help="Turns of each model that are timed.")] = 9,
    warm_up: Annotated[int, typer.Option("--warm-up", help="Turns before them that are not.")] = 2,
    threads: Annotated[int | None, typer.Option(help="Threads on the processor; unset: torch's own.")] = None,
    dtype: Annotated[str, typer.Option(help="Number type: bfloat16, float32, float16 or auto.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    random: Annotated[
        bool, typer.Option("--random", help="Give configurations without weights random ones.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="A JSON file for all that was measured.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Time MODELS in turns, reading a prompt and decoding apart, and compare each with the baseline.

    Also gives the bytes of each model's weights and what a pass takes beside them.
    """
    from modicum.evaluate.arms import bench

    with progress("turns") as advance:
        found = bench(
            models,
            baseline=baseline,
            adapters=adapter or (),
            random=random,
            dtype=dtype,
            device=device,
            advance=advance,
            prompt=prompt,
            generate=generate,
            batch=batch,
            repeats=repeats,
            warm_up=warm_up,
            threads=threads,
        )
    if output is not None:
        import json

        from modicum.store.atomic import write_text

        write_text(output, json.dumps(jsonable(found), indent=2) + "\n")
    emit(found, as_json, _show)


def _show(found: "Latency") -> Any:
    rows = [
        [
            model.name,
            model.dtype,
            _seconds(model.prefill),
            f"{found.batch * found.prompt / model.prefill.median:,.0f}",
            _seconds(model.decode),
            "" if model.decode is None else f"{found.batch / model.decode.median:,.1f}",
            size(model.weight_bytes),
            size(model.working_bytes),
        ]
        for model in found.models
    ]
    columns = [
        "model",
        "dtype",
        "prefill ms (quartiles)",
        "tokens/s",
        "decode ms/token (quartiles)",
        "tokens/s",
    ]
    title = (
        f"prompt {found.prompt}, generate {found.generate}, batch {found.batch}; median of {found.repeats} turns, "
        f"{found.machine.threads} threads of {found.machine.processor}, {found.machine.device}"
    )
    return [
        table(title, [*columns, "weights", "beside them"], rows),
        *found.sentences,
        *(f"note: {n}" for n in found.notes),
    ]


def _seconds(spread: "Spread | None") -> str:
    if spread is None:
        return ""
    return f"{spread.median * 1e3:.3g} ({spread.low * 1e3:.3g} to {spread.high * 1e3:.3g})"
