"""A server from its first to its last moment: everything opened in order, requests answered, everything closed.

SIGTERM or SIGINT → no new connections, new requests are sent away → running ones get `grace` seconds → what is left
ends with an error event → engine, store and files are closed. A second signal does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import signal
import socket
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, final

import uvicorn

from modicum.errors import ConfigError, StoreError
from modicum.serve.api.app import build
from modicum.serve.api.gate import is_loopback
from modicum.serve.costs import Tariff
from modicum.serve.engines import open_engine
from modicum.serve.experiments import Experiments
from modicum.serve.keys import Keys
from modicum.serve.limits import Limits
from modicum.serve.logs import RequestLog
from modicum.serve.metrics import Metrics
from modicum.serve.names import Names
from modicum.serve.service import Service
from modicum.serve.source import Source
from modicum.serve.state import default_state
from modicum.serve.traces import Traces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modicum.serve.metrics import Observed
    from modicum.serve.settings import Settings

log = logging.getLogger("modicum.serve")
#: seconds between two writes of what was used
_FLUSH = 1.0
#: connections that wait to be accepted, and files that a server may need for those that are
_BACKLOG, _FILES = 2048, 1 << 16
#: seconds that a connection stays without a request
_IDLE = 30
#: versions whose entries are remembered, and names, for every adapter that memory has room for: while the store is away
#: no others can be served
_REMEMBERED = 4
#: seconds after the grace for last words to be sent
_LAST_WORDS = 5


@contextlib.contextmanager
def open_service(settings: Settings) -> Iterator[Service]:
    """Everything a server needs, ready for requests; closed when the block is left.

    Raises:
        ConfigError: settings that do not fit, or a wider address without keys.
        StoreError: store or state cannot be opened.
    """
    from modicum.store import Store

    with contextlib.ExitStack() as stack:
        state = settings.state or default_state()
        keys = stack.enter_context(Keys(state))
        check_reach(settings, keys)
        limits = stack.enter_context(Limits(state))
        store = stack.enter_context(Store(settings.store)) if settings.store else None
        metrics = stack.enter_context(_metrics(settings))
        remembered = _REMEMBERED * settings.engine.slots * settings.engine.replicas
        source = None if store is None else Source(store, remembered)
        engine, tokenizer = open_engine(settings.engine, source, metrics)
        experiments = stack.enter_context(Experiments(state, store, base_name=settings.base_name))
        names = Names(store, experiments, settings.base_name, remembered)
        stack.callback(names.close)
        metrics.watch(engine)
        opened = (engine, tokenizer, names, keys, limits, metrics, experiments, store, source)
        yield Service(replace(settings, state=state), *opened)


@contextlib.contextmanager
def _metrics(settings: Settings) -> Iterator[Metrics]:
    with contextlib.ExitStack() as stack:
        sinks: list[Callable[[Observed], None]] = [RequestLog(prompts=settings.log_prompts)]
        if settings.traces is not None:
            traces = Traces.open(settings.traces)
            stack.callback(traces.close)
            sinks.append(traces)
        tariff = None if settings.prices is None else Tariff.read(settings.prices)
        metrics = Metrics(tariff=tariff, sinks=sinks)
        stack.callback(metrics.close)
        yield metrics


def check_reach(settings: Settings, keys: Keys) -> None:
    """Returns if whoever reaches the server is known, or only this machine does.

    Raises:
        ConfigError: other machines would reach it, and there is no key.
    """
    usable = any(key.revoked is None for key in keys.list())
    if not is_loopback(settings.host) and not usable:
        raise ConfigError(
            f"--host {settings.host} lets other machines in, and there is no key yet, so that all of them could use "
            "and administer this server. Make keys first (`modicum serve keys add NAME --adapters '*'`), or stay on "
            "127.0.0.1"
        )


def bind(settings: Settings) -> socket.socket:
    """A socket on the address of the settings, which nobody can connect to yet.

    Raises:
        ConfigError: it is taken, or not of this machine.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            settings.host.strip("[]"), settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, proto)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except BaseException:
            made.close()
            raise
    except OSError as error:
        hint = "; --port 0 takes a free one" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}{hint}"
        ) from error
    return made


@final
class Server:
    """Answers requests on one socket until it is told to stop."""

    def __init__(self, service: Service, listener: socket.socket) -> None:
        self._service, self._socket = service, listener
        settings = service.settings
        self._gate = build(service)
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                self._gate,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=settings.log_access,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_IDLE,
                timeout_graceful_shutdown=int(settings.grace) + _LAST_WORDS,
                callback_notify=self._listening,
                headers=[("X-Content-Type-Options", "nosniff")],
            )
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None
        self._ready: Callable[[], None] | None = None

    def run(self, ready: Callable[[], None] = lambda: None) -> None:
        """Returns when the server has stopped; `ready` is called as soon as requests are answered."""
        self._ready = ready
        _allow_files()
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            runner.run(self._serve())

    def stop(self) -> None:
        """Returns at once; the server stops as after a signal. Any thread may call it."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_to_end)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._service.engine.start()
        flushing = asyncio.ensure_future(self._flush())
        try:
            await self._uvicorn.serve([self._socket])
        finally:
            flushing.cancel()
            await asyncio.gather(flushing, return_exceptions=True)
            if self._ending is not None:
                await self._ending
            await self._service.engine.close()

    async def _listening(self) -> None:
        """Called by uvicorn when it listens, and now and then later on."""
        if self._ready is None or self._loop is None:
            return
        if threading.current_thread() is threading.main_thread():
            # what there is now stays until the process ends: all would wait while it is looked through for garbage
            gc.collect()
            gc.freeze()
            # in place of uvicorn's, which would end the process before everything is closed
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._begin_to_end)
        self._ready()
        self._ready = None

    def _begin_to_end(self) -> None:
        again = self._ending is not None
        self._gate.close()
        self._uvicorn.should_exit = True
        grace = 0.0 if again else self._service.settings.grace
        self._ending = asyncio.ensure_future(self._service.engine.close(grace))

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH)
            try:
                await asyncio.to_thread(self._service.limits.flush)
            except StoreError as error:
                log.warning("what was used is not on the disk yet: %s", error)


def _allow_files() -> None:
    """A connection is an open file, and many systems begin with 1024 of them."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
