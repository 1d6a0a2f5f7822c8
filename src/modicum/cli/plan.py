"""Say what an adapter will cost: numbers, bytes and optimizer memory, for one user or a million."""

from typing import TYPE_CHECKING, Annotated

import typer

from modicum.cli._common import JsonFlag, emit, parse_overrides, size, table

if TYPE_CHECKING:
    from modicum.models.plan import Plan, PlanRow


def run(
    model: Annotated[
        str,
        typer.Argument(
            help="A model folder, a config.json, a hub name, a YAML of shapes, or 'gpt3' (bundled)."
        ),
    ],
    method: Annotated[
        list[str] | None, typer.Option(help="Only this method, e.g. lora_xs, lora, full; repeatable.")
    ] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Rank; repeatable. Default: 16.")] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="Layers: name endings (q_proj,v_proj), a regular expression, or all-linear."),
    ] = None,
    task: Annotated[
        str, typer.Option(help="auto, causal_lm, base, or seq_cls, which counts a head.")
    ] = "auto",
    num_labels: Annotated[
        int | None, typer.Option(help="Classes of the head with --task seq_cls; the config's by default.")
    ] = None,
    users: Annotated[int, typer.Option(help="How many adapters to store.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Type of the stored numbers: float32, float16 or bfloat16.")
    ] = "bfloat16",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the methods, e.g. core=diagonal; repeatable."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what adapters of MODEL will cost, by method and rank, without loading a weight.

    Counts the trained numbers, the bytes of one adapter (numbers, container, head), the frozen directions that
    all LoRA-XS adapters of a base model share, and the optimizer's memory while one adapter trains.
    """
    from modicum.models.architecture import parse_targets, read_architecture
    from modicum.models.plan import make_plan

    plan = make_plan(
        read_architecture(model, task, num_labels),
        methods=method,
        ranks=rank or [16],
        targets=parse_targets(targets or ["all-linear"]),
        users=users,
        dtype=dtype,
        options=parse_overrides(option),
    )
    emit(plan, as_json, _show)


def _show(plan: "Plan") -> list[object]:
    title = f"{plan.model}: {plan.parameters:,} parameters, {plan.adapted_layers} layers, {plan.dtype}"
    names = "method|rank|trained|head|numbers|× smaller than LoRA|container ≤|one user|AdamW"
    parts: list[object] = [table(title, names.split("|"), [_cells(row) for row in plan.rows])]
    if plan.users > 1:
        columns = ["method", "rank", "adapters", "heads", "shared basis, once", "in all"]
        rows = [
            [
                row.method,
                row.rank or "",
                size(plan.users * (row.payload_bytes + row.record_overhead_bytes)),
                size(plan.users * row.head_bytes),
                size(row.basis_bytes),
                size(row.total_bytes),
            ]
            for row in plan.rows
        ]
        parts.append(table(f"{plan.users:,} users", columns, rows))
    frozen = [row for row in plan.rows if row.folder_frozen_bytes]
    parts += [
        f"PEFT adds {size(row.folder_frozen_bytes)} of frozen numbers to every {row.method} folder"
        f"{f' at rank {row.rank}' if row.rank else ''}."
        for row in frozen
    ]
    return parts


def _cells(row: "PlanRow") -> list[object]:
    return [
        row.method,
        row.rank or "",
        f"{row.trained:,}",
        f"{row.head:,}",
        size(row.payload_bytes),
        f"{row.smaller_than_lora:,.4g}",
        size(row.record_overhead_bytes),
        size(row.user_bytes),
        size(row.optimizer_bytes + row.gradient_bytes),
    ]
