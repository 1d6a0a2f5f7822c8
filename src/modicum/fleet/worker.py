"""One process at work on cohorts: users' rows in, adapters in the store."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import torch

from modicum.errors import ModicumError, NotStoredError
from modicum.fleet.ledger import Finished, Outcome, User
from modicum.fleet.passes import multiple_on
from modicum.fleet.rows import Prepared, prepare_user
from modicum.fleet.training import Learner, Learnt, Training, is_better
from modicum.fleet.work import UserRows, work_of
from modicum.store import Put, Store
from modicum.store.catalogue.publish import prepare as prepared_put
from modicum.store.record import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modicum.data.files import Rows
    from modicum.fleet.base import FleetBase
    from modicum.fleet.spec import FleetSpec
    from modicum.store.record import Record

    #: the users of a cohort with their rows
    Members = Sequence[tuple[User, Rows]]


@final
class Worker:
    """Trains cohorts on one base model."""

    def __init__(
        self,
        spec: FleetSpec,
        base: FleetBase,
        store: Store,
        stepped: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`stepped` is told of steps that were made or are not made any more, one for each user."""
        self.spec, self.base, self.store, self._stepped = spec, base, store, stepped
        self._digest = spec.digest()

    def finish(self, members: Members, tokens: int) -> Finished:
        """What became of the users of one cohort, whose adapters are in the store; `tokens` of a pass.

        Finished once more, a cohort leaves the store as it is.
        """
        began = time.perf_counter()
        found = [
            prepare_user(rows, self.spec, self.base.tokenizer, self.spec.rank_of(one.rows))
            for one, rows in members
        ]
        outcomes = [
            Outcome(one.user, "faulty", {"fault": how.fault, **_known(how)})
            for (one, _), how in zip(members, found, strict=True)
            if how.learner is None
        ]
        able = [(one, how) for (one, _), how in zip(members, found, strict=True) if how.learner is not None]
        if not able:
            return Finished(outcomes, time.perf_counter() - began, 0)
        learners = [self._started(one, how) for one, how in able]
        training = Training(self.base, self.spec, learners, tokens)
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
        seconds = time.perf_counter() - began
        rows = [UserRows.of(one.user, learner) for (one, _), learner in zip(able, learners, strict=True)]
        work = work_of(rows, self.spec.train, tokens, multiple=multiple_on(self.base.device.type))
        return Finished(outcomes + settled, seconds, work.all_tokens)

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
        about = {"fleet": self._digest, "user": user.user, "steps": mine.best_step}
        try:
            record = self.base.record(
                rank, row, self.spec.store.dtype, recipe_digest=self._digest, metadata=about
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
            tags=(*options.tags, f"fleet-{self._digest}"),
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


def _known(how: Prepared) -> dict[str, Any]:
    return {"rows": how.counts, **({"notes": how.notes} if how.notes else {})}


def _told(mine: Learnt) -> dict[str, Any]:
    values = {
        "steps": mine.steps, "best_step": mine.best_step, "before": mine.before, "held_out": mine.held_out,
        "test_before": mine.test_before, "test": mine.test, "losses": mine.losses,
        "stopped_early": mine.stopped_early,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value not in (None, False)}
