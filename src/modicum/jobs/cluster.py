"""Ray: the tasks of a pool on several machines, or in several processes of this one."""

# Ray is an extra that is not where types are checked
# pyright: reportMissingImports=false
from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from modicum.errors import ConfigError, MissingExtraError
from modicum.jobs.pool import Outcome, Pool, Task, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

#: names the head of a cluster, as Ray itself has it
ADDRESS = "RAY_ADDRESS"
#: how often a task is begun again whose process or machine died
RETRIES = 3
_QUIET = {"configure_logging": False, "log_to_driver": False}


def require_ray() -> Any:
    """Ray.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(
            f"tasks on a cluster need Ray ({error}): pip install 'modicum[ray]'"
        ) from error
    return ray


@final
class Cluster(Pool):
    """Tasks on the Ray cluster that `RAY_ADDRESS` names, else on one of this machine, which ends with the block.

    A task whose process or machine dies is begun again: so one that is done twice must leave what it leaves when it is
    done once. What a task raises is told, and the task is not begun again. Tasks work in the folder of the same path as
    this process does, where there is one. Within the block what is printed goes to standard error: Ray prints who died.
    """

    def __init__(
        self, count: int, threads: int | None = None, *, fresh: bool = False, retries: int = RETRIES
    ) -> None:
        """`threads`: cores that each task has for itself; as many as all of them can have when unset.

        `fresh`: a process for each task, whose memory is its alone; otherwise a process does one after the other.

        Raises:
            MissingExtraError: Ray is not installed.
        """
        self._ray = require_ray()
        self.count, self.threads = count, threads or 0
        self._fresh, self._retries = fresh, retries
        self._began = False
        self._open = contextlib.ExitStack()
        self._run: Any = None
        #: reference of a result -> key of its task
        self._running: dict[Any, Hashable] = {}

    @property
    def running(self) -> int:
        """How many tasks were started and not waited for."""
        return len(self._running)

    def start(self, task: Task) -> None:
        """Hand `task` to the cluster."""
        started = self._run.remote(task.call, task.arguments, self.threads, str(Path.cwd()))
        self._running[started] = task.key

    def wait(self) -> list[Outcome]:
        """What has ended since; waits for the first one."""
        ended, _ = self._ray.wait(list(self._running))
        return [self._outcome(one, self._running.pop(one)) for one in ended]

    def __enter__(self) -> Self:
        """Join the cluster.

        Raises:
            ConfigError: nothing answers at `RAY_ADDRESS`, or no machine has so many cores.
        """
        # a program that has joined a cluster itself means that one
        if not self._ray.is_initialized():
            self._began = True
        self._open.enter_context(contextlib.redirect_stdout(sys.stderr))
        try:
            if self._began:
                self._begin()
            self._plan()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for one in self._running:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.cancel(one, force=True)
        self._running.clear()
        if self._began:
            self._ray.shutdown()
        self._open.close()

    def _begin(self) -> None:
        """Join the cluster that is named, or start one here that has room for all tasks and no more."""
        import torch

        cores = self.count * (self.threads or max(1, torch.get_num_threads() // self.count))
        # memory that runs out is tried again as often as anything else, not for ever
        join(self._ray, num_cpus=cores, _system_config={"task_oom_retries": self._retries})

    def _plan(self) -> None:
        """Find what each task may take."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cores = [int(machine.get("CPU", 0)) for machine in machines]
        most = max(cores)
        self.threads = self.threads or threads_for(cores, self.count)
        if self.threads > most:
            raise ConfigError(
                f"a task takes {self.threads} threads, and no machine of the cluster has more than {most} cores"
            )
        gpu = gpu_for(sum(int(machine.get("GPU", 0)) for machine in machines), self.count)
        self.share = gpu or self.threads / most
        options = {"num_cpus": self.threads, "num_gpus": gpu, "max_calls": int(self._fresh)}
        self._run = self._ray.remote(max_retries=self._retries, **options)(_work)

    def _outcome(self, ended: Any, key: Hashable) -> Outcome:
        try:
            return Outcome(key, *self._ray.get(ended))
        except self._ray.exceptions.RayTaskError as error:
            # before or after the call: what it was given or gave cannot be read on the other side
            return Outcome(key, error=_line(error.cause), trace=str(error))
        except self._ray.exceptions.RayError as error:
            died = f"its process or its machine died {1 + self._retries} times ({_line(error)})"
            return Outcome(key, error=died, trace=str(error))


def join(ray: Any, **alone: Any) -> bool:
    """Whether a cluster was started on this machine, which ends with this process; else the named one was joined.

    `alone` is what Ray is told of a cluster that it starts.

    Raises:
        ConfigError: nothing answers at `RAY_ADDRESS`.
    """
    address = os.environ.get(ADDRESS)
    if not address:
        # by this name, for Ray would join whatever cluster it finds on this machine
        ray.init("local", include_dashboard=False, **alone, **_QUIET)
        return True
    try:
        _reach(address)
        ray.init(address, **_QUIET)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {ADDRESS}={address} ({_line(error)}); unset it to work on this machine"
        ) from error
    return False


def threads_for(cores: Sequence[int], count: int) -> int:
    """The most threads that each of `count` tasks can have at the same time on machines with so many cores; 1 at least.

    A task is on one machine: on 4 and 2 cores two tasks get 2 threads each, and not 3.
    """
    return next((t for t in range(max(cores), 1, -1) if sum(one // t for one in cores) >= count), 1)


def gpu_for(gpus: int, count: int) -> float:
    """The share of one GPU that each of `count` tasks gets, so that all of them fit; 0 without GPUs."""
    # to the fourth digit, as Ray counts
    return 10_000 // -(-count // gpus) / 10_000 if gpus else 0.0


def _work(
    call: Callable[..., Any], arguments: tuple[Any, ...], threads: int, folder: str
) -> tuple[Any, str | None, str]:
    """What a process of the cluster does."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    import torch

    torch.set_num_threads(threads)
    return attempt(call, arguments)


def _reach(address: str) -> None:
    """Returns if something listens at the `address`: Ray itself tries for minutes, and may end the process then.

    Raises:
        OSError: nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _line(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
