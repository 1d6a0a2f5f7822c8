"""The sequences that an engine goes on with, as its threads see them: event loop, generation, loaders of adapters."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from modicum.errors import ModicumError
    from modicum.serve.engine.interface import Request, Step


class Running:
    """One request, from its admission to its last token."""

    __slots__ = (
        "arrived", "cached", "generator", "id", "joined", "lease", "loop", "over", "realm", "request", "started",
        "told",
    )  # fmt: skip

    def __init__(self, number: int, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.id = f"r{number}"
        self.request = request
        self.loop = loop
        #: what the event loop has not told yet
        self.arrived: asyncio.Queue[Step | ModicumError] = asyncio.Queue()
        sampling = request.sampling
        #: random numbers of its own; None: greedy
        self.generator = _generator(sampling.seed) if sampling.temperature > 0 else None
        self.realm = realm(request.version, request.salt)
        #: the adapter's place in the pool; None: the base model alone
        self.lease: Any = None
        #: it was given to the generation thread
        self.joined = False
        #: it was in a step
        self.started = False
        #: finished, failed or cancelled: nothing more is told
        self.over = False
        #: tokens told so far
        self.told = 0
        #: tokens of the prompt that were in the prefix cache
        self.cached = 0


def realm(version: str | None, salt: str) -> bytes:
    """A digest of what must be equal, besides the tokens, for keys and values to be shared."""
    state = hashlib.blake2b(digest_size=32)
    for part in ("" if version is None else f"={version}", salt):
        # lengths first, or ("a", "bc") and ("ab", "c") would be one realm
        state.update(len(part.encode()).to_bytes(8, "little") + part.encode())
    return state.digest()


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator


class Table:
    """All sequences of an engine; safe from any thread.

    A lease goes back to the pool when its sequence is over, but never while a step that reads its slot is running.
    """

    def __init__(self, release: Callable[[Any], None]) -> None:
        self._release = release
        self._lock = threading.Lock()
        self._rows: dict[str, Running] = {}
        self._in_step: frozenset[str] = frozenset()
        self._due: list[Any] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, running: Running) -> None:
        """Takes up a sequence."""
        with self._lock:
            self._rows[running.id] = running

    def find(self, name: str) -> Running | None:
        """The sequence of this name, None if it is forgotten."""
        return self._rows.get(name)

    def live(self, name: str) -> Running | None:
        """The sequence of this name, None if it is over."""
        row = self._rows.get(name)
        return None if row is None or row.over else row

    def all(self) -> list[Running]:
        """All sequences, the oldest first."""
        with self._lock:
            return list(self._rows.values())

    def begin_step(self, names: Sequence[str]) -> list[Running | None]:
        """The sequences of a step, None in place of those that are over; their leases stay until `end_step`."""
        with self._lock:
            self._in_step = frozenset(names)
            return [self.live(name) for name in names]

    def end_step(self) -> None:
        """Gives back what ended while the step was running."""
        with self._lock:
            due, self._due, self._in_step = self._due, [], frozenset()
        for lease in due:
            self._release(lease)

    def end(self, running: Running, *, forget: bool = True) -> bool:
        """Whether this call ended it; without `forget` it can still be found."""
        with self._lock:
            first, running.over = not running.over, True
            lease, running.lease = running.lease, None
            if lease is not None and running.id in self._in_step:
                self._due.append(lease)
                lease = None
            if forget:
                self._rows.pop(running.id, None)
        if lease is not None:
            self._release(lease)
        return first

    def fail(self, running: Running, error: ModicumError) -> None:
        """Ends it and tells the error, if it was not over."""
        if self.end(running):
            tell([(running, error)])


def tell(news: Iterable[tuple[Running, Step | ModicumError]]) -> None:
    """Hands tokens and errors to the event loops of their sequences, with one wake-up for each loop."""
    loops = defaultdict(list)
    for running, what in news:
        loops[running.loop].append((running, what))
    for loop, items in loops.items():
        # a loop that is closed has nobody left who waits
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_arrive, items)


def _arrive(items: list[tuple[Running, Step | ModicumError]]) -> None:
    for running, what in items:
        running.arrived.put_nowait(what)
