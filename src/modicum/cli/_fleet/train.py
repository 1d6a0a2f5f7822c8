"""Training a fleet."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum.cli._common import Advance, JsonFlag, RayFlag, emit, progress
from modicum.cli._fleet._shared import FileArgument, SetOption, loaded, shown


def train(
    file: FileArgument,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the job; that of the file when unset.")
    ] = None,
    changes: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted job.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin the job again; what is in the store stays there.")
    ] = False,
    ray: RayFlag = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: cohorts at a time; 1 when unset.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Train an adapter for every user of FILE and put it into the store, if it is better than the base model.

    Users whose rows cannot be used are reported, and the others go on. Writes report.json, report.md, report.html and
    users.parquet into the job's folder. Killed at any time, --resume goes on and ends with the same store.
    """
    from modicum.errors import ConfigError
    from modicum.fleet.job import Progress, train_fleet

    if resume and overwrite:
        raise ConfigError("--resume keeps what is there, --overwrite starts again: give one of them")
    if workers and not ray:
        raise ConfigError(
            "--workers are for --ray: without it this process trains one cohort after the other"
        )
    spec = loaded(file, changes, output)
    seen = 0, 0
    with contextlib.ExitStack() as stack:
        bar: list[Advance] = []

        def tell(now: Progress) -> None:
            nonlocal seen
            if (now.steps, now.users) == seen:
                return
            # how many steps there are is known with the first call
            bar[:] = bar or [stack.enter_context(progress("steps of users", now.of_steps))]
            rate = f"{now.adapters_per_hour:,.0f} adapters/h, {_clock(now.seconds_left)} left"
            bar[0](now.steps - seen[0], f"({now.users}/{now.of_users} users, {rate})")
            seen = now.steps, now.users

        result = train_fleet(
            spec, resume=resume, overwrite=overwrite, workers=(workers or 1) if ray else None, tell=tell
        )
    emit({"folder": str(result.folder), **result.report}, as_json, _table)


def _table(report: dict[str, Any]) -> list[Any]:
    return [*shown(report), f"wrote {report['folder']}: report.html, report.md, report.json, users.parquet"]


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
