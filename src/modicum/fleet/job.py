"""`modicum fleet train`: users' rows in, adapters in the store, cohort by cohort; killed at any time, it goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modicum.errors import ConfigError
from modicum.fleet.gather import gather
from modicum.fleet.ledger import FILE, Ledger
from modicum.fleet.pace import steps_of
from modicum.fleet.places import Elsewhere, Here
from modicum.fleet.report import REPORT, summary, write_reports
from modicum.fleet.sample import in_order
from modicum.fleet.sizing import Sizes
from modicum.fleet.spec import make_fleet
from modicum.jobs.cluster import Cluster, require_ray
from modicum.models.loading import quiet_transformers
from modicum.store import Store
from modicum.store.atomic import write_text
from modicum.train.artifacts import disk_guard, read_json
from modicum.train.yaml_lines import read_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from modicum.fleet.ledger import User
    from modicum.fleet.places import Place
    from modicum.fleet.spec import FleetSpec

SPEC = "fleet.yaml"


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
    workers: int | None = None,
    tell: Callable[[Progress], None] = lambda _: None,
) -> FleetResult:
    """The finished job that `spec` describes: adapters of all users in its store, and a report.

    `resume` goes on with an interrupted job, and returns a finished one as it is; `overwrite` starts again. What is
    in the store stays there: a user whose newest version is the same record gets no new one. With `workers` so many
    cohorts at a time are trained on Ray (see `Cluster`), otherwise one in this process; a job may change between them.

    Raises:
        ConfigError: the folder holds another or an unfinished job, or a process works on it; see `load_fleet_base`.
        DataError: there are no users. StoreError: see `Store`. ModicumError: the disk is full, or a cohort failed on
            Ray. MissingExtraError: `workers` without Ray.
    """
    if workers is not None:
        require_ray()
    folder = spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        finished = _claim(spec, resume=resume, overwrite=overwrite)
        if finished is not None:
            return FleetResult(folder, finished, reused=True)
        return FleetResult(folder, _train(spec, workers, tell))


def _train(spec: FleetSpec, workers: int | None, tell: Callable[[Progress], None]) -> dict[str, Any]:
    """The report of the job, begun or gone on with."""
    folder, create = spec.folder, "://" not in spec.store.path
    with (
        disk_guard(folder),
        quiet_transformers(),
        Store(spec.store.path, create=create) as store,
        Ledger(folder) as ledger,
    ):
        job = _Job(spec, ledger, tell)
        known = ledger.fact("sizes")
        sized = None if known is None else Sizes(**known)
        with _place(spec, store, workers, sized, job.stepped) as place:
            # before users' rows are read, which takes longer
            sized, about = place.prepare(sized)
            with ledger.change():
                ledger.note("sizes", sized.as_dict())
                # also for who asks how fast an unfinished job is
                ledger.note("about", about)
            if ledger.fact("gathered") is None:
                gather(spec, ledger, store)
            job.run(place, sized)
        report = summary(spec, about, ledger, sized)
        # before the report, which marks the job as finished
        ledger.forget_rows()
        write_reports(folder, report)
    return report


@contextlib.contextmanager
def _place(
    spec: FleetSpec, store: Store, workers: int | None, sized: Sizes | None, stepped: Callable[[int], None]
) -> Iterator[Place]:
    """Where cohorts are trained; a job that goes on keeps the threads it began with."""
    if workers is None:
        yield Here(spec, store, stepped)
        return
    with Cluster(workers, sized and sized.threads) as pool:
        yield Elsewhere(spec, store, pool)


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
    """One process in charge of a job."""

    def __init__(self, spec: FleetSpec, ledger: Ledger, tell: Callable[[Progress], None]) -> None:
        self.spec, self.ledger, self.tell = spec, ledger, tell
        self._began = time.perf_counter()
        self._here = self._done = self._users = self._of = self._of_users = 0

    def run(self, place: Place, sized: Sizes) -> None:
        """Returns when every cohort is finished."""
        cohorts, finished = self._cohorts(sized.users), self.ledger.finished()
        weights = {number: self._steps(users) for number, users in cohorts.items()}
        self._of = sum(weights.values())
        self._of_users = sum(map(len, cohorts.values()))
        past = self._done = sum(weights[number] for number in finished)
        self._users = sum(len(cohorts[number]) for number in finished)
        # rows are read when it is a cohort's turn
        left = (
            (number, [(one, self.ledger.rows_of(one)) for one in users])
            for number, users in cohorts.items()
            if number not in finished
        )
        threads = torch.get_num_threads()
        self._began = last = time.perf_counter()
        self._say()
        try:
            # the number of threads changes the order of sums, and so the last digits
            torch.set_num_threads(sized.threads)
            for number, found in place.finish(left, sized.tokens):
                now = time.perf_counter()
                self.ledger.finish(number, found, now - last)
                last = now
                # users at fault make none of the steps that were planned for them, and others tell of none
                past += weights[number]
                self._here += max(0, past - self._done)
                self._done = past
                self._users += len(cohorts[number])
                self._say()
        finally:
            torch.set_num_threads(threads)

    def stepped(self, steps: int) -> None:
        """Told of steps that were made, or are not made any more."""
        self._here += steps
        self._done += steps
        self._say()

    def _cohorts(self, size: int) -> dict[int, list[User]]:
        """All users that train, by number of cohort: those with as many rows, and rows as long, together.

        A function of what was gathered alone, the same in every attempt.
        """
        users = in_order(self.ledger.users())
        return {at // size: users[at : at + size] for at in range(0, len(users), size)}

    def _steps(self, users: Sequence[User]) -> int:
        held = self.spec.users.held_out + self.spec.users.test
        return sum(steps_of(max(1, round(one.rows * (1 - held))), self.spec.train) for one in users)

    def _say(self) -> None:
        seconds = time.perf_counter() - self._began
        done = min(self._done, self._of)
        self.tell(Progress(self._users, self._of_users, done, self._of, seconds, self._here))


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
