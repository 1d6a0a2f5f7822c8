"""Work for processes of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from modicum.errors import DataError


def add(first, second):
    return first + second, os.getpid(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def fail(kind):
    if kind == "told":
        raise DataError("no rows")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "silent":
        os._exit(3)
    raise ZeroDivisionError("unexpected")


def peak(mebibytes):
    from modicum.evaluate.resources import Resources

    with Resources() as used:
        block = bytearray(mebibytes << 20)
        block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    return used.as_dict()["peak_memory_bytes"]


def wait(seconds):
    time.sleep(seconds)


def nest(file):
    """Start a process that would run for ten minutes, and wait for it."""
    from modicum.compare.run import PRELOAD
    from modicum.jobs.pool import Task
    from modicum.jobs.processes import Processes

    with Processes(1, 1, PRELOAD) as pool:
        pool.start(Task(0, wait, (600,)))
        file.write_text(str(pool._running[0].process.pid))
        pool.wait()


def die(folder, times):
    """How often this was begun, once it has killed its own process so many times."""
    begun = len(list(folder.iterdir()))
    (folder / str(begun)).touch()
    if begun < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return begun + 1


def fail_again(folder):
    """Fail, and leave a mark of every time."""
    (folder / str(len(list(folder.iterdir())))).touch()
    raise DataError("no rows")


def here():
    return str(Path.cwd()), os.getpid(), torch.get_num_threads()


def tell_and_wait(file):
    """Write down which process this is, and wait for ten minutes."""
    file.with_suffix(".tmp").write_text(str(os.getpid()))
    file.with_suffix(".tmp").rename(file)
    wait(600)


def cluster(file):
    """Start a task on a cluster of its own that would run for ten minutes, and wait for it."""
    from modicum.jobs.cluster import Cluster
    from modicum.jobs.pool import Task

    with Cluster(1) as pool:
        list(pool.outcomes([Task(0, tell_and_wait, (file,))]))


class Unreadable:
    """What no other process can read."""

    def __reduce__(self):
        return fail, ("told",)


def machine(file):
    """The machine this runs on, as Ray knows it; the first time it says so in `file`, and stays for ten minutes."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    if not file.exists():
        file.with_suffix(".tmp").write_text(here)
        file.with_suffix(".tmp").rename(file)
        wait(600)
    return here
