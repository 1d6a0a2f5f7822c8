"""Say what adapters will cost, for one user or a million, and what training a whole fleet will."""

from typing import Annotated

import typer

from modicum.cli import _plan
from modicum.cli._common import JsonFlag, emit, parse_overrides


def run(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder, a config.json, a hub name, a YAML of shapes, or 'gpt3' (bundled)."
        ),
    ] = None,
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
    users: Annotated[
        int | None, typer.Option(help="How many users: 1 unless given; with --fleet those in users.source.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the stored numbers: float32, float16 or bfloat16.")
    ] = "bfloat16",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the methods, e.g. core=diagonal; repeatable."),
    ] = None,
    fleet: _plan.FleetOption = None,
    changes: _plan.SetOption = None,
    measured: _plan.MeasuredOption = None,
    measure: _plan.MeasureOption = None,
    threads: _plan.ThreadsOption = None,
    rows: _plan.RowsOption = None,
    tokens: _plan.TokensOption = None,
    workers: _plan.WorkersOption = 1,
    per_machine: _plan.PerMachineOption = 1,
    memory: _plan.MemoryOption = None,
    mtbf: _plan.MtbfOption = None,
    prices: _plan.PricesOption = None,
    cpu_hour: _plan.CpuHourOption = None,
    gpu_hour: _plan.GpuHourOption = None,
    gb_month: _plan.GbMonthOption = None,
    currency: _plan.CurrencyOption = None,
    months: _plan.MonthsOption = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Say what adapters of MODEL will cost, by method and rank, without loading a weight.

    Counts the trained numbers, the bytes of one adapter (numbers, container, head), the frozen directions that
    all LoRA-XS adapters of a base model share, and the optimizer's memory while one adapter trains.

    With --fleet: the hours, memory, bytes and money of training an adapter for each user, from what --measured or
    --measure says of its speed.
    """
    faults = _plan.misplaced(ctx, fleet)
    if fleet is not None:
        asked = {
            "users": users, "rows": rows, "tokens": tokens, "workers": workers, "per_machine": per_machine,
            "memory": memory, "mtbf": mtbf, "months": months,
        }  # fmt: skip
        how = {"measured": measured, "measure": measure, "threads": threads}
        priced = {"cpu_hour": cpu_hour, "gpu_hour": gpu_hour, "gb_month": gb_month, "currency": currency}
        plan = _plan.planned(fleet, changes or (), asked, how, prices, priced, faults)
        emit(plan, as_json, _plan.fleet_tables)
        return
    from modicum.errors import ConfigError
    from modicum.models.architecture import parse_targets, read_architecture
    from modicum.models.plan import make_plan

    if model is None:
        faults.append("give a MODEL, or --fleet and the YAML of a fleet")
    if faults or model is None:
        raise ConfigError("; ".join(faults))
    plan = make_plan(
        read_architecture(model, task, num_labels),
        methods=method,
        ranks=rank or [16],
        targets=parse_targets(targets or ["all-linear"]),
        users=1 if users is None else users,
        dtype=dtype,
        options=parse_overrides(option),
    )
    emit(plan, as_json, _plan.adapter_tables)
