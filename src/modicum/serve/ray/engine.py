"""Several engines behind one: requests go to replicas under Ray Serve, by adapter."""

# Ray is an extra that is not where types are checked
# pyright: reportMissingImports=false
from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, MissingExtraError, ModicumError
from modicum.jobs.cluster import join
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

_DEPLOYMENT = "engine"
#: versions that are remembered
_MOST_KNOWN = 100_000
#: batches of a replica's, running and waiting there; more go to others, also if they have another adapter in memory
_BATCHES = 2
#: where Ray is told how many seconds a request waits for a replica that has its adapter; its own second is long
_PATIENCE = "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S"


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
        cpus: float = 1.0,
    ) -> None:
        """`store`: one that every machine finds at the same place; `cpus`: what each replica asks the cluster for.

        Raises:
            MissingExtraError: Ray is not installed.
        """
        os.environ.setdefault(_PATIENCE, "0.1")
        try:
            import ray  # noqa: F401
            from ray import serve  # noqa: F401
        except ImportError as error:
            raise MissingExtraError(
                f"several replicas need Ray Serve ({error}): pip install 'modicum[ray]'"
            ) from error
        self._settings, self._store, self._cpus = settings, store, cpus
        # a cluster may have several servers, and an application of the same name would take the place of theirs
        self._name = f"modicum-{secrets.token_hex(4)}"
        self._observer = observer or Observer()
        self._handle: Any = None
        # Ray refuses to wait in a thread that has an event loop, and its processes end with the thread that began them
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="modicum-ray")
        #: whether this process came into the cluster here, and whether the cluster ends with it
        self._joined = self._own = False
        self._asked = self._prompt = self._generated = 0
        self._closing = False
        #: versions that the store was asked for here, so that it is known which entry of its log they are
        self._known: set[str] = set()
        #: by replica, the one that spoke last at the end
        self._reports: dict[str, Report] = {}

    def start(self) -> None:
        """Starts the replicas and returns when all of them take requests; a cluster is started if none is named.

        Raises:
            ConfigError: nothing answers at `RAY_ADDRESS`, this machine has too little for all of them, or they do not
                start; the message says why.
        """
        self._thread.submit(self._begin).result()

    def _begin(self) -> None:
        import ray

        if not ray.is_initialized():
            self._own = join(ray)
            self._joined = True
        try:
            self._deploy()
        except BaseException:
            self._end()
            raise

    def _deploy(self) -> None:
        from ray import serve

        from modicum.serve.ray.replica import Replica

        settings, wanted = self._settings, self._wanted()
        # requests come through our own server
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(
            Replica,
            name=_DEPLOYMENT,
            num_replicas=settings.replicas,
            max_ongoing_requests=_BATCHES * settings.max_batch,
            ray_actor_options=wanted,
            # one that cannot start is told of at once
            max_constructor_retry_count=settings.replicas,
            graceful_shutdown_timeout_s=5.0,
        )
        alone = dataclasses.replace(settings, replicas=1, model=_everywhere(settings.model))
        address = None if self._store is None else _everywhere(self._store.location)
        try:
            handle = serve.run(deployment.bind(alone, address), name=self._name, route_prefix=None)
        except RuntimeError as error:
            raise ConfigError(f"the replicas do not start: {self._told(error)}") from error
        self.max_length = handle.about.remote().result()
        self._handle = handle

    def _told(self, error: Exception) -> str:
        """Why the replicas do not start, as far as Ray knows."""
        from ray import serve

        application = serve.status().applications.get(self._name)
        deployment = application and application.deployments.get(_DEPLOYMENT)
        message = (deployment.message if deployment else "").strip() or str(error).strip()
        return message.splitlines()[-1] if message else type(error).__name__

    def _wanted(self) -> dict[str, float]:
        """What each replica asks the cluster for: a GPU where there are some, unless the settings say otherwise."""
        import ray

        there, replicas = ray.cluster_resources(), self._settings.replicas
        wanted = {"CPU": self._cpus}
        if self._settings.device != "cpu" and there.get("GPU"):
            wanted["GPU"] = 1.0
        short = [
            f"{replicas * each:g} {what}s, and it has {there.get(what, 0):g}"
            for what, each in wanted.items()
            if replicas * each > there.get(what, 0)
        ]
        # other clusters may grow
        if short and self._own:
            raise ConfigError(f"{replicas} replicas on this machine need {'; '.join(short)}")
        return {f"num_{what.lower()}s": each for what, each in wanted.items()}

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

        if self._own:
            serve.shutdown()
        elif self._name in serve.status().applications:
            serve.delete(self._name)
        if self._joined:
            ray.shutdown()
        self._joined = self._own = False

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
        told, finished = 0, False
        try:
            # whoever has the last step asks for nothing more, so nothing can be counted behind it
            async for part in stream:
                if not isinstance(part, list):
                    self._heard(part)
                    continue
                self._prompt += 0 if told else len(request.prompt)
                for step in part:
                    told += 1
                    self._generated += 1
                    finished = step.finish is not None
                    yield step
        except Exception as error:
            raise _cause(error) from error
        finally:
            self._asked -= 1
            if not finished:
                stream.cancel()

    async def load(self, version: str, *, pin: bool = False) -> Resident:
        """The version, in memory of a replica; requests for it go there, and to others while that one is busy.

        It is pinned there alone.
        """
        await self._look_up(version)
        try:
            return await self._at(version).load.remote(version, pin=pin)
        except Exception as error:
            raise _cause(error) from error

    async def unpin(self, version: str) -> None:
        """Returns when the version may leave the memory of a replica that has it, not always the one that pinned it."""
        await self._at(version).unpin.remote(version)

    async def unload(self, version: str) -> bool:
        """Whether it was in the memory of a replica that has had it, and is no longer.

        Every replica asks the store itself whether what it has in memory is still the same.
        """
        if version not in self._known:
            return False
        self._known.discard(version)
        return await self._at(version).unload.remote(version)

    def residents(self) -> list[Resident]:
        """What the replicas have in memory, as they last said with an answer."""
        return [one for report in self._reports.values() for one in report.residents]

    def stats(self) -> EngineStats:
        """What the replicas do, as they last said with an answer; what is asked and answered as counted here."""
        reports = [report.stats for report in self._reports.values()]
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

    def _heard(self, report: Report) -> None:
        self._reports.pop(report.replica, None)
        self._reports[report.replica] = report
        # of those that were replaced there will be no other
        while len(self._reports) > self._settings.replicas:
            self._reports.pop(next(iter(self._reports)))

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


def _everywhere(place: str) -> str:
    """A folder by a name that holds in processes with another working folder; anything else as it is."""
    return str(Path(place).resolve()) if Path(place).is_dir() else place
