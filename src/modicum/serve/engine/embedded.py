"""The embedded engine: Transformers' continuous batching with an adapter of its own for every sequence.

    generate() → the version is loaded in a thread → queue of places → generation thread → tokens

The first of those that wait, as many as half of the slots, have their versions loaded and hold them until they run. So
a place is never waited for by a load, what is fetched is never evicted before its turn, and a thousand waiting requests
want no thousand slots.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from modicum.errors import ConfigError
from modicum.serve.engine.admission import Pace, check, known_dtype, longest
from modicum.serve.engine.batching import Batching, Counts
from modicum.serve.engine.interface import (
    AdapterUnavailableError,
    Engine,
    EngineStats,
    GenerationError,
    InUseError,
    Observer,
    OverloadedError,
    PoolStats,
)
from modicum.serve.engine.running import Running, Table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from modicum.serve.engine.interface import Request, Resident, Step
    from modicum.serve.settings import EngineSettings
    from modicum.serve.source import Source
    from modicum.store import Store
    from modicum.store.record import Record

#: sequences beyond a full batch that have joined it, so that a free place is never waited for
_AHEAD = 0.25
#: the share of the slots for versions of sequences that run or wait; the others keep what may be asked for again
_FETCHED = 0.5
#: threads that load versions: out of a folder, where more would wait for each other, as one thread runs Python at a
#: time; and out of a database, which is waited for
_LOADERS, _LOADERS_AWAY = 1, 8
#: deaths of the generation thread, one after the other without a step between, after which it is given up
_DEATHS = 3
#: seconds between two looks at the generation thread, and between two tries for a slot
_LOOK, _RETRY = 0.1, 0.01


def open_engine(
    settings: EngineSettings, store: Store | Source | None, observer: Observer | None = None
) -> tuple[EmbeddedEngine, Any]:
    """The engine of the model that `settings` names, not started, and the model's tokenizer.

    Adapters come from `store`; without one the base model is served alone. Code of model folders is never run.

    Raises:
        ConfigError: no such model or tokenizer, or settings that do not fit it.
    """
    from modicum.models.loading import load_base, load_tokenizer
    from modicum.store.store import SCHEMES

    tokenizer = load_tokenizer(settings.model)
    model = load_base(settings.model, dtype=known_dtype(settings.dtype))
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    read = None if store is None else store.get
    away = store is not None and store.location.startswith(SCHEMES)
    ends = end_tokens(model, tokenizer)
    # a quantized model of another library refuses to be moved, even to where it is
    if model.device.type != torch.device(device).type:
        model = model.to(device)
    loaders = _LOADERS_AWAY if away else _LOADERS
    return EmbeddedEngine(
        model, settings, read=read, observer=observer, eos_token_ids=ends, loaders=loaders
    ), tokenizer


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: those of the generation settings, of the model and of the tokenizer."""
    found: set[int] = set()
    for ends in (
        model.generation_config.eos_token_id,
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    ):
        if ends is not None:
            found |= {ends} if isinstance(ends, int) else set(ends)
    return sorted(found)


