"""`modicum fleet train`: users' rows in, adapters in the store, cohort by cohort; killed at any time, it goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from modicum.data.encoded import Encoded, EncodedRow
from modicum.errors import ConfigError, ModicumError, NotStoredError
from modicum.fleet.base import load_fleet_base
from modicum.fleet.gather import gather
from modicum.fleet.ledger import FILE, Ledger, Outcome, User
from modicum.fleet.pace import steps_of
from modicum.fleet.report import REPORT, summary, write_reports
from modicum.fleet.rows import Prepared, prepare_user
from modicum.fleet.sizing import Sizes, sizes
from modicum.fleet.spec import make_fleet
from modicum.fleet.training import Learner, Learnt, Training, is_better
from modicum.models.loading import quiet_transformers
from modicum.store import Put, Store
from modicum.store.atomic import write_text
from modicum.store.catalogue.publish import prepare as prepared_put
from modicum.store.record import encode
from modicum.train.artifacts import disk_guard, read_json
from modicum.train.yaml_lines import read_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from modicum.fleet.base import FleetBase
    from modicum.fleet.spec import FleetSpec
    from modicum.store.record import Record

SPEC = "fleet.yaml"
#: rows that the memory of a pass is measured with
_SAMPLE = 4


@dataclass(frozen=True)
class Progress:
    """How far a job is; steps are those of single users, planned or made."""

    users: int
    of_users: int
    steps: int
    of_steps: int
    #: since this process began, and steps made in it
    seconds: float
    steps_here: int

    @property
    def adapters_per_hour(self) -> float:
        """Users per hour at the rate of this process."""
        if not self.seconds or not self.of_steps:
            return 0.0
        return 3600 * self.of_users * self.steps_here / self.of_steps / self.seconds

    @property
    def seconds_left(self) -> float:
        """What is left at that rate."""
        return (self.of_steps - self.steps) * self.seconds / self.steps_here if self.steps_here else 0.0


@dataclass(frozen=True)
class FleetResult:
    """A finished job: its folder and its report (`report.json`)."""

    folder: Path
    report: dict[str, Any]
    #: True when it was finished before and nothing had to be done
    reused: bool = False


def train_fleet(
    spec: FleetSpec,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tell: Callable[[Progress], None] = lambda _: None,
) -> FleetResult:
    """The finished job that `spec` describes: adapters of all users in its store, and a report.

    `resume` goes on with an interrupted job, and returns a finished one as it is; `overwrite` starts again. What is
    in the store stays there: a user whose newest version is the same record gets no new one.

    Raises:
        ConfigError: the folder holds another or an unfinished job, or a process works on it; see `load_fleet_base`.
        DataError: there are no users. StoreError: see `Store`. ModicumError: the disk is full.
    """
    folder = spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        finished = _claim(spec, resume=resume, overwrite=overwrite)
        if finished is not None:
            return FleetResult(folder, finished, reused=True)
        return FleetResult(folder, _train(spec, tell))


def _train(spec: FleetSpec, tell: Callable[[Progress], None]) -> dict[str, Any]:
    """The report of the job, begun or gone on with."""
    folder, create = spec.folder, "://" not in spec.store.path
    with (
        disk_guard(folder),
        quiet_transformers(),
        Store(spec.store.path, create=create) as store,
        Ledger(folder) as ledger,
    ):
        # before users' rows are read, which takes longer
        base = load_fleet_base(spec)
        if ledger.fact("gathered") is None:
            gather(spec, ledger, store)
        report = _Job(spec, base, store, ledger, tell).run()
        # before the report, which marks the job as finished
        ledger.forget_rows()
        write_reports(folder, report)
    return report


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other process works on the job in `folder`; the system lets go of it when a process ends.

    Raises:
        ConfigError: another one does.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another process is at work on the fleet in {folder}; wait for it") from error
        yield
    finally:
        os.close(handle)


class _Job:
    """One process at work on a job."""

    def __init__(
        self,
        spec: FleetSpec,
        base: FleetBase,
        store: Store,
        ledger: Ledger,
        tell: Callable[[Progress], None],
    ) -> None:
        self.spec, self.base, self.store, self.ledger, self.tell = spec, base, store, ledger, tell
        self._began = time.perf_counter()
        self._here = self._done = self._users = 0

    def run(self) -> dict[str, Any]:
        """The report, once every cohort is finished."""
        sized = self._sizes()
        cohorts = self._cohorts(sized.users)
        finished = self.ledger.finished()
        weights = {number: self._steps(users) for number, users in cohorts.items()}
        self._of = sum(weights.values())
        self._of_users = sum(len(users) for users in cohorts.values())
        threads = torch.get_num_threads()
        try:
            # the number of threads changes the order of sums, and so the last digits
            torch.set_num_threads(sized.threads)
            past = 0
            for number, users in cohorts.items():
                if number not in finished:
                    began = time.perf_counter()
                    outcomes = self._cohort(users, sized)
                    self.ledger.finish(number, time.perf_counter() - began, outcomes)
                # users at fault make none of the steps that were planned for them
                past += weights[number]
                self._done = past
                self._users += len(users)
                self._say()
        finally:
            torch.set_num_threads(threads)
        return summary(self.spec, self.base, self.ledger, sized)

    def _sizes(self) -> Sizes:
        known = self.ledger.fact("sizes")
        if known is None:
            ranks = self.spec.all_ranks
            width = self.spec.data.max_length
            ids = [self.base.tokenizer.pad_token_id] * width
            target = 0.0 if self.base.task == "seq_cls" else None
            sample = Encoded([EncodedRow(ids, target=target)] * _SAMPLE, class_targets=True)
            known = sizes(self.base, self.spec.train, sample, ranks[-1]).as_dict()
            with self.ledger.change():
                self.ledger.note("sizes", known)
        return Sizes(**known)

    def _cohorts(self, size: int) -> dict[int, list[User]]:
        """All users that train, by number of cohort: those with as many rows, and rows as long, together.

        A function of what was gathered alone, the same in every attempt.
        """
        users = [one for one in self.ledger.users() if one.name is not None]
        users.sort(key=lambda one: (one.rows, one.bytes, one.id))
        return {at // size: users[at : at + size] for at in range(0, len(users), size)}

    def _steps(self, users: Sequence[User]) -> int:
        held = self.spec.users.held_out + self.spec.users.test
        return sum(steps_of(max(1, round(one.rows * (1 - held))), self.spec.train) for one in users)

    def _cohort(self, users: Sequence[User], sized: Sizes) -> list[Outcome]:
        """What became of the users of one cohort, whose adapters are in the store."""
        found = [
            prepare_user(self.ledger.rows_of(one), self.spec, self.base, self.spec.rank_of(one.rows))
            for one in users
        ]
        outcomes = [
            Outcome(one.user, "faulty", {"fault": how.fault, **_known(how)})
            for one, how in zip(users, found, strict=True)
            if how.learner is None
        ]
        able = [(one, how) for one, how in zip(users, found, strict=True) if how.learner is not None]
        if not able:
            return outcomes
        learners = [self._started(one, how) for one, how in able]
        training = Training(self.base, self.spec, learners, sized.tokens)
        learnt = training.run(self._stepped)
        puts: list[tuple[int, Put]] = []
        settled = []
        for slot, ((one, how), mine) in enumerate(zip(able, learnt, strict=True)):
            outcome = Outcome(one.user, self._state(mine), {**_told(mine), **_known(how)})
            if outcome.state == "stored":
                record = self._record(one, mine, training.values[slot], learners[slot].rank)
                if isinstance(record, str):
                    outcome = Outcome(one.user, "faulty", {"fault": record, **outcome.detail})
                else:
                    puts.append((len(settled), self._put(one, how, mine, record)))
            settled.append(outcome)
        for at, version in self._store([put for _, put in puts], [at for at, _ in puts]):
            settled[at].detail["version"] = version
        return outcomes + settled

    def _started(self, user: User, how: Prepared) -> Learner:
        """The learner of a user, with the numbers of its parent where it has one."""
        assert how.learner is not None
        if user.parent is None:
            return how.learner
        record = self.store.get(user.parent)
        kind = self.base.kinds[how.learner.rank].record
        same = (record.method, record.base_fingerprint, record.layout.names, record.layout.shapes) == (
            kind.method, kind.base_fingerprint, kind.layout.names, kind.layout.shapes,
        )  # fmt: skip
        if not same or record.basis_fingerprint != kind.basis_fingerprint:
            how.notes.append(f"{user.parent} is of another kind, so training began anew")
            return how.learner
        return replace(how.learner, start=torch.from_numpy(record.floats().copy()))

    def _state(self, mine: Learnt) -> str:
        judged = mine.before is not None
        if mine.diverged and (not judged or mine.held_out is None):
            return "diverged"
        if not judged:
            return "stored"
        kept = mine.held_out is not None and is_better(mine.held_out, mine.before, self.spec.metric)
        return "stored" if kept else "diverged" if mine.diverged else "base"

    def _record(self, user: User, mine: Learnt, row: torch.Tensor, rank: int) -> Record | str:
        """The adapter of a user as a record, or why it has none."""
        about = {"fleet": self.spec.digest(), "user": user.user, "steps": mine.best_step}
        try:
            record = self.base.record(
                rank, row, self.spec.store.dtype, recipe_digest=self.spec.digest(), metadata=about
            )
            encode(record)
        except ModicumError as error:
            return str(error)
        return record

    def _put(self, user: User, how: Prepared, mine: Learnt, record: Record) -> Put:
        assert user.name is not None
        metrics = {
            f"{part}.{name}": value
            for part, found in (("before", mine.before), ("validation", mine.held_out), ("test", mine.test))
            for name, value in (found or {}).items()
            if name != "n"
        }
        options = self.spec.store
        return Put(
            user.name,
            record,
            parent=user.parent,
            data_digest=how.data_digest,
            seed=self.spec.train.seed,
            metrics=metrics,
            tags=(*options.tags, f"fleet-{self.spec.digest()}"),
            alias=options.alias,
            source=f"fleet {self.spec.folder.name}",
        )

    def _store(self, puts: Sequence[Put], places: Sequence[int]) -> list[tuple[int, str]]:
        """Where each put goes and the version it is; what an interrupted attempt has stored already is found again."""
        known: dict[int, str] = {}
        fresh: list[tuple[int, Put]] = []
        for at, put in zip(places, puts, strict=True):
            try:
                newest = self.store.show(put.name)
            except NotStoredError:
                newest = None
            if newest is not None and newest.digest == prepared_put(put).payload.digest.hex():
                known[at] = str(newest)
            else:
                fresh.append((at, put))
        numbers = self.store.put_many([put for _, put in fresh], batch=max(1, len(fresh)))
        stored = {at: f"{put.name}@{number}" for (at, put), number in zip(fresh, numbers, strict=True)}
        return sorted({**known, **stored}.items())

    def _stepped(self, steps: int) -> None:
        self._here += steps
        self._done += steps
        self._say()

    def _say(self) -> None:
        seconds = time.perf_counter() - self._began
        done = min(self._done, self._of)
        self.tell(Progress(self._users, self._of_users, done, self._of, seconds, self._here))


def _known(how: Prepared) -> dict[str, Any]:
    return {"rows": how.counts, **({"notes": how.notes} if how.notes else {})}


def _told(mine: Learnt) -> dict[str, Any]:
    values = {
        "steps": mine.steps, "best_step": mine.best_step, "before": mine.before, "held_out": mine.held_out,
        "test_before": mine.test_before, "test": mine.test, "losses": mine.losses,
        "stopped_early": mine.stopped_early,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value not in (None, False)}


def _claim(spec: FleetSpec, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """The report of the finished job in the folder if it may be reused, else None with the folder ready.

    Raises:
        ConfigError: the folder holds another, a finished or an unfinished job, and neither flag allows to touch it.
    """
    folder, path = spec.folder, spec.folder / SPEC
    finished = read_json(folder / REPORT)
    if path.is_file() and not overwrite:
        if not resume:
            what = "a finished job" if finished else "an unfinished job"
            way = "--resume to keep it" if finished else "--resume to go on"
            raise ConfigError(f"{folder} holds {what}: {way}, --overwrite to start again, or another output")
        values, _ = read_yaml(path.read_text(encoding="utf-8"), str(path))
        before = make_fleet(values, str(path))
        if before.digest() != spec.digest() or before.store != spec.store:
            changed = _changes(before, spec)
            raise ConfigError(
                f"{folder} was made by another specification ({changed}); run that one, set another output, or use "
                "--overwrite"
            )
        if finished is not None:
            return finished
        return None
    for name in (REPORT, FILE, f"{FILE}-wal", f"{FILE}-shm"):
        (folder / name).unlink(missing_ok=True)
    write_text(path, spec.to_yaml())
    return None


def _changes(before: FleetSpec, now: FleetSpec) -> str:
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name != "output"]
    return "; ".join(f"{name}: {json.dumps(old.get(name))} → {json.dumps(new.get(name))}" for name in names)


def _flat(values: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {path: values}
    parts = [_flat(value, f"{path}.{key}" if path else str(key)) for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}
