"""What `modicum plan` shows, and what it takes with `--fleet`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modicum.cli._common import read_prices, size, table

if TYPE_CHECKING:
    from modicum.fleet.plan import FleetPlan
    from modicum.models.plan import Plan, PlanRow

FleetOption = Annotated[
    Path | None, typer.Option("--fleet", help="The YAML of a fleet: say what training it takes.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="A value in place of the fleet's, e.g. method.r=8; repeatable."),
]
MeasuredOption = Annotated[
    Path | None,
    typer.Option(help="How fast a fleet was: a job's folder, its report.json, or a plan's JSON."),
]
MeasureOption = Annotated[
    float | None, typer.Option(help="Seconds in which to find out here how fast this fleet is.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads of a worker, for --measure.")]
RowsOption = Annotated[
    int | None, typer.Option(help="Rows of a user, where users.source is not there yet; with --tokens.")
]
TokensOption = Annotated[int | None, typer.Option(help="Tokens of such a row.")]
WorkersOption = Annotated[int, typer.Option(help="Processes that train, each like the measured one.")]
PerMachineOption = Annotated[int, typer.Option("--workers-per-machine", help="How many share a machine.")]
MemoryOption = Annotated[
    float | None, typer.Option(help="GiB of a machine, which sizes cohorts; as measured when unset.")
]
MtbfOption = Annotated[
    float | None, typer.Option(help="Hours between two failures of a machine; none when unset.")
]
PricesOption = Annotated[
    Path | None, typer.Option(help="A YAML of prices, as of `modicum cost`, by the names of these options.")
]
CpuHourOption = Annotated[float | None, typer.Option(help="Price of an hour of a processor core.")]
GpuHourOption = Annotated[float | None, typer.Option(help="Price of an hour of a GPU.")]
GbMonthOption = Annotated[float | None, typer.Option(help="Price of 10⁹ bytes stored for a month.")]
CurrencyOption = Annotated[str | None, typer.Option(help="What the prices are in.")]
MonthsOption = Annotated[float, typer.Option(help="How long adapters are stored.")]

#: options that need --fleet, and those that a fleet's YAML has instead
WITH_FLEET = (
    "changes", "measured", "measure", "threads", "rows", "tokens", "workers", "per_machine", "memory", "mtbf",
    "prices", "cpu_hour", "gpu_hour", "gb_month", "currency", "months",
)  # fmt: skip
WITHOUT_FLEET = ("model", "method", "rank", "targets", "task", "num_labels", "dtype", "option")
_SHOWN = {"changes": "--set", "per_machine": "--workers-per-machine", "model": "MODEL"}


def misplaced(ctx: typer.Context, fleet: Path | None) -> list[str]:
    """What is wrong with options that were given beside, or without, `--fleet`."""
    others = WITHOUT_FLEET if fleet is not None else WITH_FLEET
    given = {name for name in others if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    names = [_SHOWN.get(name, f"--{name.replace('_', '-')}") for name in others if name in given]
    if not names:
        return []
    if fleet is None:
        return [f"{', '.join(names)}: only with --fleet"]
    return [f"{', '.join(names)}: not with --fleet, whose YAML says it; --set changes that"]


def planned(
    fleet: Path,
    changes: Sequence[str],
    asked: Mapping[str, Any],
    how: Mapping[str, Any],
    prices: Path | None,
    priced: Mapping[str, Any],
    faults: Sequence[str],
) -> "FleetPlan":
    """The plan of the fleet in a YAML file; what is wrong with prices is said with everything else."""
    from modicum.errors import ConfigError
    from modicum.fleet.plan import Asked
    from modicum.fleet.planning import plan_fleet

    found, costs = list(faults), None
    try:
        costs = read_prices(prices, priced)
    except ConfigError as error:
        found.append(str(error))
    return plan_fleet(fleet, changes, Asked(**asked), **how, prices=costs, faults=found)


def fleet_tables(plan: "FleetPlan") -> list[Any]:
    """The table of a fleet's plan, what it was measured on, and notes."""
    work, hours, failures = plan.work, plan.hours, plan.failures
    title = f"{plan.users:,} users: {plan.model}, {plan.method}, rank {', '.join(map(str, plan.ranks))}"
    interval = "" if hours.low is None else f" [{_number(hours.low)}, {_number(hours.high or 0.0)}]"
    on = f"{_count(plan.workers, 'worker')}, {_count(plan.machines, 'machine')}"
    rows = [
        ["counted on", f"{plan.counted:,} users of {plan.rows_per_user:.1f} rows of {plan.tokens_per_row:.1f} tokens"],
        ["cohorts", f"{plan.cohorts:,} of {plan.cohort_size:,} users, passes of {plan.tokens_per_pass:,} tokens"],
        ["steps of users", f"{work.steps:,}"],
        ["passes", f"{work.passes:,} that train, {work.looks:,} that look"],
        ["tokens", f"{work.tokens:,} and {work.look_tokens:,}"],
        ["hours", f"{_number(hours.value)}{interval} on {on}"],
        *[[f"worker hours: {name}", _number(value)] for name, value in plan.worker_hours.items()],
    ]  # fmt: skip
    if failures is not None:
        again, lost = _number(failures.cohorts_again), _number(failures.worker_hours)
        often = f"one every {failures.mtbf_hours:g} hours on a machine"
        rows.append(["failures", f"{again} cohorts again, {lost} worker hours, {often}"])
    fits = {None: "", True: ", fits", False: ", DOES NOT FIT"}[plan.fits]
    rows.append(["memory of a worker", f"{size(sum(plan.memory.values()))}{fits}: {_sizes(plan.memory)}"])
    rows.append(["store", f"{size(sum(plan.store.values()))}: {_sizes(plan.store)}"])
    rows.append(["shared basis", f"{size(plan.basis_bytes)}, once for every machine"])
    if plan.cost is not None:
        parts = [f"{name} {_number(value)}" for name, value in plan.cost["parts"].items() if value]
        rows.append(["cost", f"{_number(plan.cost['amount'])} {plan.cost['currency']}: {', '.join(parts)}"])
    rows += [[f"most {what}", name] for what, name in plan.dominates.items()]
    lines = [
        f"measured: {plan.measured.what}, {_count(plan.measured.threads, 'thread')}, {plan.measured.device}"
    ]
    return [table(title, ["", "what it takes"], rows), *lines, *plan.notes]


def _sizes(parts: Any) -> str:
    return ", ".join(f"{name} {size(value)}" for name, value in parts.items())


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def adapter_tables(plan: "Plan") -> list[object]:
    """The tables of a plan of adapters."""
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
