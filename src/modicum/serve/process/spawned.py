"""The process of an engine, as the one that starts it sees it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, final

import psutil

from modicum.errors import ConfigError
from modicum.jobs.processes import death
from modicum.serve.process.wire import heard, packed, unpacked

if TYPE_CHECKING:
    from collections.abc import Callable

    from modicum.serve.process.wire import Message
    from modicum.serve.settings import EngineSettings

_MOST = 1 << 16


@final
class Spawned:
    """A process in which `child.py` begins."""

    def __init__(self) -> None:
        #: what is said to it and heard from it
        self.end, theirs = socket.socketpair()
        with theirs:
            # Ctrl-C in a terminal is for the one that started it; what it prints goes where errors go
            command = [sys.executable, "-P", "-m", "modicum.serve.process.child", str(theirs.fileno())]
            try:
                self._process = subprocess.Popen(  # noqa: S603 - this program
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    pass_fds=[theirs.fileno()],
                    process_group=0,
                )
            except BaseException:
                self.end.close()
                raise
        self.pid = self._process.pid

    def opened(self, settings: EngineSettings, store: str | None, hear: Callable[[Message], None]) -> int:
        """The longest sequence, when its engine takes requests; `hear` gets what it says besides.

        Raises:
            ConfigError, StoreError: what was wrong when the engine was opened, or the process has ended.
        """
        self.end.sendall(packed([("open", settings, store)]))
        arrived, longest = bytearray(), None
        while longest is None:
            data = self.end.recv(_MOST)
            if not data:
                raise ConfigError(f"the engine does not start: {self.wait()}")
            arrived += data
            for message in unpacked(arrived):
                if message[0] == "refused":
                    raise heard(message[1])
                if message[0] == "ready":
                    longest = message[1]
                else:
                    hear(message)
        return longest

    def wait(self) -> str:
        """How it ended, when it has."""
        return death(self._process.wait())

    def kill(self) -> None:
        """Ends it in the middle of whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def resident(self) -> int:
        """Bytes of memory that it holds."""
        with contextlib.suppress(psutil.Error):
            return psutil.Process(self.pid).memory_info().rss
        return 0
