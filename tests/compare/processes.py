"""Work for processes of its own."""

from __future__ import annotations

import os
import signal
import time

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
    from modicum.compare.workers import Task, Workers

    with Workers(1, 1) as workers:
        workers.start(Task(0, wait, (600,)))
        file.write_text(str(workers._running[0].process.pid))
        workers.wait()
