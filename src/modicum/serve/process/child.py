"""What runs in the process of an engine: `python -m modicum.serve.process.child FD`.

Everything that comes up in one turn of the event loop is said in one frame, so a step of 64 sequences is one message.
The process ends when it is told to, and when the one that started it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections import deque
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, final

from modicum.serve.engine.interface import Observer
from modicum.serve.process.wire import Wire, told

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from modicum.serve.engine.interface import Engine, Request, Resident
    from modicum.serve.process.wire import Message
    from modicum.serve.settings import EngineSettings
    from modicum.serve.source import Source
    from modicum.store import Store

#: seconds between two reports
_REPORT = 0.1
#: versions whose entries are remembered, for each slot
_REMEMBERED = 4
#: seconds for requests to hear that the engine was stopped
_LAST_WORDS = 5.0
#: the number of the request that this task or thread works for, so that a load can be put down to it
_NUMBER: ContextVar[int | None] = ContextVar("number", default=None)


@final
class Child:
    """An engine, asked by messages."""

    def __init__(self, end: socket.socket) -> None:
        # whoever started this process has nobody to wait for when it is gone
        self._wire = Wire(end, self._hear, lambda: os._exit(0))
        self._loop = asyncio.get_running_loop()
        #: what was not said yet; other threads add to it
        self._unsaid: deque[Message] = deque()
        self._due = False
        self._engine: Engine | None = None
        self._store: Store | None = None
        self._source: Source | None = None
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._others: set[asyncio.Task[None]] = set()
        self._reported: Any = None
        self.over = asyncio.Event()
        self._answers: dict[str, Callable[..., None]] = {
            "open": lambda *what: self._aside(self._open(*what)),
            "generate": lambda number, request: self._begin(number, self._generate(number, request)),
            "load": lambda number, *what: self._begin(number, self._value(number, self._load(*what))),
            "unpin": lambda number, version: self._begin(number, self._value(number, self._unpin(version))),
            "unload": lambda number, version: self._begin(number, self._value(number, self._unload(version))),
            "cancel": self._cancel,
            "close": lambda grace: self._aside(self._close(grace)),
        }

    def _hear(self, message: Message) -> None:
        self._answers[message[0]](*message[1:])

    def _begin(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        task = self._tasks[number] = self._loop.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    def _cancel(self, number: int) -> None:
        if (task := self._tasks.get(number)) is not None:
            task.cancel()

    def _say(self, *message: Any) -> None:
        self._unsaid.append(message)
        if not self._due:
            self._due = True
            # behind all that is to run in this turn
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._due = False
        self._wire.send(*(self._unsaid.popleft() for _ in range(len(self._unsaid))))

    async def _open(self, settings: EngineSettings, store: str | None) -> None:
        logging.getLogger().addHandler(_Said(self._unsaid))
        logging.getLogger("modicum.serve").setLevel(logging.INFO)
        try:
            # in a thread, so that it is noticed if the one that started this process is gone
            self._engine = await asyncio.to_thread(self._opened, settings, store)
        except Exception as error:  # noqa: BLE001 - told to whoever started this
            self._say("refused", told(error))
            await self._end()
            return
        self._report()
        self._say("ready", self._engine.max_length)
        self._aside(self._report_often())

    def _opened(self, settings: EngineSettings, location: str | None) -> Engine:
        from modicum.serve.engines import open_local
        from modicum.serve.source import Source
        from modicum.store import Store

        if location is not None:
            self._store = Store(location)
            self._source = Source(self._store, _REMEMBERED * settings.slots)
        engine, _ = open_local(settings, self._source, _Seen(self._unsaid))
        engine.start()
        # what there is now stays: all would wait while it is looked through for garbage
        gc.collect()
        gc.freeze()
        return engine

    async def _generate(self, number: int, request: Request) -> None:
        assert self._engine is not None
        _NUMBER.set(number)
        try:
            steps: Any = self._engine.generate(request)
            async with contextlib.aclosing(steps):
                async for step in steps:
                    about = step.logprob, step.top, step.finish, step.cached
                    self._say("step", number, step.token, *about)
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            self._say("failed", number, told(error))
        # what is told of an engine with nothing to do is as it is
        if len(self._tasks) == 1:
            self._report()

    async def _value(self, number: int, work: Coroutine[Any, Any, Any]) -> None:
        try:
            value = await work
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            self._say("failed", number, told(error))
        else:
            self._report()
            self._say("value", number, value)

    async def _load(self, version: str, pin: bool) -> tuple[Resident, int | None]:
        """The version in memory, and the entry of the store's log that put it."""
        assert self._engine is not None
        resident = await self._engine.load(version, pin=pin)
        return resident, None if self._source is None else self._source.entry(version)

    async def _unpin(self, version: str) -> None:
        assert self._engine is not None
        await self._engine.unpin(version)

    async def _unload(self, version: str) -> bool:
        assert self._engine is not None
        return await self._engine.unload(version)

    async def _report_often(self) -> None:
        while True:
            self._report()
            await asyncio.sleep(_REPORT)

    def _report(self) -> None:
        assert self._engine is not None
        residents = [
            (one.version, one.method, one.rank, one.bytes, one.pinned, one.requests)
            for one in self._engine.residents()
        ]
        found = self._engine.alive, self._engine.stats(), residents, _on_gpu()
        if found != self._reported:
            self._reported = found
            self._say("report", *found)
        elif self._unsaid:
            self._flush()

    async def _close(self, grace: float) -> None:
        assert self._engine is not None
        await self._engine.close(grace)
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=_LAST_WORDS)
        if self._store is not None:
            self._store.close()
        await self._end()

    async def _end(self) -> None:
        self._flush()
        await self._wire.sent()
        self._wire.close()
        self.over.set()


class _Seen(Observer):
    """Says what the engine does, with the next frame."""

    def __init__(self, unsaid: deque[Message]) -> None:
        self._unsaid = unsaid

    def step(self, sequences: int, tokens: int, seconds: float) -> None:
        self._unsaid.append(("stepped", sequences, tokens, seconds))

    def load(self, seconds: float, *, failed: bool) -> None:
        self._unsaid.append(("loaded", _NUMBER.get(), seconds, failed))


class _Said(logging.Handler):
    """Says what is written to the log, which the other process keeps."""

    def __init__(self, unsaid: deque[Message]) -> None:
        super().__init__()
        self._unsaid = unsaid

    def emit(self, record: logging.LogRecord) -> None:
        """Returns when the record will be said with the next frame."""
        self._unsaid.append(("log", record.name, record.levelno, self.format(record)))


def _on_gpu() -> int:
    torch: Any = sys.modules["torch"]
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0


async def _run(end: socket.socket) -> None:
    await Child(end).over.wait()


def main() -> None:
    """Returns when the engine was told to end."""
    # all processes are told to stop; the one that started this one says when
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end = socket.socket(fileno=int(sys.argv[1]))
    asyncio.run(_run(end))


if __name__ == "__main__":
    main()
