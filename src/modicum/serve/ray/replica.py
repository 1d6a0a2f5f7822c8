"""One engine among several, as Ray Serve runs it."""

# Ray is an extra that is not where types are checked
# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING, Any

from ray import serve

from modicum.serve.ray.streams import together

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modicum.serve.engine.interface import EngineStats, Request, Resident, Step
    from modicum.serve.settings import EngineSettings

#: adapters that Ray remembers a replica for; the engine's own pool decides what is in memory
MOST_KNOWN = 100_000
#: versions whose entries are remembered, for each slot
_REMEMBERED = 16
#: seconds between two reports
_REPORT = 1.0
#: the cores that vLLM takes on a processor, `0-3`; lists for several engines of a machine are divided by |
_CORES = "VLLM_CPU_OMP_THREADS_BIND"


class Replica:
    """An engine, asked by messages; `settings` and `store` are those of a server."""

    def __init__(self, settings: EngineSettings, store: str | None) -> None:
        from modicum.serve.engines import open_local
        from modicum.serve.source import Source
        from modicum.store import Store

        self._store = None if store is None else Store(store)
        self._source = None if self._store is None else Source(self._store, _REMEMBERED * settings.slots)
        _take_cores()
        self._engine, _ = open_local(settings, self._source)
        self._engine.start()
        self._told = 0.0

    async def about(self) -> int:
        """The longest sequence."""
        return self._engine.max_length

    async def check_health(self) -> None:
        """Returns while requests are taken; Ray starts another replica otherwise."""
        if not self._engine.alive:
            raise RuntimeError("the engine takes no requests any more")

    async def generate(self, request: Request) -> AsyncIterator[list[Step] | Report]:
        """The steps, some at a time, the first one at once; now and then a report before them."""
        if request.version is not None:
            await self._refresh(request.version)
            await self.known(request.version)
        async for steps in together(self._engine.generate(request)):
            if (report := self._report()) is not None:
                yield report
            yield steps

    async def load(self, version: str, *, pin: bool) -> Resident:
        """See `Engine.load`."""
        await self.known(version)
        return await self._engine.load(version, pin=pin)

    async def unpin(self, version: str) -> None:
        """See `Engine.unpin`."""
        await self._engine.unpin(version)

    async def unload(self, version: str) -> bool:
        """See `Engine.unload`."""
        return await self._engine.unload(version)

    @serve.multiplexed(max_num_models_per_replica=MOST_KNOWN)
    async def known(self, version: str) -> str:
        """Tells Ray that requests for the version do best to come here."""
        return version

    async def __del__(self) -> None:
        """Ray asks for the end so."""
        await self._engine.close()
        if self._store is not None:
            self._store.close()

    async def _refresh(self, version: str) -> None:
        """Returns when nothing in memory here answers for a version that was purged and put anew."""
        if self._store is None or self._source is None:
            return
        found = await asyncio.to_thread(self._store.find_put, version)
        if found is None or self._source.outdated(version, found[1]):
            await self._engine.unload(version)

    def _report(self) -> Report | None:
        now = time.monotonic()
        if now - self._told < _REPORT:
            return None
        self._told = now
        return Report(serve.get_replica_context().replica_id.unique_id, self._engine)


class Report:
    """What one replica is doing."""

    def __init__(self, replica: str, engine: Any) -> None:
        self.replica = replica
        self.stats: EngineStats = engine.stats()
        self.residents: list[Resident] = engine.residents()


def _take_cores() -> None:
    """Leaves the cores of this replica alone where the environment has a list for each of those on a machine."""
    lists = os.environ.get(_CORES, "").split("|")
    if len(lists) > 1:
        os.environ[_CORES] = lists[serve.get_replica_context().rank.local_rank % len(lists)]
