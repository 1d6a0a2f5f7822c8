"""Show it all in a few minutes: train, save, reload, merge and export on the model inside modicum."""

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import JsonFlag, emit, table

if TYPE_CHECKING:
    from modicum.train.demo import DemoResult


def run(
    output: Annotated[
        Path | None, typer.Option(help="Keep adapters, merged model and exported LoRA in this folder.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps on a few rows, to see it run.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Fine-tune the base model inside modicum with LoRA-XS, LoRA and VeRA, and compare them.

    Then saves the LoRA-XS adapter, loads it in a new process, merges it, exports it to a standard LoRA, and
    checks that all four forms give the same answers on held-out rows. All adapters end in a store, which a server
    answers two users from. Needs no network and no GPU.
    """
    from modicum.errors import ConfigError
    from modicum.train.demo import run_demo

    if output is not None and output.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty; choose another folder")
    with contextlib.ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="modicum-demo-")))
        result = run_demo(folder, quick=quick, tell=lambda line: typer.echo(line, err=True))
    emit(result, as_json, _show)
    if not result.right:
        raise typer.Exit(1)


def _show(result: "DemoResult") -> list[Any]:
    before = result.before
    title = f"{result.task}: {result.summary} {before['n']} held-out rows"
    rows = [["base model", "", "", "", _share(before), "", ""]]
    rows += [
        [
            m.method, f"{m.values:,}", f"{m.bytes_float32:,}", f"{m.bytes_bfloat16:,}", _share(m.after),
            f"{m.seconds:.0f}", _memory(m.peak_bytes, m.start_bytes),
        ]
        for m in result.methods
    ]  # fmt: skip
    columns = [
        "method", "trained", "bytes float32", "bytes bfloat16", "exactly right [95 %]", "seconds",
        "peak MiB (by training)",
    ]  # fmt: skip
    forms = [
        [
            f.form,
            f"{f.bytes:,}" if f.bytes else "",
            f"{f.exact_match:.1%}",
            f"{f.same_texts} of {f.rows}",
            f"{f.max_logit_difference:.1e}",
        ]
        for f in result.forms
    ]
    verdict = "All four give the same answers." if result.same else "THE ANSWERS DIFFER."
    note = (
        f"{verdict} {result.seconds:.0f} seconds, {result.threads} threads. Peak memory is that of the whole "
        "process, Python and torch included; each method trained in one of its own."
    )
    return [
        table(title, columns, rows),
        table(
            "One LoRA-XS adapter, four ways",
            ["form", "bytes", "exactly right", "same texts", "largest logit difference"],
            forms,
        ),
        note,
        *([_stored(result.stored)] if result.stored else []),
        *_served(result),
        *(f"  {key}: {' '.join(text.split())}" for key, text in result.example.items()),
    ]


def _stored(versions: Any) -> Any:
    rows = [
        [
            str(one),
            f"{one.bytes:,}",
            ", ".join(one.aliases),
            f"{one.metrics['exact_match']:.1%}",
            one.digest[:12],
        ]
        for one in versions
    ]
    title = "What the store holds (modicum store --help)"
    return table(title, ["version", "bytes", "alias", "exactly right", "digest"], rows)


def _served(result: "DemoResult") -> list[Any]:
    if not result.served:
        return ["Not served: pip install 'modicum[serve]'"]
    rows = [
        [one.user, one.model, " ".join(one.answer.split()), "yes" if one.as_offline else "NO"]
        for one in result.served
    ]
    title = f"Two users ask one server: {' '.join(result.prompt.split())}"
    alike = ["Both get THE SAME ANSWER."] if len({one.answer for one in result.served}) < len(rows) else []
    return [table(title, ["user", "model", "answer", "as offline"], rows), *alike]


def _share(measure: dict[str, Any]) -> str:
    return f"{measure['value']:.1%} [{measure['low']:.1%}, {measure['high']:.1%}]"


def _memory(peak: int | None, start: int | None) -> str:
    if peak is None or start is None:
        return ""
    return f"{peak / 2**20:,.0f} ({(peak - start) / 2**20:,.0f})"
