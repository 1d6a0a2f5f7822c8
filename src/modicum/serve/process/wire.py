"""What two processes say to each other: messages in frames, over a pair of sockets.

A frame is a list of messages, and a message a tuple that begins with a word. Both ends are of one program and nobody
else has the sockets, so frames are pickled.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import traceback
from typing import TYPE_CHECKING, Any, final

from modicum.errors import ModicumError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence

Message = tuple[Any, ...]
#: bytes in front of a frame that say how long it is, and bytes that are read at once
_LENGTH, _MOST = 8, 1 << 18
#: seconds between two looks at what is not sent yet
_LOOK = 0.005


def packed(messages: Sequence[Message]) -> bytes:
    """A frame of these messages."""
    data = pickle.dumps(messages, protocol=5)
    return len(data).to_bytes(_LENGTH, "little") + data


def unpacked(arrived: bytearray) -> Iterator[Message]:
    """The messages of all frames that have arrived as a whole; they are taken out of `arrived`."""
    while len(arrived) >= _LENGTH:
        end = _LENGTH + int.from_bytes(arrived[:_LENGTH], "little")
        if len(arrived) < end:
            return
        frame = bytes(arrived[_LENGTH:end])
        del arrived[:end]
        yield from pickle.loads(frame)  # noqa: S301 - see above


def told(error: Exception) -> bytes:
    """An error that can be sent: one of ours as it is and with its cause, all others by their words."""
    if isinstance(error, ModicumError):
        cause = error.__cause__ if isinstance(error.__cause__, ModicumError) else None
        # one that cannot be made anew from its arguments would not be heard
        with contextlib.suppress(Exception):
            data = pickle.dumps((error, cause))
            heard(data)
            return data
    other = RuntimeError(f"{type(error).__name__}: {error}")
    other.add_note("".join(traceback.format_exception(error)))
    return pickle.dumps((other, None))


def heard(data: bytes) -> Exception:
    """The error that was `told`."""
    error, error.__cause__ = pickle.loads(data)  # noqa: S301 - see above
    return error


@final
class Wire:
    """One end of the pair in the running event loop.

    `hear` gets every message that arrives; `lost` is called once if the other end is closed.
    """

    def __init__(self, end: socket.socket, hear: Callable[[Message], None], lost: Callable[[], None]) -> None:
        self._end, self._hear, self._lost = end, hear, lost
        self._arrived, self._unsent = bytearray(), bytearray()
        self._loop = asyncio.get_running_loop()
        self.open = True
        end.setblocking(False)
        self._loop.add_reader(end, self.read)

    def read(self) -> bool:
        """Whether there was something to hear; it was heard."""
        try:
            data = self._end.recv(_MOST)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.close()
            self._lost()
            return False
        self._arrived += data
        for message in unpacked(self._arrived):
            self._hear(message)
        return self.open

    def send(self, *messages: Message) -> None:
        """Returns at once; to an end that is closed nothing is sent."""
        if self.open:
            self._unsent += packed(messages)
            self._write()

    async def sent(self) -> None:
        """Returns when everything is sent, or the other end is closed."""
        while self._unsent and self.open:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(_LOOK)

    def close(self) -> None:
        """Closes this end."""
        if self.open:
            self.open = False
            self._loop.remove_reader(self._end)
            self._loop.remove_writer(self._end)
            self._end.close()

    def _write(self) -> None:
        try:
            count = self._end.send(self._unsent)
        except BlockingIOError:
            count = 0
        except OSError:
            # who reads will notice that the other end is gone
            count = len(self._unsent)
        del self._unsent[:count]
        if self._unsent:
            self._loop.add_writer(self._end, self._write)
        else:
            self._loop.remove_writer(self._end)