class EmbeddedEngine(Engine):
    """Continuous batching in this process, on a processor or a GPU.

    `model` is a causal language model, whose linear layers are replaced while adapters are served; `read` gives the
    record of a version (`ada@3`) to each of `loaders` threads, without it the base model is served alone.

    Raises:
        ConfigError: settings that do not fit the model or each other.
    """

    def __init__(
        self,
        model: Any,
        settings: EngineSettings,
        *,
        read: Callable[[str], Record] | None = None,
        observer: Observer | None = None,
        eos_token_ids: Sequence[int] = (),
        loaders: int = _LOADERS,
    ) -> None:
        self.max_length = longest(model, settings)
        self._model, self._settings, self._eos = model.eval(), settings, tuple(eos_token_ids)
        self._vocabulary = model.get_input_embeddings().num_embeddings
        self._observer = observer or Observer()
        self._counts = Counts()
        self._slots = self._pool(read)
        self._table = Table(self._release)
        self._numbers = itertools.count()
        self._loaders = ThreadPoolExecutor(loaders, thread_name_prefix="modicum-load")
        self._batching: Batching | None = None
        self._watch: threading.Thread | None = None
        self._closing = threading.Event()
        self._dead = False
        self._queues: tuple[asyncio.Semaphore, asyncio.Semaphore] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ends = Pace()

    def _pool(self, read: Callable[[str], Record] | None) -> Any:
        if read is None:
            return None
        from modicum.serve.engine.slots import Slots

        settings = self._settings
        return Slots(
            self._model, read, slots=settings.slots, max_rank=settings.max_rank, observer=self._observer
        )

    def start(self) -> None:
        """Returns when requests can be taken.

        Raises:
            ConfigError: keys and values do not fit into memory, or this Transformers keeps them otherwise.
        """
        if self._batching is not None:
            return
        try:
            self._batching = self._begin()
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ConfigError(
                f"keys and values of {self._settings.cache_tokens:,} tokens do not fit into memory; start with fewer "
                f"cache_tokens ({error})"
            ) from error
        self._watch = threading.Thread(target=self._look_after, name="modicum-watch", daemon=True)
        self._watch.start()

    def _begin(self) -> Batching:
        return Batching(
            self._model, self._settings, self._eos, self._table, self._counts, self._observer, self._slots
        )

    def _look_after(self) -> None:
        """Begins anew when an error has ended the generation thread, until that happens without any progress."""
        deaths, tokens = 0, -1
        while not self._closing.wait(_LOOK):
            batching = self._batching
            if batching is not None and batching.alive:
                continue
            deaths = deaths + 1 if self._counts.generated_tokens == tokens else 1
            tokens = self._counts.generated_tokens
            self._batching = None
            if batching is not None:
                batching.stop()
            for row in self._table.all():
                # those that still wait go to the thread that comes next
                if row.joined:
                    self._table.fail(row, GenerationError("the engine failed, and begins anew"))
            if deaths >= _DEATHS:
                self._dead = True
                return
            # without memory, say, which may come back until the next look
            with contextlib.suppress(Exception):
                self._batching = self._begin()

    async def close(self, grace: float = 0.0) -> None:
        """Returns when nothing runs any more: what has not ended after `grace` seconds fails."""
        self._closing.set()
        until = time.monotonic() + grace
        while len(self._table) and time.monotonic() < until:  # noqa: ASYNC110 - they end in another thread
            await asyncio.sleep(_RETRY)
        for row in self._table.all():
            self._table.fail(row, GenerationError("the engine was stopped"))
        await asyncio.get_running_loop().run_in_executor(None, self._end)

    def _end(self) -> None:
        if self._watch is not None:
            self._watch.join()
        if self._batching is not None:
            self._batching.stop()
            self._batching = None
        self._loaders.shutdown(cancel_futures=True)
        if self._slots is not None:
            self._slots.remove()
            self._slots = None

    @property
    def alive(self) -> bool:
        """Whether requests are taken and make progress."""
        return (
            self._batching is not None
            and not self._dead
            and not self._closing.is_set()
            and self._batching.alive
        )

    async def generate(self, request: Request) -> AsyncIterator[Step]:
        """The tokens as they come, the last with a `finish`; closing the iterator early cancels the request.

        Raises:
            OverloadedError: the queue is full.
            AdapterUnavailableError: the version cannot be had.
            ConfigError: the request makes no sense, or does not fit into `max_length`.
            GenerationError: it failed later on, e.g. because the adapter gave NaN.
        """
        check(request, self.max_length, self._vocabulary)
        fetched, places = self._room()
        row = Running(next(self._numbers), request, asyncio.get_running_loop())
        self._table.add(row)
        try:
            async with fetched:
                if request.version is not None:
                    row.lease = await self._lease(row, request.version)
                async with places:
                    await self._join(row)
                    while True:
                        what = await row.arrived.get()
                        if isinstance(what, Exception):
                            raise what
                        yield what
                        if what.finish is not None:
                            self._ends.one()
                            return
        finally:
            if not row.over and self._batching is not None:
                self._batching.cancel(row.id)
            # one that finished is forgotten when its pages are
            self._table.end(row, forget=not row.over)

    async def _join(self, row: Running) -> None:
        """Returns when the generation thread has it; where that has died, the one that comes next."""
        while not row.over:
            batching = self._batching
            if batching is not None and batching.alive:
                # before it is so: whoever ends the thread looks for it
                row.joined = True
                if batching.add(row):
                    return
                row.joined = False
            elif self._dead or self._closing.is_set():
                break
            await asyncio.sleep(_RETRY)
        raise self._stopped()

    def _stopped(self) -> GenerationError:
        return GenerationError("the engine was stopped" if self._closing.is_set() else "the engine failed")

    async def _lease(self, row: Running, version: str) -> Any:
        while (slots := self._slots) is not None and not row.over:
            with contextlib.suppress(InUseError):
                return await self._in_thread(slots.acquire, version)
            await asyncio.sleep(_RETRY)
        if row.over:
            raise self._stopped()
        raise AdapterUnavailableError(f"{version}: adapters are not served here, only the base model")

    async def _in_thread(self, acquire: Callable[[str], Any], version: str) -> Any:
        """The lease, which goes back if nobody waits for it any more."""
        # in this task's context, so that an observer can tell whose load it was
        context, loop = contextvars.copy_context(), asyncio.get_running_loop()
        future = loop.run_in_executor(self._loaders, lambda: context.run(acquire, version))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            future.add_done_callback(self._unwanted)
            raise

    def _unwanted(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._release(future.result())

    def _release(self, lease: Any) -> None:
        if self._slots is not None:
            self._slots.release(lease)

    def _room(self) -> tuple[asyncio.Semaphore, asyncio.Semaphore]:
        """Who may have a version loaded, and who may join the batch, if there is room to wait for that."""
        if not self.alive:
            if self._dead or self._closing.is_set() or self._batching is None:
                raise OverloadedError("the engine is stopped", retry_after=10.0)
            raise OverloadedError("the engine begins anew after an error", retry_after=1.0)
        waiting = len(self._table) - self._settings.max_batch
        if waiting >= self._settings.max_queue:
            raise OverloadedError(
                f"{len(self._table)} requests are running or waiting, no more are taken",
                retry_after=self._ends.seconds(max(1, waiting)),
            )
        loop = asyncio.get_running_loop()
        if self._queues is None or self._loop is not loop:
            batch, slots = self._settings.max_batch, self._settings.slots
            places = batch + max(1, int(batch * _AHEAD))
            fetched = max(places, int(slots * _FETCHED))
            self._queues, self._loop = (asyncio.Semaphore(fetched), asyncio.Semaphore(places)), loop
        return self._queues

    async def load(self, version: str, *, pin: bool = False) -> Resident:
        """The version, in memory now; a pinned one stays there."""
        if self._slots is None:
            raise AdapterUnavailableError(f"{version}: adapters are not served here, only the base model")
        load = functools.partial(self._slots.load, version, pin=pin)
        return await asyncio.get_running_loop().run_in_executor(self._loaders, load)

    async def unpin(self, version: str) -> None:
        """Returns when the version may leave memory again."""
        if self._slots is not None:
            self._slots.unpin(version)

    async def unload(self, version: str) -> bool:
        """Whether it was in memory and is no longer; what is running under it finishes first."""
        return self._slots is not None and self._slots.unload(version)

    def residents(self) -> list[Resident]:
        """All adapters in memory, the last used first."""
        slots = self._slots
        return [] if slots is None else slots.residents()

    def stats(self) -> EngineStats:
        """What it is doing now."""
        # another thread may ask while this one closes
        batching, slots = self._batching, self._slots
        rows, counts = [row for row in self._table.all() if not row.over], self._counts
        running = sum(row.started for row in rows)
        return EngineStats(
            running=running,
            waiting=len(rows) - running,
            steps=counts.steps,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            generated_tokens=counts.generated_tokens,
            last_batch=counts.last_batch,
            cache_used=0.0 if batching is None else batching.cache_used(),
            pool=PoolStats() if slots is None else slots.stats(),
        )
