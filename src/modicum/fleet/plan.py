"""What a fleet takes before it is trained: hours, memory, bytes and money, out of counts and of what was measured.

    seconds of a cohort = Σ over kinds of work (how much there is of it · measured seconds of one unit)

How much there is says `work`, pass by pass. How long a unit takes is measured (`measure`), never assumed. How cohorts
share machines, and what failures of these do, says `schedule`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError
from modicum.evaluate.intervals import Measure
from modicum.evaluate.resources import Prices, cost
from modicum.fleet.passes import multiple_on
from modicum.fleet.schedule import makespan, with_failures
from modicum.fleet.sizing import fitting, user_bytes
from modicum.fleet.work import Work, cohorts_of, work_of
from modicum.models.plan import BASIS_BYTES, DTYPE_BYTES, RECORD_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modicum.fleet.rates import Measured
    from modicum.fleet.spec import FleetSpec
    from modicum.fleet.work import UserRows
    from modicum.models.plan import AdapterNumbers

_HOUR, _GIB = 3600.0, 2**30


@dataclass(frozen=True)
class Asked:
    """What a plan is for: how many users on how many machines."""

    #: None: those whose rows there are
    users: int | None = None
    #: rows of a user and tokens of a row, for users whose rows there are not yet
    rows: int | None = None
    tokens: int | None = None
    #: processes like the one that was measured, in all and on a machine
    workers: int = 1
    per_machine: int = 1
    #: GiB of a machine; None: sizes as measured
    memory: float | None = None
    #: hours between two failures of a machine; None: it never fails
    mtbf: float | None = None
    months: float = 1.0

    def faults(self) -> list[str]:
        """Everything that is wrong with it."""
        found = []
        for one in fields(self):
            value = getattr(self, one.name)
            least = 1 if one.name in ("users", "rows", "tokens", "workers", "per_machine") else 0
            # what is no number is not above anything
            if value is not None and not (least <= value < math.inf and value > 0):
                what = "at least 1" if least else "more than 0"
                found.append(f"{_WORDS.get(one.name, one.name)} = {value}, must be {what}")
        if (self.rows is None) != (self.tokens is None):
            found.append("rows of a user and tokens of a row go together: give both, or neither")
        return found


_WORDS = {"per_machine": "workers-per-machine"}


@dataclass(frozen=True)
class Facts:
    """What is known of a base model from its shapes."""

    model: str
    parameters: int
    #: rank -> numbers of its adapters
    ranks: Mapping[int, AdapterNumbers]


@dataclass(frozen=True)
class Failures:
    """What failures of machines do, in the mean."""

    mtbf_hours: float
    #: seconds until a worker trains again
    restart_seconds: float
    cohorts_again: float
    #: hours of workers that are lost, restarts included
    worker_hours: float


@dataclass(frozen=True)
class FleetPlan:
    """What a fleet takes. Sizes in bytes; `hours` are those on the clock, with a 95 % interval where there is one."""

    model: str
    method: str
    ranks: list[int]
    users: int
    #: how many users' rows were counted, and how many of these cannot train
    counted: int
    at_fault: int
    rows_per_user: float
    tokens_per_row: float
    cohort_size: int
    tokens_per_pass: int
    cohorts: int
    work: Work
    adapters: float
    hours: Measure
    #: hours of all workers together by part, without failures
    worker_hours: dict[str, float]
    workers: int
    machines: int
    failures: Failures | None
    #: of one worker, by part; what is not known is left out and noted
    memory: dict[str, int]
    fits: bool | None
    store: dict[str, float]
    basis_bytes: int
    cost: dict[str, Any] | None
    #: the largest part of time, memory, store and cost
    dominates: dict[str, str]
    measured: Measured
    notes: list[str] = field(default_factory=list)


def plan(
    spec: FleetSpec,
    sample: Sequence[UserRows],
    measured: Measured,
    facts: Facts,
    asked: Asked,
    prices: Prices | None = None,
) -> FleetPlan:
    """What the fleet of `spec` takes for `asked.users` users, for whom those of `sample` stand in equal parts."""
    notes = list(measured.notes)
    tokens, size = _sizes(spec, sample, measured, facts, asked, notes)
    time = _time(spec, sample, measured, asked, tokens, size, notes)
    memory = _memory(spec, measured, facts, tokens, size, notes)
    store = _store(spec, sample, measured, facts, time.adapters, notes)
    basis = max(one.basis for one in facts.ranks.values()) * BASIS_BYTES
    costs = None
    if prices is not None:
        # a machine costs as much while its workers wait for the last cohort
        rented = time.hours.value * _HOUR * asked.workers
        gpu = rented if _on_gpu(measured) else None
        used = {"cpu_seconds": rented * measured.threads, "gpu_seconds": gpu}
        costs = cost(used, round(sum(store.values())) + basis, prices, asked.months)
    _compare(spec, measured, time.work, notes)
    rows = sum(one.rows for one in sample)
    parts = {"time": time.parts, "memory": memory, "store": store, "cost": costs["parts"] if costs else {}}
    room = None if asked.memory is None else asked.memory * _GIB / asked.per_machine
    return FleetPlan(
        model=facts.model,
        method=spec.method.name,
        ranks=spec.all_ranks,
        users=asked.users or len(sample),
        counted=len(sample),
        at_fault=sum(not one.train for one in sample),
        rows_per_user=rows / len(sample),
        tokens_per_row=sum(one.tokens for one in sample) / rows if rows else 0.0,
        cohort_size=size,
        tokens_per_pass=tokens,
        cohorts=time.cohorts,
        work=time.work,
        adapters=time.adapters,
        hours=time.hours,
        worker_hours={name: seconds / _HOUR for name, seconds in time.parts.items()},
        workers=asked.workers,
        machines=-(-asked.workers // asked.per_machine),
        failures=time.failures,
        memory=memory,
        fits=None if room is None else sum(memory.values()) <= room,
        store=store,
        basis_bytes=basis,
        cost=costs,
        dominates={what: name for what, values in parts.items() if (name := _largest(values))},
        measured=measured,
        notes=list(dict.fromkeys(notes)),
    )


@dataclass(frozen=True)
class _Time:
    """What is computed, and how long it takes: seconds of all workers by part, hours on the clock."""

    work: Work
    adapters: float
    parts: dict[str, float]
    cohorts: int
    hours: Measure
    failures: Failures | None


def _time(
    spec: FleetSpec,
    sample: Sequence[UserRows],
    measured: Measured,
    asked: Asked,
    tokens: int,
    size: int,
    notes: list[str],
) -> _Time:
    cohorts, count = cohorts_of(sample, size), asked.users or len(sample)
    multiple = multiple_on(measured.device)
    each = [work_of(one, spec.train, tokens, multiple=multiple) for one in cohorts]
    whole, share = sum(each, Work()), count / len(sample)
    amounts = _amounts(whole, measured, share)
    parts = measured.parts(amounts)
    total = math.fsum(parts.values())
    alone = [math.fsum(measured.parts(_amounts(one, measured)).values()) for one in each]
    seconds = _seconds(alone, [len(one) for one in cohorts], count, size, total)
    failures, seconds = _failing(seconds, measured, asked, notes)
    clock, spread = makespan(seconds, asked.workers), measured.spread(amounts)
    # what is not known of a unit is not known of the whole, in the same proportion
    half = None if spread is None or not total else clock * spread / total
    hours = Measure(
        clock / _HOUR,
        None if half is None else max(0.0, clock - half) / _HOUR,
        None if half is None else (clock + half) / _HOUR,
        min(len(rate.work) for rate in measured.rates.values()),
        "t",
    )
    return _Time(whole.times(share), amounts["adapters"], parts, len(seconds), hours, failures)


def _sizes(
    spec: FleetSpec,
    sample: Sequence[UserRows],
    measured: Measured,
    facts: Facts,
    asked: Asked,
    notes: list[str],
) -> tuple[int, int]:
    """Tokens of a pass and users of a cohort: those of the specification, what fits, or those that were measured."""
    options = spec.train
    tokens = options.tokens_per_pass or measured.tokens_per_pass
    if asked.memory is None:
        return tokens, options.cohort_size or measured.cohort_size
    kind = "cuda" if _on_gpu(measured) else "cpu"
    if measured.token_bytes is None and options.tokens_per_pass is None:
        notes.append(
            f"what a token takes in memory was not measured, so a pass is of {tokens} tokens as there"
        )
        options = options.model_copy(update={"tokens_per_pass": tokens})
    taken = _base(spec, measured, facts) + (measured.process_bytes or 0)
    free = max(0, int(asked.memory * _GIB / asked.per_machine) - taken)
    longest = max((max((*one.train, *one.held_out, *one.test), default=1) for one in sample), default=1)
    numbers = max(one.trained for one in facts.ranks.values())
    return fitting(options, kind, free, numbers, measured.token_bytes, longest)


def _amounts(work: Work, measured: Measured, times: float = 1.0) -> dict[str, float]:
    """How much there is to do by unit; what has no rate of its own takes as long as training does."""
    names = ("all_tokens", "tokens", "look_tokens", "users", "steps")
    found = {name: getattr(work, name) * times for name in names}
    if "look_tokens" not in measured.rates:
        found["tokens"] += found["look_tokens"]
    return {**found, "adapters": found["users"] * measured.stored}


def _seconds(
    alone: Sequence[float], sizes: Sequence[int], count: int, size: int, total: float
) -> list[float]:
    """Seconds of every cohort of all users, in the order of the job: those of the counted cohorts, repeated."""
    number = -(-count // size)
    found = []
    for at in range(number):
        like = at * len(alone) // number
        users = min(size, count - at * size)
        found.append(alone[like] * users / sizes[like])
    # where the last cohort stands for another share of users than it has
    off = total / math.fsum(found) if math.fsum(found) else 1.0
    return [one * off for one in found]


def _failing(
    seconds: list[float], measured: Measured, asked: Asked, notes: list[str]
) -> tuple[Failures | None, list[float]]:
    if asked.mtbf is None:
        return None, seconds
    if measured.start is None:
        notes.append(
            "how long a worker takes to start was not measured; after a failure it counts as nothing"
        )
    restart, mtbf = measured.start or 0.0, asked.mtbf * _HOUR
    if max(seconds, default=0.0) > 100 * mtbf:
        raise ConfigError(
            f"a cohort takes {max(seconds) / _HOUR:.3g} hours and a machine fails every {asked.mtbf:g}: none would be "
            "finished; take smaller cohorts (train.cohort_size)"
        )
    found = [with_failures(one, mtbf, restart) for one in seconds]
    longer = [one for one, _ in found]
    lost = (math.fsum(longer) - math.fsum(seconds)) / _HOUR
    return Failures(asked.mtbf, restart, math.fsum(again for _, again in found), lost), longer


def _base(spec: FleetSpec, measured: Measured, facts: Facts) -> int:
    """Bytes of the base model with the directions in its layers."""
    if measured.base_bytes is not None:
        return measured.base_bytes
    width = DTYPE_BYTES.get(spec.model.dtype, 4)
    return width * (facts.parameters + sum(one.directions for one in facts.ranks.values()))


def _memory(
    spec: FleetSpec, measured: Measured, facts: Facts, tokens: int, size: int, notes: list[str]
) -> dict[str, int]:
    numbers = max(one.trained for one in facts.ranks.values())
    found = {"base model": _base(spec, measured, facts), "users of a cohort": size * user_bytes(numbers)}
    if measured.token_bytes is None:
        notes.append("memory: without that of a pass, which was not measured")
    else:
        found["a pass"] = round(tokens * max(measured.token_bytes, measured.token_grown or 0.0))
    if measured.process_bytes is None:
        notes.append("memory: without that of the process and its libraries, which was not measured")
    else:
        found["process and libraries"] = measured.process_bytes
    return found


def _store(
    spec: FleetSpec,
    sample: Sequence[UserRows],
    measured: Measured,
    facts: Facts,
    adapters: float,
    notes: list[str],
) -> dict[str, float]:
    able = [one for one in sample if one.train]
    numbers = sum(facts.ranks[one.rank].trained for one in able) / max(1, len(able))
    container = measured.container_bytes
    if container is None:
        notes.append(
            f"store: containers were not measured and count {RECORD_BYTES} bytes each, the most there can be"
        )
        container = RECORD_BYTES
    found = {
        "numbers": adapters * numbers * DTYPE_BYTES[spec.store.dtype],
        "containers": adapters * container,
    }
    if measured.index_bytes is None:
        notes.append("store: without index and log, which were not measured")
    else:
        found["index and log"] = adapters * measured.index_bytes
    return found


def _compare(spec: FleetSpec, measured: Measured, work: Work, notes: list[str]) -> None:
    """Notes on what was measured otherwise than it is planned.

    Raises:
        ConfigError: another method was measured.
    """
    rates, patience = measured.rates, spec.train.early_stopping_patience
    if measured.method != spec.method.name:
        raise ConfigError(
            f"{measured.what}: that was {measured.method}, not {spec.method.name}; measure it again"
        )
    if measured.model != spec.model.name_or_path:
        notes.append(f"measured on the model {measured.model}: hours hold for models of its size")
    if measured.ranks != tuple(spec.all_ranks):
        notes.append(f"measured at rank {', '.join(map(str, measured.ranks))}")
    if "tokens" in rates and "look_tokens" not in rates and work.look_tokens:
        notes.append(
            "rows to judge by were not measured: their tokens count as those that train, the most they can"
        )
    if patience and "tokens" in rates:
        notes.append("early stopping is not counted: this is the most it can take")
    elif measured.early_stopping != patience:
        notes.append(
            f"measured with train.early_stopping_patience = {measured.early_stopping}, planned with {patience}"
        )
    if "steps" in rates:
        notes.append("tokens of the measured rows are not known: hours hold for rows as long as those")


def _largest(values: Mapping[str, float | None]) -> str:
    known = {name: value for name, value in values.items() if value}
    if not known:
        return ""
    name = max(known, key=lambda one: known[one] or 0.0)
    return f"{name} ({(known[name] or 0.0) / math.fsum(v or 0.0 for v in known.values()):.0%})"


def _on_gpu(measured: Measured) -> bool:
    return measured.device.startswith("cuda")
