"""What `model` of a request means: the version that answers.

    base          the base model alone (or whatever else the server calls it)
    ada           what the alias `production` points at, the newest version where there is none
    ada@3         version 3; ada@canary: what that alias points at; ada@latest: the newest version
    an experiment what it gives the user; it may have an adapter's name

Every request asks the store anew, so that promotions and rollbacks count from the next request on. Where the store
cannot be reached, what was last answered about the same `model` counts for a while.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar, final

from modicum.errors import ConfigError, NotStoredError, StoreError, did_you_mean
from modicum.store.catalogue.names import Reference, reference
from modicum.store.store import PRODUCTION

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modicum.serve.experiments import Experiments
    from modicum.serve.experiments.tables import Experiment
    from modicum.store import Store

T = TypeVar("T")
_AWAY = "the adapter store does not answer; ask again in a moment"
#: answers that are kept for when the store is gone, and the seconds they may be old
_KEPT, _AGE = 1000, 3600.0
#: seconds that the store may take to answer, and for which it is left alone if it did not
_PATIENCE, _PAUSE = 5.0, 1.0
#: each has a connection to the store, with a cache of its own
_THREADS = 4
#: names in the neighbourhood from which suggestions are chosen
_NEAR = 100


@dataclass(frozen=True)
class Choice:
    """What answers a request."""

    #: `name@3`; None: the base model alone
    version: str | None
    #: the adapter's name, None for the base model
    name: str | None
    #: the experiment that chose it, and the label of the arm if that is counted
    experiment: str | None = None
    arm: str | None = None
    #: the label of the arm that runs in its shadow
    shadow: str | None = None
    #: the entry of the store's log that put the version, where the store was asked
    entry: int | None = None


@final
class Names:
    """What the names in requests mean now; `most` answers of the store are remembered, the last asked for."""

    def __init__(
        self,
        store: Store | None,
        experiments: Experiments | None = None,
        base_name: str = "base",
        most: int = _KEPT,
    ) -> None:
        self._store, self._experiments, self._base, self._most = store, experiments, base_name, most
        self._threads = ThreadPoolExecutor(_THREADS, "names")
        self._turns = asyncio.Semaphore(_THREADS)
        self._last: OrderedDict[tuple[str, ...], tuple[float, tuple[str, int] | None]] = OrderedDict()
        self._away_until = 0.0

    def close(self) -> None:
        """Returns when nothing is looked up any more."""
        self._threads.shutdown(cancel_futures=True)

    async def resolve(self, model: str, may: Callable[[str], bool], user: str | None = None) -> Choice:
        """What answers `model`; `may(name)` tells whether an adapter, an experiment or the base model may be seen.

        `user` is whom an experiment gives an arm. Of an experiment one has to be allowed to see its name and everything
        in it. What one may not see and what does not exist take the same way and get the same answer.

        Raises:
            NotStoredError: there is no such model for who asks.
            StoreError: the store cannot be reached, and the same was not asked lately.
        """
        if model == self._base and may(model):
            return Choice(None, None)
        chosen = self._by_experiment(model, may, user)
        if chosen is not None:
            return await self._stored(chosen)
        try:
            wanted = reference(model)
            hidden = model == self._base or not may(wanted.name)
        except ConfigError:
            wanted, hidden = Reference(model[:1]), True
        if hidden:
            wanted = Reference(f"{secrets.token_hex(8)}", wanted.selector)
        found = await self._find(wanted, plain="@" not in model)
        if found is None:
            raise NotStoredError(f"no model {model[:200]!r}{await self._near(model, may)}")
        version, entry = found
        return Choice(version, wanted.name, entry=entry)

    async def visible(self, patterns: Sequence[str], limit: int = 100, after: str = "") -> list[str]:
        """Up to `limit` names of adapters that match one of the patterns, in order, behind the name `after`."""
        store = self._store
        if store is None or not patterns:
            return []

        def listed() -> list[str]:
            found = {name for one in patterns for name in store.names(one, after=after, limit=limit)}
            return sorted(found)[:limit]

        return await self._asked(listed, brief=False)

    def _by_experiment(self, model: str, may: Callable[[str], bool], user: str | None) -> Choice | None:
        one = None if self._experiments is None else self._experiments.get(model)
        if one is None or self._experiments is None or not self._allowed(one, may):
            return None
        route = self._experiments.route(one, user)
        if route is None:
            return None
        name = None if route.version is None else reference(route.version).name
        return Choice(route.version, name, one.name, route.arm, route.shadow)

    async def _stored(self, chosen: Choice) -> Choice:
        """What an experiment chose, with the entry that put it, as far as the store can be asked.

        Raises:
            NotStoredError: the version was removed.
        """
        if chosen.version is None:
            return chosen
        try:
            found = await self._find(reference(chosen.version), plain=False)
        except StoreError:
            return chosen
        if found is None:
            raise NotStoredError(f"what the experiment {chosen.experiment!r} gives is no longer in the store")
        return replace(chosen, entry=found[1])

    def _allowed(self, one: Experiment, may: Callable[[str], bool]) -> bool:
        of_base = any(arm.version is None for arm in one.arms)
        return all(map(may, {one.name, *one.design.adapters, *([self._base] if of_base else [])}))

    async def _find(self, wanted: Reference, *, plain: bool) -> tuple[str, int] | None:
        """The version that it refers to, and its entry in the log; `plain`: production comes before the newest."""
        store = self._store
        if store is None:
            return None
        asked = (Reference(wanted.name, PRODUCTION), wanted) if plain else (wanted,)
        key = tuple(map(str, asked))
        try:
            found = await self._asked(lambda: store.find_put(*asked))
        except StoreError:
            at, found = self._last.get(key, (0.0, None))
            if found is None or time.monotonic() - at > _AGE:
                raise
            return found
        if found is None:
            self._last.pop(key, None)
        else:
            self._last[key] = (time.monotonic(), found)
            self._last.move_to_end(key)
            if len(self._last) > self._most:
                self._last.popitem(last=False)
        return found

    async def _near(self, model: str, may: Callable[[str], bool]) -> str:
        """The nearest names among those that begin alike and may be seen."""
        store, name = self._store, model.partition("@")[0]
        if store is None or len(name) < 2:
            return ""
        near = await self._asked(lambda: store.names(after=name[:-2], limit=_NEAR))
        return did_you_mean(name, [one for one in near if may(one)])

    async def _asked(self, action: Callable[[], T], *, brief: bool = True) -> T:
        """What `action` gets from the store, if that answers; only `brief` ones tell whether it does.

        Raises:
            StoreError: it does not; for a moment it is then not asked again, so that requests need not wait for it.
        """
        # what waits for a thread says nothing of the store
        async with self._turns:
            if time.monotonic() < self._away_until:
                raise StoreError(_AWAY)
            asked = self._threads.submit(action)
            answer = asyncio.wrap_future(asked)
            # what comes too late to be told is no mistake of ours
            answer.add_done_callback(lambda one: one.cancelled() or one.exception())
            await asyncio.wait([answer], timeout=_PATIENCE)
            try:
                # a busy loop hears late of an answer that came in time
                return asked.result(timeout=0)
            except (StoreError, TimeoutError) as error:
                if brief:
                    self._away_until = time.monotonic() + _PAUSE
                raise StoreError(_AWAY) from error
