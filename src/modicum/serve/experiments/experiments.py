"""What routes and names ask of experiments, and the thread that ends them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, final

from modicum.errors import ConflictError, NotStoredError, StoreError, did_you_mean
from modicum.serve.experiments import tables
from modicum.serve.experiments.assignment import assign, owner, pseudonym
from modicum.serve.experiments.feedback import Feedback, give
from modicum.serve.experiments.guardrails import Pace
from modicum.serve.experiments.ledger import Ledger
from modicum.serve.experiments.lifecycle import Lifecycle
from modicum.serve.experiments.report import Findings, Report, Verdict, findings, judge, report
from modicum.serve.experiments.trial import Shadows, Trial, observed

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

    from modicum.serve.engine.interface import Engine, Request, Step
    from modicum.serve.experiments.tables import Experiment, Exposure
    from modicum.serve.names import Choice
    from modicum.store import Store

log = logging.getLogger("modicum.serve")
#: who ends an experiment that nobody ended
ACTOR = "modicum-serve"


@dataclass(frozen=True)
class Route:
    """What answers a user's request."""

    version: str | None
    #: None where nothing is counted: there is no user, or the experiment does not run
    arm: str | None = None
    #: the label of the arm that runs beside it
    shadow: str | None = None


@final
class Experiments:
    """The experiments of a state folder: made, run, ended and reported."""

    def __init__(
        self,
        folder: Path,
        store: Store | None,
        *,
        base_name: str = "base",
        every: float | None = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """The experiments in `folder`; every `every` seconds it is looked whether one ends (None: if asked)."""
        self._clock, self._pace, self._shadows = clock, Pace(), Shadows()
        self._ledger = Ledger(folder / tables.FILE, tables.TABLES)
        self._lifecycle = Lifecycle(self._ledger, store, base_name, clock)
        self._known: dict[str, Experiment] = {}
        self._judged: dict[int, Any] = {}
        self._found: dict[int, Findings] = {}
        self._reports: dict[int, tuple[Any, Report]] = {}
        self._checking, self._ending = threading.Lock(), threading.Event()
        self._reload()
        self._thread = threading.Thread(target=self._watch, args=(every,), name="experiments", daemon=True)
        if every is not None:
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Returns when all answers and feedback so far are on the disk, and the file is closed."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        self._lifecycle.close()
        self._ledger.close()

    # what a request needs

    def get(self, name: str) -> Experiment | None:
        """The experiment of this name, None if there is none; takes no time."""
        return self._known.get(name)

    def all(self) -> list[Experiment]:
        """All experiments, the newest first."""
        return sorted(self._known.values(), key=lambda one: one.created, reverse=True)

    def route(self, one: Experiment, user: str | None) -> Route | None:
        """What answers requests for the experiment; None if it has nothing to say, and its name is an adapter's.

        A running one gives each user an arm; without a user it gives the control and counts nothing. One that does not
        run gives the control, or what was promoted.
        """
        control = one.design.control
        if one.state != "running":
            if one.name in one.design.adapters:
                return None
            promoted = one.state == "promoted" and one.winner is not None
            return Route(one.design.arm(one.winner).version if promoted and one.winner else control.version)
        if user is None:
            return Route(control.version)
        arm = assign(one.salt, one.arms, user)
        if one.design.shadow:
            return Route(control.version, control.label, None if arm.label == control.label else arm.label)
        return Route(arm.version, arm.label)

    def generate(
        self,
        engine: Engine,
        request: Request,
        choice: Choice,
        *,
        tenant: str,
        user: str | None,
        response: str,
    ) -> AsyncIterator[Step]:
        """`engine.generate(request)`, and if it is part of an experiment, what becomes of it is written down.

        `response` is the identifier that the client gets, and gives feedback on.
        """
        one = None if choice.experiment is None or choice.arm is None else self._known.get(choice.experiment)
        if one is None or choice.arm is None or user is None:
            return engine.generate(request)
        who = owner(one.salt, tenant), pseudonym(one.salt, tenant, user)
        trial = Trial(
            one, one.design.arm(choice.arm), who, response, len(request.prompt), self._clock(), self._expose
        )
        if choice.shadow is not None:
            arm = one.design.arm(choice.shadow)
            self._shadows.start(engine, request, arm.version, functools.partial(trial.shadowed, arm))
        return observed(engine, request, trial.run, trial.ended)

    async def feedback(self, tenant: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What was taken down of a user's feedback (see `feedback.give`), once it is on the disk."""
        said, known, now = Feedback.read(body), self._known, self._clock()
        return await asyncio.wrap_future(self._ledger.submit(lambda db: give(db, known, tenant, said, now)))

    # what an admin does, from any thread but the event loop's

    def find(self, name: str) -> Experiment:
        """The experiment of this name.

        Raises:
            NotStoredError: there is none.
        """
        found = self._known.get(name)
        if found is None:
            raise NotStoredError(f"no experiment {name!r}{did_you_mean(name, self._known)}")
        return found

    def create(self, body: Mapping[str, Any], actor: str) -> Experiment:
        """The new draft; see `Lifecycle.create`."""
        self._lifecycle.create(body, actor)
        return self._seen(str(body["name"]))

    def start(self, name: str, actor: str) -> Experiment:
        """The experiment, which runs from now on."""
        self._lifecycle.start(self.find(name), actor)
        return self._seen(name)

    def weigh(self, name: str, weights: Mapping[str, Any], actor: str) -> Experiment:
        """The experiment with other weights."""
        self._lifecycle.weigh(self.find(name), weights, actor)
        return self._seen(name)

    def stop(self, name: str, actor: str, reason: str = "stopped by hand") -> Experiment:
        """The experiment, which runs no more."""
        self._lifecycle.stop(self.find(name), actor, reason)
        return self._seen(name)

    def promote(self, name: str, actor: str, arm: str | None = None, expected: Any = ...) -> Experiment:
        """The experiment whose winner is in production; see `Lifecycle.promote`."""
        try:
            self._lifecycle.promote(self.find(name), actor, arm, expected)
        finally:
            self._reload()
        return self.find(name)

    def rollback(self, name: str, actor: str) -> Experiment:
        """The experiment whose promotion was taken back; see `Lifecycle.rollback`."""
        self._lifecycle.rollback(self.find(name), actor)
        return self._seen(name)

    def delete(self, name: str, actor: str) -> None:
        """Returns when nothing is left of an experiment that does not run."""
        self._lifecycle.delete(self.find(name), actor)
        self._reload()

    def purge(self, tenant: str, user: str) -> int:
        """How many rows about a tenant's user were erased; fixed outcomes stay as nobody's."""
        known = list(self._known.values())
        self._reports.clear()

        def forget(db: sqlite3.Connection) -> int:
            return sum(tables.forget(db, one.id, pseudonym(one.salt, tenant, user)) for one in known)

        return self._ledger.do(forget)

    def report(self, name: str) -> Report:
        """What the experiment has found so far."""
        one = self._seen(name)
        return self._ledger.read(lambda db: self._report(db, one))

    def reports(self, limit: int) -> list[Report]:
        """What the newest experiments have found so far."""
        self._reload()
        return self._ledger.read(lambda db: [self._report(db, one) for one in self.all()[:limit]])

    def _report(self, db: sqlite3.Connection, one: Experiment) -> Report:
        found = self._findings(db, one)
        state = one, found.place, tables.totals(db, one.id)
        told = self._reports.get(one.id)
        if told is not None and told[0] == state and one.state != "running":
            return told[1]
        made = report(db, one, found, self._ledger.lost)
        self._reports[one.id] = state, made
        return made

    def check(self) -> None:
        """Returns when outcomes whose window has closed are fixed, experiments that are decided stopped, logs told."""
        with self._checking:
            self._reload()
            for one in list(self._known.values()):
                if one.state == "running":
                    self._check(one)
            self._lifecycle.settle()

    def _check(self, one: Experiment) -> None:
        window, until = one.design.window, self._clock() - one.design.window
        if self._ledger.read(lambda db: tables.due(db, one.id, until)):
            self._ledger.do(lambda db: tables.close_windows(db, one.id, until, window))

        def judged(db: sqlite3.Connection) -> tuple[Any, Verdict | None]:
            found = self._findings(db, one)
            state = found.place, tables.totals(db, one.id)
            return state, None if state == self._judged.get(one.id) else judge(db, one, found)

        state, verdict = self._ledger.read(judged)
        if verdict is not None:
            # unless somebody has just stopped it
            with contextlib.suppress(ConflictError):
                self._lifecycle.stop(one, ACTOR, verdict.reason, verdict.winner)
            self._reload()
        self._judged[one.id] = state

    def _findings(self, db: sqlite3.Connection, one: Experiment) -> Findings:
        found = self._found[one.id] = findings(db, one, self._found.get(one.id))
        return found

    def _watch(self, every: float | None) -> None:
        while not self._ending.wait(every):
            try:
                self.check()
            except StoreError as error:
                log.warning("experiments cannot be looked at: %s", error)
            except Exception:
                log.exception("experiments cannot be looked at")

    def _seen(self, name: str) -> Experiment:
        self._reload()
        return self.find(name)

    def _reload(self) -> None:
        self._known = self._ledger.read(tables.load)

    def _expose(self, one: Experiment, seen: Exposure) -> None:
        def change(db: sqlite3.Connection) -> None:
            tables.expose(db, seen, self._pace.limit(db, one.id, one.design))
            if seen.arm == one.design.control.label and seen.outcome != "error":
                self._pace.add(one.id, seen.seconds)

        # an answer does not fail because nobody can write down any more that it was given
        with contextlib.suppress(StoreError):
            self._ledger.submit(change, urgent=False)
