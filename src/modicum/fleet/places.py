"""Where the cohorts of a job are trained: in this process, or as tasks of a pool."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, final

from modicum.errors import StoreError
from modicum.fleet.base import load_fleet_base
from modicum.fleet.sizing import check_room, longest_rows, sizes
from modicum.fleet.spec import make_fleet
from modicum.fleet.worker import Worker
from modicum.jobs.pool import Pool, Task
from modicum.models.loading import quiet_transformers
from modicum.store import Store
from modicum.train.yaml_lines import read_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from modicum.fleet.base import FleetBase
    from modicum.fleet.ledger import Finished
    from modicum.fleet.sizing import Sizes
    from modicum.fleet.spec import FleetSpec
    from modicum.fleet.worker import Members


class Place(ABC):
    """Where cohorts are trained."""

    @abstractmethod
    def prepare(self, known: Sizes | None) -> tuple[Sizes, dict[str, Any]]:
        """The sizes of the job, measured unless they are `known`, and what its report says of the base model.

        Raises:
            ConfigError, TargetError: see `load_fleet_base`.
        """

    @abstractmethod
    def finish(self, cohorts: Iterable[tuple[int, Members]], tokens: int) -> Iterator[tuple[int, Finished]]:
        """What became of the users of each cohort, by its number, in the order in which they end."""


@final
class Here(Place):
    """In this process, one cohort after the other."""

    def __init__(self, spec: FleetSpec, store: Store, stepped: Callable[[int], None]) -> None:
        """`stepped`: see `Worker`."""
        self._spec, self._store, self._stepped = spec, store, stepped

    def prepare(self, known: Sizes | None) -> tuple[Sizes, dict[str, Any]]:
        """See `Place.prepare`."""
        base = load_fleet_base(self._spec)
        self._worker = Worker(self._spec, base, self._store, self._stepped)
        return known or _measured(self._spec, base), _about(base)

    def finish(self, cohorts: Iterable[tuple[int, Members]], tokens: int) -> Iterator[tuple[int, Finished]]:
        """See `Place.finish`."""
        for number, members in cohorts:
            yield number, self._worker.finish(members, tokens)


@final
class Elsewhere(Place):
    """In other processes: each cohort is a task, which gets its users' rows and puts their adapters into the store.

    Processes need the base model and the store; the folder of the job, only this one.
    """

    def __init__(self, spec: FleetSpec, store: Store, pool: Pool) -> None:
        self._store, self._pool = store, pool
        # what is compared with the job in the folder when it goes on: nothing is lost in it
        self._text = spec.to_yaml()

    def prepare(self, known: Sizes | None) -> tuple[Sizes, dict[str, Any]]:
        """See `Place.prepare`; errors come as `ModicumError`."""
        [outcome] = self._pool.outcomes([Task(0, prepared, (self._text, known, self._pool.share))])
        return outcome.result("the base model")

    def finish(self, cohorts: Iterable[tuple[int, Members]], tokens: int) -> Iterator[tuple[int, Finished]]:
        """See `Place.finish`.

        Raises:
            ModicumError: a cohort failed. StoreError: what a cohort has stored is not in the store.
        """
        tasks = (Task(number, finished, (self._text, members, tokens)) for number, members in cohorts)
        for outcome in self._pool.outcomes(tasks):
            number: Any = outcome.key
            found: Finished = outcome.result(f"cohort {number}")
            stored = [one.detail["version"] for one in found.outcomes if "version" in one.detail]
            if stored and self._store.find(stored[0]) is None:
                raise StoreError(
                    f"{stored[0]} was put into another store of the same address as {self._store.location}: all "
                    "machines have to reach one store, e.g. on PostgreSQL"
                )
            yield number, found


def prepared(text: str, known: Sizes | None, share: float) -> tuple[Sizes, dict[str, Any]]:
    """A task: what `Place.prepare` gives, for processes that may each take a `share` of the memory.

    Raises:
        ConfigError: see `check_room`.
    """
    spec, base = _loaded(text)
    if known is None:
        return _measured(spec, base, share), _about(base)
    check_room(known, base, spec, share)
    return known, _about(base)


def finished(text: str, members: Members, tokens: int) -> Finished:
    """A task: what became of the users of a cohort; see `Worker.finish`."""
    spec, base = _loaded(text)
    with quiet_transformers(), Store(spec.store.path) as store:
        return Worker(spec, base, store).finish(members, tokens)


@functools.lru_cache(maxsize=1)
def _loaded(text: str) -> tuple[FleetSpec, FleetBase]:
    """The fleet that `text` specifies and its base model, which a process keeps from one cohort to the next."""
    spec = make_fleet(read_yaml(text, "fleet")[0])
    with quiet_transformers():
        return spec, load_fleet_base(spec)


def _measured(spec: FleetSpec, base: FleetBase, share: float = 1.0) -> Sizes:
    return sizes(base, spec.train, longest_rows(base, spec.data.max_length), spec.all_ranks[-1], share)


def _about(base: FleetBase) -> dict[str, Any]:
    return {
        "numbers_per_adapter": {str(rank): kind.record.layout.size for rank, kind in base.kinds.items()},
        "device": str(base.device),
    }
