"""Sequences end once, and give their slots back when nothing reads them any more."""

from __future__ import annotations

import asyncio

import pytest

from modicum.serve.engine.interface import GenerationError, Request, Sampling, Step
from modicum.serve.engine.running import Running, Table, tell


@pytest.fixture
def loop():
    made = asyncio.new_event_loop()
    yield made
    made.close()


def _table(loop, count=3):
    back = []
    table = Table(back.append)
    rows = [Running(i, Request((1,), Sampling(5, temperature=0.0)), loop) for i in range(count)]
    for row in rows:
        row.lease = f"lease of {row.id}"
        table.add(row)
    return table, rows, back


def test_a_lease_goes_back_at_once_between_steps_and_after_the_step_within_one(loop):
    table, (first, second, third), back = _table(loop)
    assert table.end(first)
    assert back == ["lease of r0"]
    assert table.begin_step(["r0", "r1"]) == [None, second]
    assert table.end(second)
    assert table.end(third)
    assert back == ["lease of r0", "lease of r2"]
    assert table.begin_step(["r1"]) == [None]
    table.end_step()
    assert back == ["lease of r0", "lease of r2", "lease of r1"]
    table.end_step()
    assert len(back) == 3


def test_a_sequence_ends_once_and_tells_nothing_afterwards(loop):
    table, (first, second, _), back = _table(loop)
    assert table.end(first, forget=False)
    assert (table.find("r0"), table.live("r0")) == (first, None)
    assert not table.end(first)
    assert table.find("r0") is None
    table.fail(second, GenerationError("once"))
    table.fail(second, GenerationError("twice"))
    loop.run_until_complete(asyncio.sleep(0))
    assert [str(second.arrived.get_nowait()), second.arrived.qsize()] == ["once", 0]
    assert len(table) == 1
    assert len(back) == 2


def test_what_is_told_arrives_in_the_loop_of_its_sequence_even_if_another_is_closed(loop):
    _, (first, second, _), _ = _table(loop)
    gone = asyncio.new_event_loop()
    gone.close()
    first.loop = gone
    tell([(first, Step(1)), (second, Step(2)), (second, Step(3))])
    loop.run_until_complete(asyncio.sleep(0))
    assert [second.arrived.get_nowait().token for _ in range(2)] == [2, 3]
    assert first.arrived.empty()
