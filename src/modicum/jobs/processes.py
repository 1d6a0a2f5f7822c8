"""Processes of this machine: one fresh process for each task, so that memory and failures are its alone.

A process that did one task after another would report the peak of the largest one for all, and keep what they left
behind; a task that the system kills would take the next ones along. What makes fresh processes dear is importing the
libraries (5 s), so where it can be, they are forked from a server that has imported them and done nothing else (0.1 s).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, Self, final

from modicum.jobs.pool import Outcome, Pool, Task, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from multiprocessing.context import ForkServerContext, SpawnContext
    from multiprocessing.process import BaseProcess


@dataclass
class _Running:
    key: Hashable
    process: BaseProcess
    reader: Any


@final
class Processes(Pool):
    """A process for each task; a task whose process is ended is not begun again."""

    def __init__(self, count: int, threads: int, preload: Sequence[str] = ()) -> None:
        """`preload`: modules that the server of processes imports."""
        self.count, self.threads, self.share = count, threads, 1 / count
        self._context = context(preload)
        #: slot -> what runs in it
        self._running: dict[int, _Running] = {}

    @property
    def running(self) -> int:
        """How many tasks were started and not waited for."""
        return len(self._running)

    def start(self, task: Task) -> None:
        """Start `task` in a process of its own."""
        slot = next(slot for slot in range(self.count) if slot not in self._running)
        reader, writer = self._context.Pipe(duplex=False)
        arguments = (writer, task.call, task.arguments, self.threads, _environment(slot, self.threads))
        process: Any = self._context.Process(target=_work, args=arguments)
        process.start()
        # the other end is the process's alone, so that its death is seen here
        writer.close()
        self._running[slot] = _Running(task.key, process, reader)

    def wait(self) -> list[Outcome]:
        """What has ended since; waits for the first one."""
        ended = connection.wait([running.reader for running in self._running.values()])
        done = [slot for slot, running in self._running.items() if running.reader in ended]
        return [self._outcome(self._running.pop(slot)) for slot in done]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for running in self._running.values():
            running.process.terminate()
        for running in self._running.values():
            running.process.join()

    def _outcome(self, running: _Running) -> Outcome:
        try:
            value, error, trace = running.reader.recv()
        except EOFError:
            value, error, trace = None, "", ""
        running.reader.close()
        running.process.join()
        if error == "":
            error = death(running.process.exitcode)
        return Outcome(running.key, value, error, trace)


def context(preload: Sequence[str] = ()) -> SpawnContext | ForkServerContext:
    """The way processes are started: from a server with everything imported, or each from nothing.

    Libraries that see a GPU when they are imported begin to use it, which a forked process cannot go on with.
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    if preload:
        found.set_forkserver_preload(list(preload))
    return found


def _environment(slot: int, threads: int) -> dict[str, str]:
    """Variables of the process in `slot`: its threads, and one GPU where there are several."""
    import torch

    found = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    gpu = gpu_of(slot, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    return found if gpu is None else {**found, "CUDA_VISIBLE_DEVICES": gpu}


def gpu_of(slot: int, count: int, visible: str | None) -> str | None:
    """The one of `count` GPUs that is the slot's, by the name it has in `visible`; None where there is one at most.

    The Trainer spreads a run over every GPU it sees.
    """
    if count < 2:
        return None
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return names[slot % count].strip()


def death(code: int | None) -> str:
    """How a process ended, in words, by its exit code."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = "; the system does so when memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended without a word (exit code {code})"


def _work(
    writer: Any,
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    threads: int,
    environment: dict[str, str],
) -> None:
    """What a process does: the task, with the outcome sent back."""
    # the terminal interrupts all processes; the one that started this one ends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(threads)
    answer = attempt(call, arguments)
    with contextlib.suppress(BrokenPipeError):
        writer.send(answer)
    writer.close()


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however it went: two must not write one folder."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
