"""Two replicas under Ray Serve answer what one engine answers, and end cleanly. Where Ray is installed."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest
from tests.serve.servers import adapter

from modicum.errors import MissingExtraError
from modicum.serve.engine.interface import AdapterUnavailableError, Request, Sampling
from modicum.serve.ray.streams import together
from modicum.serve.settings import EngineSettings
from modicum.store import Store

try:
    import ray
except ImportError:
    ray = None

SETTINGS = {
    "dtype": "float32",
    "max_batch": 8,
    "cache_tokens": 4096,
    "slots": 6,
    "max_rank": 8,
    "max_length": 128,
}
TOKENS = 6


def test_without_ray_the_extra_is_named():
    if ray is not None:
        pytest.skip("Ray is installed")
    from modicum.serve.ray.engine import RayEngine

    with pytest.raises(MissingExtraError, match=r"modicum\[ray\]"):
        RayEngine(EngineSettings("embedded", replicas=2), None)


def test_steps_come_together_and_the_first_at_once():
    async def numbers(count: int, fail: bool = False):
        for n in range(count):
            await asyncio.sleep(0.001)
            yield n
        if fail:
            raise ValueError("the end")

    async def lists(steps) -> list[list[int]]:
        return [found async for found in together(steps)]

    found = asyncio.run(lists(numbers(40)))
    assert [n for one in found for n in one] == list(range(40))
    assert found[0] == [0]
    assert len(found) < 20
    assert asyncio.run(lists(numbers(0))) == []
    with pytest.raises(ValueError, match="the end"):
        asyncio.run(lists(numbers(3, fail=True)))


async def answers(engine, asked: list[tuple[str | None, int]]) -> list[list[int]]:
    async def one(version: str | None, seed: int) -> list[int]:
        prompt = tuple(range(20 + seed, 40 + seed))
        request = Request(prompt, Sampling(TOKENS, temperature=0.0, ignore_eos=True), version)
        return [step.token async for step in engine.generate(request)]

    return await asyncio.gather(*(one(*each) for each in asked))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, of several kinds
def test_two_replicas_answer_as_one_engine_does(tmp_path):
    pytest.importorskip("ray")
    from modicum.serve.engines import open_engine

    with Store(tmp_path / "store", create=True) as store:
        for n in range(8):
            store.put(f"user-{n}", adapter(n))
        asked = [(f"user-{n % 8}@1" if n % 5 else None, n) for n in range(24)]

        async def with_engine(replicas: int):
            engine, _ = open_engine(EngineSettings("embedded", **SETTINGS, replicas=replicas), store)
            engine.start()
            try:
                first = await answers(engine, asked)
                again = await answers(engine, asked)
                with pytest.raises(AdapterUnavailableError, match="user-99"):
                    await answers(engine, [("user-99@1", 0)])
                stream = engine.generate(Request((5, 6), Sampling(100, ignore_eos=True), "user-1@1"))
                async for _ in stream:
                    break
                await stream.aclose()
                resident = await engine.load("user-3@1", pin=True)
                assert resident.version == "user-3@1"
                await asyncio.sleep(1.2)
                await answers(engine, asked)
                stats, residents = engine.stats(), {one.version for one in engine.residents()}
                length = engine.max_length
            finally:
                await engine.close()
            assert not engine.alive
            return first, again, stats, residents, length

        alone = asyncio.run(with_engine(1))
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        several = asyncio.run(with_engine(2))
    assert several[0] == alone[0]
    assert several[1] == alone[0]
    assert several[4] == alone[4]
    assert several[2].generated_tokens >= 3 * len(asked) * TOKENS
    # both have answered, and each knows what it has in memory
    assert several[2].pool.slots in (6, 12)
    assert several[3]
    for _ in range(100):
        left = [
            p for p in psutil.Process().children(recursive=True) if p.pid not in before and "ray" in p.name()
        ]
        if not left:
            break
        time.sleep(0.1)
    assert not left
