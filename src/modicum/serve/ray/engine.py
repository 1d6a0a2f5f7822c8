"""Several engines behind one: requests go to replicas under Ray Serve, by adapter."""

# Ray is an extra that is not where types are checked
# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, MissingExtraError, ModicumError
from modicum.serve.engine.interface import (
    AdapterUnavailableError,
    Engine,
    EngineStats,
    GenerationError,
    Observer,
    OverloadedError,
    PoolStats,
    Request,
    Resident,
    Step,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from modicum.serve.ray.replica import Report
    from modicum.serve.settings import EngineSettings
    from modicum.serve.source import Source
    from modicum.store import Store

#: versions that are remembered
_MOST_KNOWN = 100_000


class RayEngine(Engine):
    """`replicas` engines on the machines of a Ray cluster, or in processes of this one.

    A request for a version goes to a replica that has had it if that one has room, otherwise to any: all can serve all.
    """

    def __init__(
        self,
        settings: EngineSettings,
        store: Store | Source | None,
        *,
        observer: Observer | None = None,
        name: str = "modicum",
        cpus: float = 1.0,
    ) -> None:
        """`store`: one that every machine finds at the same place; `cpus`: what each replica asks the cluster for.

        Raises:
            MissingExtraError: Ray is not installed.
        """
        try:
            import ray  # noqa: F401
            from ray import serve  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                f"several replicas need Ray Serve ({error}): pip install 'modicum[ray]'"
            ) from error
        self._settings, self._store, self._name, self._cpus = settings, store, name, cpus
        self._observer = observer or Observer()
        self._handle: Any = None
        # Ray refuses to wait in a thread that has an event loop, and its processes end with the thread that began them
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="modicum-ray")
        self._began = False
        self._asked = self._prompt = self._generated = 0
        self._closing = False
        #: versions that the store was asked for here, so that it is known which entry of its log they are
        self._known: set[str] = set()
        self._reports: dict[str, tuple[float, Report]] = {}

    def start(self) -> None:
        """Starts the replicas and returns when all of them take requests; a cluster is started if there is none."""
        self._thread.submit(self._begin).result()

    def _begin(self) -> None:
        import ray
        from ray import serve

        from modicum.serve.ray.replica import Replica

        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
            self._began = True
        # requests come through our own server
        serve.start(proxy_location="Disabled")
        settings = self._settings
        deployment = serve.deployment(
            Replica,
            name="engine",
            num_replicas=settings.replicas,
            max_ongoing_requests=settings.max_batch + settings.max_queue,
            ray_actor_options={"num_cpus": self._cpus},
            graceful_shutdown_timeout_s=5.0,
        )
        alone = dataclasses.replace(settings, replicas=1)
        address = None if self._store is None else self._store.location
        self._handle = serve.run(deployment.bind(alone, address), name=self._name, route_prefix=None)
        self.max_length = self._handle.about.remote().result()

    async def close(self, grace: float = 0.0) -> None:
        """Returns when the replicas have ended, and the cluster if it was started here."""
        self._closing = True
        end = time.monotonic() + grace
        while self._asked and time.monotonic() < end:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(0.02)
        if self._handle is not None:
            self._handle = None
            await asyncio.get_running_loop().run_in_executor(self._thread, self._end)
        self._thread.shutdown()

    def _end(self) -> None:
        import ray
        from ray import serve

        serve.delete(self._name)
        if self._began:
            serve.shutdown()
            ray.shutdown()

    @property
    def alive(self) -> bool:
        """Whether requests are passed on."""
        return self._handle is not None and not self._closing

    async def generate(self, request: Request) -> AsyncIterator[Step]:
        """See `Engine.generate`."""
        if not self.alive:
            raise GenerationError("the engine takes no requests any more")
        most = self._settings.replicas * (self._settings.max_batch + self._settings.max_queue)
        if self._asked >= most:
            raise OverloadedError(f"{self._asked} requests run or wait already; try again later")
        await self._look_up(request.version)
        self._asked += 1
        stream = self._at(request.version).options(stream=True).generate.remote(request)
        finished = False
        try:
            async for part in stream:
                if not isinstance(part, list):
                    self._reports[part.replica] = time.monotonic(), part
                    continue
                for step in part:
                    self._generated += 1
                    finished = step.finish is not None
                    yield step
            self._prompt += len(request.prompt)
        except Exception as error:
            raise _cause(error) from error
        finally:
            self._asked -= 1
            if not finished:
                stream.cancel()

    async def load(self, version: str, *, pin: bool = False) -> Resident:
        """The version, in memory of one replica, to which requests for it go from now on."""
        try:
            return await self._at(version).load.remote(version, pin=pin)
        except Exception as error:
            raise _cause(error) from error

    async def unpin(self, version: str) -> None:
        """Returns when the version may leave the memory of the replica that its requests go to."""
        await self._at(version).unpin.remote(version)

    async def unload(self, version: str) -> bool:
        """Whether it was in the memory of the replica that its requests go to, and is no longer."""
        self._known.discard(version)
        return await self._at(version).unload.remote(version)

    def residents(self) -> list[Resident]:
        """What the replicas have in memory, as they last said with an answer."""
        return [one for _, report in self._reports.values() for one in report.residents]

    def stats(self) -> EngineStats:
        """What the replicas do, as they last said with an answer; what is asked and answered as counted here."""
        reports = [report.stats for _, report in self._reports.values()]
        pools = [one.pool for one in reports]
        running = min(self._asked, self._settings.replicas * self._settings.max_batch)
        return EngineStats(
            running=running,
            waiting=self._asked - running,
            steps=sum(one.steps for one in reports),
            prompt_tokens=self._prompt,
            cached_tokens=sum(one.cached_tokens for one in reports),
            generated_tokens=self._generated,
            last_batch=sum(one.last_batch for one in reports),
            cache_used=max((one.cache_used for one in reports), default=0.0),
            pool=PoolStats(
                **{
                    field.name: sum(getattr(pool, field.name) for pool in pools)
                    for field in dataclasses.fields(PoolStats)
                }
            ),
        )

    async def _look_up(self, version: str | None) -> None:
        """Returns if the store has a version that is asked for here for the first time."""
        if version is None or version in self._known:
            return
        if self._store is None:
            raise AdapterUnavailableError(f"{version}: adapters are not served here, only the base model")
        try:
            await asyncio.to_thread(self._store.get, version)
        except ModicumError as error:
            raise AdapterUnavailableError(f"{version} cannot be served: {error}") from error
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known.add(version)

    def _at(self, version: str | None) -> Any:
        if self._handle is None:
            raise ConfigError("the engine has not been started, or was closed")
        return self._handle if version is None else self._handle.options(multiplexed_model_id=version)


def _cause(error: Exception) -> Exception:
    """What a replica raised, without what Ray wraps around it."""
    found = getattr(error, "cause", None)
    if isinstance(found, ModicumError):
        return found
    return error if isinstance(error, ModicumError) else GenerationError(f"a replica failed: {error}")
