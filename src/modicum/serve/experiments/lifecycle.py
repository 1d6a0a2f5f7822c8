"""draft → running → stopped → promoted → rolled back.

A change of state and what the store's log has to be told of it are one transaction of the ledger; the log is told right
after it, or as soon as the store can be reached again. So no acknowledged change is missing from the log.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, final

from modicum.errors import ConfigError, ConflictError, NotStoredError, StoreError
from modicum.serve.experiments import tables
from modicum.serve.experiments.design import Design, check_weights
from modicum.store.catalogue.names import Reference, reference
from modicum.store.store import PRODUCTION

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Mapping

    from modicum.serve.experiments.design import Arm, State
    from modicum.serve.experiments.ledger import Ledger
    from modicum.serve.experiments.tables import Experiment
    from modicum.store import Store

#: seconds between two attempts to reach a store that was gone
_AGAIN = 5.0
#: seconds that a change waits for the store to be told of it
_PATIENCE = 2.0


@final
class Lifecycle:
    """Changes of experiments; each says who made it."""

    def __init__(
        self, ledger: Ledger, store: Store | None, base_name: str, clock: Callable[[], float]
    ) -> None:
        self._ledger, self._store, self._base, self._clock = ledger, store, base_name, clock
        # one thread, so that nothing is told twice, and nobody waits for a store that is busy
        self._telling = ThreadPoolExecutor(1, "experiments-log")
        self._next_try = 0.0

    def create(self, body: Mapping[str, Any], actor: str) -> None:
        """Returns when the experiment that `body` describes (see `Design.check`) is a draft.

        Raises:
            ConfigError: all that is wrong with it.
            ConflictError: there is one of this name.
        """
        store = self._needed()
        design = Design.check(body, store.find, self._base)
        taken = design.name == self._base or (
            store.find(design.name) is not None and set(design.adapters) != {design.name}
        )
        if taken:
            raise ConfigError(
                f"{design.name!r} is already the name of a model: call the experiment otherwise, or give it versions "
                "of that adapter alone, whose plain requests it then takes over"
            )
        now = self._clock()
        self._change(design, actor, "create", {}, lambda db: tables.create(db, design, now))

    def start(self, one: Experiment, actor: str) -> None:
        """Returns when users are given arms; where production points now is noted for a promotion."""
        store = self._needed()
        before = {name: _points_at(store, name) for name in one.design.adapters}
        columns = {"state": "running", "started": self._clock(), "before": json.dumps(before)}
        self._to(one, actor, "start", ("draft",), columns)

    def weigh(self, one: Experiment, weights: Mapping[str, Any], actor: str) -> None:
        """Returns when the arms have these weights; users that need not move stay where they are."""
        stored = tables.weights_text(check_weights(one.arms, weights))
        columns = {"weights": stored}
        self._to(one, actor, "weigh", ("draft", "running"), columns, weights=json.loads(stored))

    def stop(self, one: Experiment, actor: str, reason: str, winner: str | None = None) -> None:
        """Returns when everybody gets the control again."""
        columns = {"state": "stopped", "ended": self._clock(), "reason": reason, "winner": winner}
        self._to(one, actor, "stop", ("running",), columns, reason=reason, winner=winner)

    def promote(self, one: Experiment, actor: str, arm: str | None = None, expected: Any = ...) -> str:
        """The version that production points at now: the winner's, or that of another arm.

        Only if it points where it did when the experiment started, or at `expected`, so that nobody's change is undone.

        Raises:
            ConfigError: no arm has won, and none is named; or it is the base model.
            ConflictError: production points elsewhere, or the experiment is not stopped.
        """
        if one.state == "running":
            raise ConflictError(f"the experiment {one.name!r} is running; stop it first")
        label = arm or one.winner
        if label is None:
            raise ConfigError(f"no arm of {one.name!r} has won; name the one to promote")
        version, store = one.design.arm(label).version, self._needed()
        if version is None:
            raise ConfigError(f"{label!r} is the base model, which no alias can point at")
        name = reference(version).name
        expected = one.before.get(name) if expected is ... else expected
        # repeated after a crash, the alias may have moved already
        if _points_at(store, name) != reference(version).selector or one.state == "promoted":
            if one.state != "stopped":
                raise ConflictError(
                    f"the experiment {one.name!r} is {one.state}; only a stopped one can be promoted"
                )
            store.acting(actor).promote(version, expected=expected)
        before = json.dumps({**one.before, name: expected})
        columns = {"state": "promoted", "winner": label, "before": before}
        self._to(one, actor, "promote", ("stopped",), columns, arm=label)
        return version

    def rollback(self, one: Experiment, actor: str) -> str | None:
        """The version that production points at again, None if it did not exist before the promotion.

        Raises:
            ConflictError: it no longer points at what was promoted, or nothing was.
        """
        if one.state != "promoted" or one.winner is None:
            raise ConflictError(f"the experiment {one.name!r} is {one.state}; nothing of it was promoted")
        version = one.design.arm(one.winner).version
        assert version is not None
        at, store = reference(version), self._needed().acting(actor)
        number, found = at.selector, one.before.get(at.name)
        assert isinstance(number, int)
        # repeated after a crash, the alias may be back already
        if _points_at(store, at.name) != found:
            if found is None:
                store.unalias(at.name, PRODUCTION, expected=number)
            else:
                found = store.rollback(at.name, expected=number)
        self._to(one, actor, "rollback", ("promoted",), {"state": "rolled back"}, arm=one.winner)
        return None if found is None else f"{at.name}@{found}"

    def delete(self, one: Experiment, actor: str) -> None:
        """Returns when nothing is left of it but what the store's log says."""
        states: tuple[State, ...] = ("draft", "stopped", "promoted", "rolled back")
        self._change(one.design, actor, "delete", {}, lambda db: tables.delete(db, one.name, states))

    def settle(self) -> None:
        """Returns when the store's log has been told what it is still owed, or is not to be reached soon."""
        with contextlib.suppress(TimeoutError):
            self._telling.submit(self._tell_owed).result(_PATIENCE)

    def close(self) -> None:
        """Returns when nothing is being told to the store any more."""
        self._telling.shutdown(cancel_futures=True)

    def _tell_owed(self) -> None:
        owed = self._ledger.read(tables.owed)
        if self._store is None or not owed or time.monotonic() < self._next_try:
            return
        for number, actor, about in owed:
            try:
                _tell(self._store.acting(actor), about)
            except StoreError:
                self._next_try = time.monotonic() + _AGAIN
                return
            self._ledger.do(functools.partial(tables.told, number=number))

    def _to(
        self,
        one: Experiment,
        actor: str,
        did: str,
        states: tuple[State, ...],
        columns: dict[str, Any],
        **said: Any,
    ) -> None:
        self._change(one.design, actor, did, said, lambda db: tables.change(db, one.name, states, **columns))

    def _change(
        self,
        design: Design,
        actor: str,
        did: str,
        said: dict[str, Any],
        action: Callable[[sqlite3.Connection], None],
    ) -> None:
        about = {
            name: {"experiment": design.name, "did": did, "arms": _of(design.arms, name), **said}
            for name in design.adapters
        }

        def change(db: sqlite3.Connection) -> None:
            action(db)
            tables.owe(db, actor, about)

        self._ledger.do(change)
        self.settle()

    def _needed(self) -> Store:
        if self._store is None:
            raise ConfigError("this server has no adapter store, and nothing but the base model to compare")
        return self._store


def _of(arms: tuple[Arm, ...], name: str) -> dict[str, list[Any]]:
    """What the log tells of an adapter: its own arms alone, so that a purge of one name takes all of it."""
    found = {arm.label: [arm.version, arm.weight] for arm in arms if arm.adapter == name}
    return {label: [reference(str(version)).selector, weight] for label, (version, weight) in found.items()}


def _points_at(store: Store, name: str) -> int | None:
    found = store.find(Reference(name, PRODUCTION))
    return None if found is None else int(found.rpartition("@")[2])


def _tell(store: Store, about: dict[str, dict[str, Any]]) -> None:
    for name, detail in about.items():
        try:
            store.experiment({name: detail})
        except NotStoredError:
            continue  # purged meanwhile, and its history with it
