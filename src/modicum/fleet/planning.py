"""`modicum plan --fleet`: a fleet's YAML and a measurement in, what it takes out; everything wrong is said at once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from modicum.errors import ConfigError, ModicumError
from modicum.evaluate.resources import Prices
from modicum.fleet.finished import read_measured
from modicum.fleet.measure import measured_here
from modicum.fleet.plan import Facts, plan
from modicum.fleet.sample import alike, sampled
from modicum.fleet.spec import load_fleet
from modicum.models.architecture import read_architecture
from modicum.models.plan import adapter_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from modicum.fleet.plan import Asked, FleetPlan
    from modicum.fleet.spec import FleetSpec

T = TypeVar("T")


def plan_fleet(
    file: Path,
    changes: Sequence[str],
    asked: Asked,
    *,
    measured: Path | None = None,
    measure: float | None = None,
    threads: int | None = None,
    prices: Mapping[str, Any] | None = None,
    faults: Sequence[str] = (),
) -> FleetPlan:
    """What the fleet in `file`, with `changes` as of `load_fleet`, takes.

    `measured`: where it is written how fast a fleet was; or `measure`: seconds in which to find out here, on so many
    `threads`. `prices`: as of `Prices`. `faults`: what the caller has found wrong already.

    Raises:
        ConfigError: everything that is wrong with all of it. DataError: there are no users.
    """
    found = [*faults, *asked.faults()]

    def tried(action: Callable[[], T]) -> T | None:
        try:
            return action()
        except ModicumError as error:
            found.append(str(error))
            return None

    spec = tried(lambda: load_fleet(file, changes))
    facts = None if spec is None else tried(lambda: facts_of(spec))
    priced = tried(lambda: Prices.of(prices)) if prices else None
    if priced is not None and priced.kwh is not None:
        found.append(
            "kwh: a plan does not know what energy a fleet will take; `modicum cost` counts what one took"
        )
    known = None if measured is None else tried(lambda: read_measured(measured))
    found += _measure_faults(measured, measure, threads, known.threads if known else None)
    if asked.rows is not None and asked.users is None:
        found.append("users: how many? With rows and tokens given there are none to count")
    if found or spec is None or facts is None:
        raise ConfigError("\n".join(found))
    if asked.rows is not None and asked.tokens is not None and asked.users is not None:
        sample = alike(spec, asked.rows, asked.tokens, asked.users)
    else:
        sample = sampled(spec)
    if known is None:
        assert measure is not None
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads or before)
            known = measured_here(spec, sample, measure)
        finally:
            torch.set_num_threads(before)
    users = asked.users or sample.count
    return plan(spec, sample.users, known, facts, replace(asked, users=users), priced)


def facts_of(spec: FleetSpec) -> Facts:
    """What the shapes of the base model of `spec` say; no weight is loaded.

    Raises:
        ConfigError: there is no such model. TargetError: targets or a rank that do not fit it.
    """
    architecture = read_architecture(spec.model.name_or_path, spec.model.task, spec.num_labels)
    name, options = spec.method.name, spec.method.options
    ranks = {rank: adapter_numbers(name, architecture, rank, options) for rank in spec.all_ranks}
    return Facts(spec.model.name_or_path, architecture.parameters, ranks)


def _measure_faults(
    measured: Path | None, measure: float | None, threads: int | None, known: int | None
) -> list[str]:
    found = []
    if (measured is None) == (measure is None):
        found.append(
            "give either measured (a job's folder, its report.json or a plan's JSON) or measure (seconds to try it "
            "here): hours come from what was measured and from nothing else"
        )
    # what is no number is not above 0
    if measure is not None and not 0 < measure < float("inf"):
        found.append(f"measure = {measure}, must be more than 0 seconds")
    if threads is not None and threads < 1:
        found.append(f"threads = {threads}, must be at least 1")
    elif threads is not None and known not in (None, threads):
        found.append(f"threads = {threads}, but it was measured with {known}: measure it again")
    return found
