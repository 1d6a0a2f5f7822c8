"""How fast a fleet is on this machine: some seconds of its real passes, and its records in a store."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from modicum.evaluate.memory import weight_bytes
from modicum.evaluate.resources import reset_peaks, resident_peak
from modicum.fleet.base import load_fleet_base
from modicum.fleet.cohort import Cohort
from modicum.fleet.gather import name_of
from modicum.fleet.pace import Pace
from modicum.fleet.passes import multiple_on, passes
from modicum.fleet.rates import Measured, Rate
from modicum.fleet.sizing import longest_rows, sizes, token_bytes
from modicum.fleet.work import padded
from modicum.models.loading import quiet_transformers
from modicum.models.plan import DTYPE_BYTES
from modicum.store import Put, Store
from modicum.store.catalogue.publish import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from modicum.data.encoded import Encoded
    from modicum.fleet.base import FleetBase
    from modicum.fleet.passes import Pass
    from modicum.fleet.sample import Sample
    from modicum.fleet.spec import FleetSpec
    from modicum.fleet.training import Learner
    from modicum.fleet.work import UserRows

    Chosen = Sequence[tuple[UserRows, Learner]]
    Calls = Iterator[tuple[int, Callable[[], object]]]

#: samples that a rate is made of at least, and the share of the time that training gets
_LEAST, _TRAINING = 4, 0.7
#: records that bytes are measured with, at most so many bytes of them, and how many are put at a time
RECORDS, _MOST_BYTES, _BATCH = 512, 1 << 26, 64
#: records with which index and log grow by pages enough to tell
_ENOUGH = 128


def measured_here(spec: FleetSpec, sample: Sample, seconds: float) -> Measured:
    """How fast a cohort of `sample` is on this machine, from about so many seconds of its passes.

    Its rates are those of tokens in training, tokens to judge by, users read and adapters stored.

    Raises:
        See `load_fleet_base`.
    """
    began = time.perf_counter()
    with quiet_transformers():
        base = load_fleet_base(spec)
    start = time.perf_counter() - began
    own = weight_bytes(base.model)
    before = psutil.Process().memory_info().rss
    reset_peaks()
    rows = longest_rows(base, spec.data.max_length)
    sized = sizes(base, spec.train, rows, spec.all_ranks[-1])
    few = min(sized.users, len(sample.learners))
    chosen = [sample.learners[(2 * at + 1) * len(sample.learners) // (2 * few)] for at in range(few)]
    cohort = Cohort(base, [one.rank for _, one in chosen], weight_decay=spec.train.weight_decay)
    rates = {"tokens": _timed(_training(cohort, spec, chosen, sized.tokens), _TRAINING * seconds)}
    judged = {slot: part for slot, (_, one) in enumerate(chosen) if (part := one.held_out or one.test)}
    if judged:
        rates["look_tokens"] = _timed(_looking(cohort, judged, sized.tokens), (1 - _TRAINING) * seconds)
    grown = beside = None
    if base.device.type == "cpu":
        # also what kernels take, and what the allocator does not give back
        grown = max(0, (resident_peak() or before) - before) / max(max(rate.work) for rate in rates.values())
        beside = max(0, before - own)
    if sample.reading is not None:
        rates["users"] = sample.reading
    puts = _puts(base, cohort, spec, chosen)
    record, index, rates["adapters"] = bytes_each(puts)
    numbers = sum(base.kinds[one.rank].record.layout.size for _, one in chosen) / few
    return Measured(
        what=f"{seconds:g} seconds of passes of {few} users",
        model=spec.model.name_or_path,
        method=spec.method.name,
        ranks=tuple(spec.all_ranks),
        device=str(base.device),
        threads=sized.threads,
        tokens_per_pass=sized.tokens,
        cohort_size=sized.users,
        rates=rates,
        start=start,
        token_bytes=sized.token_bytes or token_bytes(base, {0: rows}, spec.all_ranks[-1]),
        token_grown=grown,
        base_bytes=own,
        process_bytes=beside,
        container_bytes=record - numbers * DTYPE_BYTES[spec.store.dtype],
        index_bytes=index,
        early_stopping=spec.train.early_stopping_patience,
        notes=() if sample.reading else ("reading rows was not measured: there are none yet",),
    )


def bytes_each(puts: Sequence[Put]) -> tuple[float, float | None, Rate]:
    """Bytes of one record, and of index and log for it (None if too few), and how long putting takes.

    Files have a size before there is anything in them, so what counts is by how much the second half makes them grow.
    """
    work, took, size = [], [], [0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "store"
        for half in (puts[: len(puts) // 2], puts[len(puts) // 2 :]):
            with Store(place, create=True) as store:
                for at in range(0, len(half), _BATCH):
                    part, began = half[at : at + _BATCH], time.perf_counter()
                    store.put_many(part, batch=len(part))
                    took.append(time.perf_counter() - began)
                    work.append(len(part))
            # closed, so that what is in the write-ahead log has gone into the index
            size.append(sum(file.stat().st_size for file in place.rglob("*") if file.is_file()))
    records = [len(prepare(put).payload.data) for put in puts[len(puts) // 2 :]]
    each = sum(records) / len(records)
    index = max(0.0, (size[2] - size[1]) / len(records) - each)
    # of a few, whole pages would be counted
    return each, index if len(records) >= _ENOUGH else None, Rate(tuple(work), tuple(took))


def enough(record_bytes: float) -> int:
    """How many records of a size the bytes are measured with."""
    return int(max(4, min(RECORDS, _MOST_BYTES // record_bytes)))


def _training(cohort: Cohort, spec: FleetSpec, chosen: Chosen, tokens: int) -> Calls:
    """(tokens, call) of one training pass after the other, of steps that change nothing; without an end."""
    data = {slot: one.train for slot, (_, one) in enumerate(chosen)}
    lengths = {slot: rows.lengths for slot, rows in data.items()}
    paces = {slot: Pace(len(rows), spec.train) for slot, rows in data.items()}
    for step in itertools.count():
        wanted = {slot: pace.batch(step % pace.steps) for slot, pace in paces.items()}
        for one in passes(wanted, lambda slot, row: lengths[slot][row], tokens):
            rates = [0.0] * len(one.slots)
            yield (
                _padded(one, lengths, cohort),
                lambda one=one, rates=rates: cohort.step(one, data, rates, spec.train.max_grad_norm),
            )


def _looking(cohort: Cohort, data: Mapping[int, Encoded], tokens: int) -> Calls:
    """(tokens, call) of one forward pass after the other; without an end."""
    lengths = {slot: rows.lengths for slot, rows in data.items()}
    wanted = {slot: range(len(rows)) for slot, rows in data.items()}
    while True:
        for one in passes(wanted, lambda slot, row: lengths[slot][row], tokens, may_split=True):
            yield _padded(one, lengths, cohort), lambda one=one: cohort.measure(one, data)


def _padded(one: Pass, lengths: Mapping[int, Sequence[int]], cohort: Cohort) -> int:
    return padded(one, lengths, multiple_on(cohort.base.device.type))


def _timed(calls: Calls, seconds: float) -> Rate:
    """How long calls take, one after the other, for about so many seconds; the first one, which warms up, apart."""
    next(calls)[1]()
    work, took = [], []
    end = time.perf_counter() + seconds
    for amount, call in calls:
        began = time.perf_counter()
        call()
        work.append(amount)
        took.append(time.perf_counter() - began)
        if time.perf_counter() >= end and len(work) >= _LEAST:
            break
    return Rate(tuple(work), tuple(took))


def _puts(base: FleetBase, cohort: Cohort, spec: FleetSpec, chosen: Chosen) -> list[Put]:
    """Adapters as the job puts them, of as many users as the store is measured with; values do not matter."""
    parts = ("before", "validation", *(("test",) if spec.users.test else ()))
    names = ("loss", "token_accuracy") if base.task == "causal_lm" else ("loss", "accuracy")
    # as many digits as measured ones have
    metrics = {f"{part}.{name}": math.pi for part in parts for name in names} if spec.users.held_out else {}
    found, digest = [], spec.digest()
    largest = base.widest.record.layout.size * DTYPE_BYTES[spec.store.dtype]
    for at in range(enough(largest)):
        (rows, learner), slot = chosen[at % len(chosen)], at % len(chosen)
        user = rows.user if at < len(chosen) else f"{rows.user}-{at}"
        about = {"fleet": digest, "user": user, "steps": Pace(len(learner.train), spec.train).steps}
        record = base.record(
            learner.rank, cohort.values[slot], spec.store.dtype, recipe_digest=digest, metadata=about
        )
        found.append(
            Put(
                name_of(user, spec.store.name),
                record,
                data_digest="0" * 32,
                seed=spec.train.seed,
                metrics=metrics,
                tags=(*spec.store.tags, f"fleet-{digest}"),
                alias=spec.store.alias,
                source=f"fleet {spec.folder.name}",
            )
        )
    return found
