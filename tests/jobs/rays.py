"""A Ray cluster for tests: of this machine, two processes at a time, shared by the tests of a module."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def two_workers():
    """Within, this process has joined a cluster of its own with room for two tasks."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (modicum[ray])")
    ray.init("local", num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()


def processes(name: str = "") -> list[psutil.Process]:
    """What runs below this process that is Ray's; only those at work on the function `name`, if it is given."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            # programs of Ray's lie in its folder, and its processes at work are called after what they do
            if any(
                word.startswith(f"ray::{name}") or (not name and re.match(r"/\S*/ray/", word))
                for word in words
            ):
                found.append(process)
    return found


def at_work() -> list[psutil.Process]:
    """Ray's processes below this one that have a task of ours just now."""
    return processes("_work")


def kill_one() -> psutil.Process | None:
    """One of those at work, killed; None if nobody is just now."""
    for process in at_work():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
            return process
    return None


@contextlib.contextmanager
def started(words: list[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A program in a session of its own, which ends with the block, whatever happens in it."""
    with subprocess.Popen(words, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def ended(pid: int) -> bool:
    """Whether the process ends within half a minute."""
    try:
        return gone([psutil.Process(pid)])
    except psutil.NoSuchProcess:
        return True


def gone(wanted: list[psutil.Process]) -> bool:
    """Whether these processes end within half a minute."""
    return not psutil.wait_procs(wanted, timeout=30)[1]


def wait_for(found, seconds: float = 120):
    """What `found()` gives once it is not empty."""
    until = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return value
