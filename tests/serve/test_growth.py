"""Nothing that a server holds grows with the requests that it has answered."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import sys
import time
import weakref
from concurrent.futures import ProcessPoolExecutor

import httpx
import pytest
import torch
from tests.serve.servers import adapter, serving

from modicum.store import Store

#: requests of a round and how many at a time; versions, more than there are slots for
MANY, AT_ONCE, VERSIONS, SLOTS = 84, 6, 7, 4


async def ask(client: httpx.AsyncClient, number: int) -> None:
    """A request like none before, of one of the kinds there are: answered, streamed, left, refused, mistaken."""
    body = {
        "model": f"user-{number % VERSIONS}",
        "prompt": [10 + number // 1000, 10 + number % 1000, *range(20, 40)],
        "max_tokens": 2,
        "user": f"someone {number}",
    }
    kind, status = number % 6, 200
    if kind < 2:
        # one goes on for much longer than anybody waits
        stream = body | {"stream": True, "max_tokens": (2, 40)[kind]}
        async with client.stream("POST", "/v1/completions", json=stream) as answer:
            async for line in answer.aiter_lines():
                assert line.startswith("data: ") or not line
                if kind == 1:
                    break
        return
    if kind == 2:
        body["model"], status = f"nobody-{number}", 404
    elif kind == 3:
        body["prompt"], status = {}, 400
    elif kind == 4:
        # the bytes of tokens are kept, once for each: so they are always the same ones
        chat = {"model": "base", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
        answer = await client.post("/v1/chat/completions", json=chat | {"temperature": 0, "logprobs": True})
        assert answer.status_code == 200
        return
    assert (await client.post("/v1/completions", json=body)).status_code == status


async def round_of(served, numbers: range) -> None:
    """Returns when the requests with these numbers are over, and nothing is left of the connections they came by."""
    left = iter(numbers)
    async with httpx.AsyncClient(base_url=served.url, timeout=60) as client:

        async def some() -> None:
            for number in left:
                await ask(client, number)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))
    state, engine = served.server._uvicorn.server_state, served.service.engine
    for _ in range(3000):
        if not (state.connections or state.tasks or len(engine._table)):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{state.connections} {state.tasks} {engine.stats()}")


def held() -> tuple[int, int]:
    """Blocks and objects, the least of some looks: threads of the server have some of their own now and then.

    Weak references are left out: every connection to SQLite keeps those of its last 200 cursors.
    """
    looks = []
    for _ in range(3):
        time.sleep(0.05)
        gc.collect()
        blocks, objects = sys.getallocatedblocks(), gc.get_objects()
        weak = sum(isinstance(one, weakref.ref) for one in objects)
        looks.append((blocks - weak, len(objects) - weak))
    blocks, objects = zip(*looks, strict=True)
    return min(blocks), min(objects)


def counted(folder) -> tuple[list[tuple[int, int]], int]:
    """Blocks and objects after each of some rounds, and slots in use."""
    torch.set_num_threads(1)
    with Store(folder / "store", create=True) as store:
        for seed in range(VERSIONS):
            store.put(f"user-{seed}", adapter(seed))
    # memory for pages is full after the first round
    engine = {"slots": SLOTS, "max_batch": 4, "cache_tokens": 512, "max_length": 64}
    found = []
    with serving(folder / "state", folder / "store", engine=engine) as served:
        for turn in range(10):
            asyncio.run(round_of(served, range(turn * MANY, (turn + 1) * MANY)))
            found.append(held())
        return found, served.service.engine.stats().pool.used


@pytest.mark.slow
def test_no_object_stays_behind_for_a_request(tmp_path):
    # in a process of its own: what other tests have left in this one still comes and goes
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found, used = pool.submit(counted, tmp_path).result()
    # caches fill in the first rounds, and some hundred objects come and go; two of every request are 672 in four rounds
    before, after = zip(*found[2:5], strict=True), zip(*found[-2:], strict=True)
    grown = [min(late) - max(early) for early, late in zip(before, after, strict=True)]
    assert max(grown) < 8 * MANY / 3, found
    assert used == SLOTS
