"""Which versions vLLM knows: loaded before they are needed, forgotten when nobody does, never more than fit."""

# vLLM is in another environment than the one that is checked
# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.errors import ModicumError
from modicum.serve.engine.interface import (
    AdapterUnavailableError,
    InUseError,
    Observer,
    OverloadedError,
    PoolStats,
    Resident,
)
from modicum.serve.vllm.plugin import asked

if TYPE_CHECKING:
    from modicum.serve.source import Source
    from modicum.store import Store
    from modicum.store.record import Record


@dataclass
class Entry:
    """A version that vLLM knows, or is being told of."""

    version: str
    #: what vLLM is given with each request under it, once it is loaded
    request: Any = None
    loading: asyncio.Task[Any] | None = None
    #: its record was read; before, there is nothing to forget, and who wants it gone has it read again
    read: bool = False
    again: bool = False
    method: str = ""
    rank: int = 0
    bytes: int = 0
    leases: int = 0
    pinned: bool = False
    #: to be forgotten when the last lease ends
    leaving: bool = False
    #: set when vLLM has forgotten it
    gone: asyncio.Event = field(default_factory=asyncio.Event)


class Registry:
    """The versions in an engine of vLLM's, at most `slots`; belongs to one event loop."""

    def __init__(self, llm: Any, store: Store | Source, slots: int, observer: Observer) -> None:
        self._llm, self._store, self._slots, self._observer = llm, store, slots, observer
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._hits = self._misses = self._evictions = self._failures = 0
        self._forgetting: set[asyncio.Task[Any]] = set()

    async def acquire(self, version: str) -> Entry:
        """A version that vLLM knows until `release`.

        Raises:
            AdapterUnavailableError: it cannot be had.
            InUseError: all versions that fit are pinned or in use.
            OverloadedError: they are pinned.
        """
        entry = await self._entry(version)
        entry.leases += 1
        try:
            assert entry.loading is not None
            await asyncio.shield(entry.loading)
        except BaseException:
            self.release(entry)
            raise
        return entry

    def release(self, entry: Entry) -> None:
        """The counterpart of `acquire`."""
        entry.leases -= 1
        if entry.leaving and not entry.leases and not entry.gone.is_set():
            task = asyncio.get_running_loop().create_task(self._forget(entry))
            self._forgetting.add(task)
            task.add_done_callback(self._forgetting.discard)

    async def load(self, version: str, *, pin: bool) -> Resident:
        """The version, which vLLM knows now."""
        entry = await self.acquire(version)
        entry.pinned |= pin
        self.release(entry)
        return _resident(entry)

    def unpin(self, version: str) -> None:
        """Returns when the version may be forgotten again."""
        if version in self._entries:
            self._entries[version].pinned = False

    async def unload(self, version: str) -> bool:
        """Whether vLLM knew the version and forgets it, at once or when the last request under it has ended.

        What is only being read is not known yet: it is read again, and will be what the store has by now.
        """
        entry = self._entries.get(version)
        if entry is None or not entry.read:
            if entry is not None:
                entry.again = True
            return False
        entry.pinned, entry.leaving = False, True
        if not entry.leases:
            await self._forget(entry)
        return True

    def residents(self) -> list[Resident]:
        """All versions, the last used first."""
        return [_resident(entry) for entry in reversed(self._entries.values())]

    def stats(self) -> PoolStats:
        """How many there are, and how often one was there when it was needed."""
        entries = self._entries.values()
        return PoolStats(
            self._slots, len(entries), sum(entry.pinned for entry in entries), self._hits, self._misses,
            self._evictions, self._failures, sum(entry.bytes for entry in entries),
        )  # fmt: skip

    async def _entry(self, version: str) -> Entry:
        while (entry := self._entries.get(version)) is not None and entry.leaving:
            await entry.gone.wait()
        if entry is not None:
            self._hits += 1
            self._entries.move_to_end(version)
            return entry
        while len(self._entries) >= self._slots:
            await self._make_room()
            if version in self._entries:
                return await self._entry(version)
        self._misses += 1
        entry = self._entries[version] = Entry(version)
        entry.loading = asyncio.get_running_loop().create_task(self._load(entry))
        return entry

    async def _make_room(self) -> None:
        leaving = next(
            (entry for entry in self._entries.values() if entry.leaving and not entry.leases), None
        )
        if leaving is not None:
            await leaving.gone.wait()
            return
        found = next((one for one in self._entries.values() if not one.leases and not one.pinned), None)
        if found is None:
            if all(one.pinned for one in self._entries.values()):
                raise OverloadedError(f"all {self._slots} adapters that fit are pinned; unpin one")
            raise InUseError(f"all {self._slots} adapters that fit are pinned or in use; try again later")
        self._evictions += 1
        found.leaving = True
        await self._forget(found)

    async def _forget(self, entry: Entry) -> None:
        try:
            await self._llm.remove_lora(entry.request.lora_int_id)
        finally:
            self._entries.pop(entry.version, None)
            entry.gone.set()

    async def _load(self, entry: Entry) -> None:
        start, version = time.perf_counter(), entry.version
        failed = True
        try:
            # damage and absence are found here, and the engine's process finds the record in memory
            record = await self._record(entry)
            entry.method, entry.rank = record.method, int(record.config.get("r", 16))
            entry.bytes = record.layout.size * self._llm.model_config.dtype.itemsize
            entry.request = asked(version, record)
            await self._llm.add_lora(entry.request)
            failed = False
        except ModicumError as error:
            raise AdapterUnavailableError(f"{version}: {error}") from error
        except Exception as error:
            # what the engine's process raised arrives as text
            raise AdapterUnavailableError(f"{version} cannot be served: {error}") from error
        finally:
            self._observer.load(time.perf_counter() - start, failed=failed)
            if failed:
                self._failures += 1
                self._entries.pop(version, None)
                entry.gone.set()

    async def _record(self, entry: Entry) -> Record:
        """The record of a version as the store has it after the last `unload`."""
        while True:
            record = await asyncio.to_thread(self._store.get, entry.version)
            entry.read, entry.again = not entry.again, False
            if entry.read:
                return record


def _resident(entry: Entry) -> Resident:
    return Resident(entry.version, entry.method, entry.rank, entry.bytes, entry.pinned, entry.leases)
