"""Messages and errors arrive as they were sent, however the bytes are cut."""

from __future__ import annotations

import asyncio
import socket

import pytest

from modicum.errors import ConfigError, ModicumError, NotStoredError
from modicum.serve.engine.interface import AdapterUnavailableError, InUseError
from modicum.serve.process.wire import Wire, heard, packed, told, unpacked


def traceback_here():
    try:
        return 1 / 0
    except ZeroDivisionError as error:
        return error.__traceback__


class OddError(ModicumError):
    """Cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(one)


MESSAGES = [("step", 3, 17, -0.5, ((17, -0.5),), "stop", 4), ("value", 2, None), ("log", "ä" * 300)]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 100_000])
def test_frames_that_arrive_in_pieces_are_whole(size):
    sent = packed(MESSAGES) + packed([]) + packed(MESSAGES[:1])
    arrived, found = bytearray(), []
    for at in range(0, len(sent), size):
        arrived += sent[at : at + size]
        found += unpacked(arrived)
    assert found == [*MESSAGES, MESSAGES[0]]
    assert not arrived


def test_errors_of_ours_keep_class_words_and_cause():
    for error in (ConfigError("a; b"), InUseError("later", retry_after=7.5)):
        again = heard(told(error))
        assert (type(again), again.args, vars(again)) == (type(error), error.args, vars(error))
    error = AdapterUnavailableError("ada@1 cannot be served")
    error.__cause__ = NotStoredError("no 'ada'")
    again = heard(told(error))
    assert isinstance(again.__cause__, NotStoredError)
    assert str(again.__cause__) == "no 'ada'"
    # whatever else goes wrong arrives too, if it cannot be pickled itself
    strange = type("Strange", (Exception,), {})("a lambda").with_traceback(traceback_here())
    again = heard(told(strange))
    assert (type(again), str(again)) == (RuntimeError, "Strange: a lambda")
    assert "test_wire.py" in again.__notes__[0]
    again = heard(told(OddError("one", "two")))
    assert (type(again), str(again)) == (RuntimeError, "OddError: one")


def test_more_than_the_socket_holds_is_sent_and_the_end_is_noticed():
    async def main():
        one, two = socket.socketpair()
        found, gone = [], asyncio.Event()
        sender = Wire(one, print, gone.set)
        big = ("generate", 1, bytes(3 << 20))
        sender.send(big)
        # nobody has read yet, so most of it waits
        assert sender._unsent
        come = asyncio.Event()
        receiver = Wire(two, lambda message: (found.append(message), come.set()), lambda: None)
        await asyncio.wait_for(sender.sent(), 10)
        await asyncio.wait_for(come.wait(), 10)
        assert found == [big]
        receiver.close()
        await asyncio.wait_for(gone.wait(), 10)
        assert not sender.open
        sender.send(big)
        assert not sender._unsent

    asyncio.run(main())


def test_a_sender_whose_other_end_is_gone_is_told_once():
    async def main():
        one, two = socket.socketpair()
        lost, gone = [], asyncio.Event()
        sender = Wire(one, print, lambda: (lost.append(1), gone.set()))
        two.close()
        for _ in range(3):
            sender.send(("cancel", 1))
        await asyncio.wait_for(gone.wait(), 10)
        sender.close()
        assert lost == [1]

    asyncio.run(main())
