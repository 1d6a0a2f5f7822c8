"""What an engine loads adapters from, and whether what it has in memory is still the same.

A version never changes, but a name that was purged begins anew, and then `ada@1` means something else. What is in
memory from before must not answer for it, so it is remembered which entry of the store's log every version was put by.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from modicum.store import Store
    from modicum.store.record import Record


@final
class Source:
    """The records of a store, by version; `most` entries are remembered, the last asked for."""

    def __init__(self, store: Store, most: int) -> None:
        self._store, self._most = store, most
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, int] = OrderedDict()

    @property
    def location(self) -> str:
        """What the user called the store."""
        return self._store.location

    def get(self, version: str) -> Record:
        """The record of `version`; any thread.

        Raises:
            NotStoredError, CorruptAdapterError, StoreError: see `Store.get`.
        """
        # both in one look at the store: what is put under a purged name meanwhile is another entry
        record, entry = self._store.get_put(version)
        self.note(version, entry)
        return record

    def entry(self, version: str) -> int | None:
        """The entry by which what was read last as `version` was put; None if that is not remembered."""
        with self._lock:
            return self._entries.get(version)

    def note(self, version: str, entry: int) -> None:
        """Returns when it is remembered that nothing older than what `entry` put is loaded as `version`.

        For engines that read the store in another process, where `get` is not called in this one.
        """
        with self._lock:
            self._entries[version] = entry
            self._entries.move_to_end(version)
            while len(self._entries) > self._most:
                self._entries.popitem(last=False)

    def outdated(self, version: str, entry: int) -> bool:
        """Whether what was loaded as `version` may be something else than what `entry` put."""
        with self._lock:
            if version in self._entries:
                self._entries.move_to_end(version)
            return self._entries.get(version) != entry
