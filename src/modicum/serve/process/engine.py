"""An engine in a process of its own, behind our interface of engines.

HTTP, JSON and text share one interpreter's lock with each other, and none with the thread that generates. The other
process is started again when it dies, until it does so three times without a token in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import itertools
import logging
import threading
from typing import TYPE_CHECKING, Any, final

from modicum.serve.engine.interface import (
    Engine,
    EngineStats,
    GenerationError,
    Observer,
    OverloadedError,
    Resident,
    Step,
)
from modicum.serve.process.spawned import Spawned
from modicum.serve.process.wire import Wire, heard
from modicum.serve.source import Source

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from modicum.serve.engine.interface import Request
    from modicum.serve.process.wire import Message
    from modicum.serve.settings import EngineSettings
    from modicum.store import Store

log = logging.getLogger("modicum.serve")
#: deaths of the process, one after the other without a token between, after which it is given up
_DEATHS = 3
#: seconds between two tries to start it, and those that one takes about
_LOOK, _START = 0.1, 5.0
#: seconds that it has to end after the grace
_PATIENCE = 10.0
_STOPPED = "the engine was stopped"


class _Asked:
    """Something that an answer is waited for."""

    __slots__ = ("arrived", "context")

    def __init__(self) -> None:
        self.arrived: asyncio.Queue[Any] = asyncio.Queue()
        # who asks, so that an observer can tell whose load it was
        self.context = contextvars.copy_context()


@final
class ProcessEngine(Engine):
    """The engine that `settings` name for one process, in one that is started for it.

    What is in memory and what was done is known as it was told last: with an answer to `load`, `unpin` and `unload`,
    and while something happens ten times a second. What was done counts from when the process began.
    """

    def __init__(
        self, settings: EngineSettings, store: Store | Source | None, *, observer: Observer | None = None
    ) -> None:
        self._settings, self._store, self._observer = settings, store, observer or Observer()
        self._numbers = itertools.count()
        self._asked: dict[int, _Asked] = {}
        #: those of them that tokens are waited for
        self._sequences = 0
        self._pinned: set[str] = set()
        #: the last process that was started; whether it takes requests; what is said to it
        self._spawned: Spawned | None = None
        self._ready = False
        self._wire: Wire | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watch: threading.Thread | None = None
        self._closing = threading.Event()
        self._dead = False
        self._tokens = 0
        self._alive, self._stats, self._residents = False, EngineStats(), list[Resident]()
        self._hearers: dict[str, Callable[..., None]] = {
            "step": self._step,
            "failed": lambda number, error: self._ended(number, heard(error)),
            "value": lambda number, value: self._ended(number, (value,)),
            "stepped": self._observer.step,
            "loaded": self._loaded,
            "report": self._report,
            "log": lambda name, level, text: logging.getLogger(name).log(level, "%s", text),
        }

    def start(self) -> None:
        """Returns when requests can be taken.

        Raises:
            ConfigError: no such model, or settings that do not fit it; see the engine that is started.
            StoreError: the store cannot be opened.
        """
        if self._watch is not None:
            return
        spawned = self._begin()
        self._watch = threading.Thread(
            target=self._look_after, args=(spawned,), name="modicum-watch", daemon=True
        )
        self._watch.start()
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
            self._attach(spawned)

    def _begin(self) -> Spawned:
        """A process that takes requests."""
        location = None if self._store is None else self._store.location
        spawned = self._spawned = Spawned()
        try:
            if self._closing.is_set():
                spawned.kill()
            self.max_length = spawned.opened(self._settings, location, self._hear)
        except BaseException:
            spawned.kill()
            spawned.wait()
            spawned.end.close()
            raise
        self._ready = True
        return spawned

    def _look_after(self, spawned: Spawned) -> None:
        """Starts another process when one has died."""
        deaths, tokens = 0, -1
        while True:
            how = spawned.wait()
            self._ready = False
            if self._closing.is_set():
                return
            log.error("the engine failed, and begins anew: %s", how)
            if self._loop is None:
                spawned.end.close()
            self._in_loop(self._lose, f"the engine failed, and begins anew: {how}")
            deaths = deaths + 1 if self._tokens == tokens else 1
            tokens = self._tokens
            while not self._ready:
                self._dead = deaths >= _DEATHS
                if self._dead or self._closing.wait(_LOOK):
                    return
                try:
                    spawned = self._begin()
                except Exception as error:  # noqa: BLE001 - without memory, say, which may come back
                    deaths += 1
                    if not self._closing.is_set():
                        log.error("the engine does not begin: %s", error)  # noqa: TRY400 - its words are enough
            self._in_loop(self._attach, spawned)

    def _in_loop(self, call: Callable[..., None], *what: Any) -> None:
        # before somebody asks there is no loop, and in one that is closed nobody waits
        with contextlib.suppress(RuntimeError):
            if self._loop is not None:
                self._loop.call_soon_threadsafe(call, *what)

    def _attach(self, spawned: Spawned) -> None:
        """Begins to speak with a process."""
        if self._wire is None and self._ready and spawned is self._spawned:
            self._wire = Wire(spawned.end, self._hear, spawned.kill)
            for version in sorted(self._pinned):
                self._wire.send(("load", next(self._numbers), version, True))

    def _lose(self, why: str) -> None:
        """Hears the last words of a process that has ended, and fails what it did not answer."""
        wire, self._wire = self._wire, None
        while wire is not None and wire.read():
            pass
        if wire is not None:
            wire.close()
        asked, self._asked = self._asked, {}
        for one in asked.values():
            one.arrived.put_nowait(GenerationError(why))
        self._alive, self._stats, self._residents = False, EngineStats(), []

    async def close(self, grace: float = 0.0) -> None:
        """Returns when the process has ended: what has not ended after `grace` seconds fails."""
        self._closing.set()
        if self._watch is None or self._spawned is None:
            return
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._attach(self._spawned)
        if self._wire is not None:
            self._wire.send(("close", grace))
            await asyncio.to_thread(self._watch.join, grace + _PATIENCE)
        if self._watch.is_alive():
            self._spawned.kill()
            await asyncio.to_thread(self._watch.join)
        self._lose(_STOPPED)

    @property
    def alive(self) -> bool:
        """Whether requests are taken and make progress."""
        return self._ready and self._alive and not self._closing.is_set()

    async def generate(self, request: Request) -> AsyncIterator[Step]:
        """See `Engine.generate`."""
        wire = self._connected()
        number, asked = self._ask()
        wire.send(("generate", number, request))
        self._sequences += 1
        try:
            while True:
                what = await asked.arrived.get()
                if isinstance(what, Exception):
                    raise what
                yield what
                if what.finish is not None:
                    return
        finally:
            self._sequences -= 1
            if self._asked.pop(number, None) is not None:
                wire.send(("cancel", number))

    async def load(self, version: str, *, pin: bool = False) -> Resident:
        """The version, in memory now; a pinned one stays there, and comes back if the process is started again."""
        resident, entry = await self._answer(self._connected(), "load", version, pin)
        if entry is not None and isinstance(self._store, Source):
            self._store.note(version, entry)
        if pin:
            self._pinned.add(version)
        return resident

    async def unpin(self, version: str) -> None:
        """Returns when the version may leave memory again."""
        self._pinned.discard(version)
        with contextlib.suppress(OverloadedError):
            await self._answer(self._connected(), "unpin", version)

    async def unload(self, version: str) -> bool:
        """Whether it was in memory and is no longer; what is running under it finishes first."""
        self._pinned.discard(version)
        # a process that has just begun has nothing in memory
        with contextlib.suppress(OverloadedError):
            return await self._answer(self._connected(), "unload", version)
        return False

    def residents(self) -> list[Resident]:
        """All adapters in memory, the last used first."""
        return list(self._residents)

    def stats(self) -> EngineStats:
        """What it is doing; what runs and waits as counted here, since a shadow runs only while nobody waits."""
        spawned = self._spawned
        held = spawned.resident() if self._ready and spawned is not None else 0
        running = min(self._sequences, self._settings.max_batch)
        waiting = self._sequences - running
        return dataclasses.replace(self._stats, running=running, waiting=waiting, resident=held)

    def _connected(self) -> Wire:
        """What is said to the process.

        Raises:
            OverloadedError: there is none, for the moment or for good.
        """
        if self._loop is None and self._spawned is not None:
            self._loop = asyncio.get_running_loop()
            self._attach(self._spawned)
        if self._closing.is_set() or self._dead or self._watch is None:
            raise OverloadedError("the engine is stopped", retry_after=10.0)
        if self._wire is None or not self._wire.open:
            raise OverloadedError("the engine begins anew after an error", retry_after=_START)
        return self._wire

    def _ask(self) -> tuple[int, _Asked]:
        number = next(self._numbers)
        asked = self._asked[number] = _Asked()
        return number, asked

    async def _answer(self, wire: Wire, *what: Any) -> Any:
        number, asked = self._ask()
        wire.send((what[0], number, *what[1:]))
        try:
            found = await asked.arrived.get()
        finally:
            self._asked.pop(number, None)
        if isinstance(found, Exception):
            raise found
        return found[0]

    def _hear(self, message: Message) -> None:
        self._hearers[message[0]](*message[1:])

    def _step(self, number: int, *about: Any) -> None:
        self._tokens += 1
        # whoever has left is told nothing
        if (asked := self._asked.get(number)) is not None:
            step = Step(*about)
            asked.arrived.put_nowait(step)
            if step.finish is not None:
                del self._asked[number]

    def _ended(self, number: int, what: Any) -> None:
        if (asked := self._asked.pop(number, None)) is not None:
            asked.arrived.put_nowait(what)

    def _loaded(self, number: int | None, seconds: float, failed: bool) -> None:
        asked = None if number is None else self._asked.get(number)
        context = contextvars.Context() if asked is None else asked.context
        context.run(self._observer.load, seconds, failed=failed)

    def _report(self, alive: bool, stats: EngineStats, residents: list[tuple[Any, ...]], on_gpu: int) -> None:
        self._alive, self._stats = alive, dataclasses.replace(stats, gpu=on_gpu)
        self._residents = [Resident(*one) for one in residents]
