"""Two replicas under Ray Serve answer what one engine answers, and end cleanly. Where Ray is installed."""

from __future__ import annotations

import asyncio
import contextlib
import time

import psutil
import pytest
from tests.serve.servers import adapter

from modicum.errors import ConfigError, MissingExtraError
from modicum.serve.engine.interface import AdapterUnavailableError, GenerationError, Request, Sampling
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
#: seconds that Ray may take to do what it is waited for
PATIENCE = 400


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
    assert several[2].prompt_tokens >= 3 * len(asked) * 20
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


@contextlib.asynccontextmanager
async def started(store, **settings):
    """Two replicas that answer."""
    from modicum.serve.engines import open_engine

    engine, _ = open_engine(EngineSettings("embedded", **{**SETTINGS, "replicas": 2, **settings}), store)
    await asyncio.to_thread(engine.start)
    try:
        yield engine
    finally:
        await engine.close()


@contextlib.contextmanager
def filled(folder, users: int = 8):
    with Store(folder, create=True) as store:
        for n in range(users):
            store.put(f"user-{n}", adapter(n))
        yield store


def replicas() -> list[psutil.Process]:
    """Processes that run engines for this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::ServeReplica"):
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_adapter_for_all_is_served_by_all(tmp_path):
    pytest.importorskip("ray")

    async def crowd(store) -> list[str]:
        async with started(store, max_batch=2) as engine:
            # one has it, and everybody knows
            alone = [(await answers(engine, [("user-1@1", n)]))[0] for n in range(3)]
            await asyncio.sleep(1.0)
            # a replica takes two batches; whoever comes then is served by the other one
            assert await answers(engine, [("user-1@1", n % 3) for n in range(24)]) == alone * 8
            end = time.monotonic() + PATIENCE
            while len(engine.residents()) < 2 and time.monotonic() < end:
                await asyncio.sleep(1.1)
                await answers(engine, [("user-1@1", 0)] * 24)
            return [one.version for one in engine.residents()]

    with filled(tmp_path / "store") as store:
        assert asyncio.run(crowd(store)) == ["user-1@1"] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_adapter_has_a_replica_that_it_goes_to(tmp_path):
    pytest.importorskip("ray")
    asked = [(f"user-{n}@1", n) for n in range(6)]

    async def run(store):
        async with started(store) as engine:
            first = [(await answers(engine, [one]))[0] for one in asked]
            # which replica has what travels to the front by itself
            await asyncio.sleep(3.0)
            for _ in range(5):
                assert [(await answers(engine, [one]))[0] for one in asked] == first
            # whoever answers tells what it has, once a second at most
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                await asyncio.sleep(1.1)
                for one in asked:
                    await answers(engine, [one])
                told = [{one.version for one in report.residents} for report in engine._reports.values()]
                if sum(map(len, told)) >= len(asked):
                    break
            return told, engine.stats().pool

    with filled(tmp_path / "store") as store:
        told, pool = asyncio.run(run(store))
    assert sorted(version for versions in told for version in versions) == [version for version, _ in asked]
    assert pool.misses == len(asked)
    assert pool.hits >= 5 * len(asked)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_replica_that_is_killed_fails_its_requests_and_is_replaced(tmp_path):
    pytest.importorskip("ray")
    asked = [(f"user-{n}@1", n) for n in range(8)]

    async def one(engine, version: str, seed: int) -> list[int] | GenerationError:
        try:
            return (await answers(engine, [(version, seed)]))[0]
        except GenerationError as error:
            return error

    async def run(store):
        async with started(store, max_length=512, cache_tokens=8192) as engine:
            expected = await answers(engine, asked)
            before = replicas()
            assert len(before) == 2
            long = [
                engine.generate(Request((5, 6, n), Sampling(500, temperature=0.0, ignore_eos=True), version))
                for version, n in asked
            ]
            await asyncio.gather(*map(anext, long))
            before[0].kill()
            # none of them hangs; those of the other replica go on to their ends
            ends = await asyncio.wait_for(asyncio.gather(*map(ended, long)), PATIENCE)
            assert {end if isinstance(end, str) else type(end) for end in ends} == {"length", GenerationError}
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end:
                found = await asyncio.gather(*(one(engine, *each) for each in asked))
                now = replicas()
                if found == expected and len(now) == 2 and before[0] not in now:
                    break
                await asyncio.sleep(0.2)
            assert found == expected
            assert len(now) == 2
            assert before[0] not in now
            # the new one answers as well
            await asyncio.sleep(1.0)
            assert await answers(engine, asked * 3) == expected * 3

    with filled(tmp_path / "store") as store:
        asyncio.run(run(store))


async def ended(stream) -> str | Exception | None:
    """How an answer ended."""
    finish = None
    try:
        async for step in stream:
            finish = step.finish or finish
    except GenerationError as error:
        return error
    return finish


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_servers_share_a_cluster_and_leave_it_as_it_was(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from ray import serve

    from modicum.serve.ray.engine import RayEngine

    class Other:
        def __call__(self) -> str:
            return "still here"

    asked = [("user-1@1", 0), ("user-2@1", 1), (None, 2)]

    async def run(*stores):
        settings = EngineSettings("embedded", **SETTINGS)
        engines = [RayEngine(settings, store) for store in stores]
        for engine in engines:
            await asyncio.to_thread(engine.start)
        try:
            # each replica has a GPU where the cluster has some
            end = time.monotonic() + PATIENCE
            # Ray says so in another process
            while ray.available_resources().get("GPU", 0) and time.monotonic() < end:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            assert ray.available_resources().get("GPU", 0) == 0
            found = [await answers(engine, asked) for engine in engines]
            await engines[0].close()
            return found, await answers(engines[1], asked)
        finally:
            for engine in engines:
                await engine.close()

    for first, folder in ((0, "one"), (100, "two")):
        with Store(tmp_path / folder, create=True) as store:
            store.put_many((f"user-{n}", adapter(first + n)) for n in range(3))
    ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        handle = serve.run(serve.deployment(Other).bind(), name="other", route_prefix=None)
        # the processes that are there have another working folder than this one has now
        monkeypatch.chdir(tmp_path)
        with Store("one") as one, Store("two") as two:
            (first, second), again = asyncio.run(run(one, two))
        assert first[:2] != second[:2]
        assert first[2] == second[2]
        assert again == second
        assert handle.remote().result() == "still here"
        assert list(serve.status().applications) == ["other"]
        serve.shutdown()
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_a_machine_has_no_room_for_is_refused_at_once(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from modicum.serve.ray.engine import RayEngine

    engine = RayEngine(EngineSettings("embedded", **SETTINGS, replicas=1000), None)
    with pytest.raises(ConfigError, match=r"1000 replicas on this machine need 1000 CPUs, and it has \d+"):
        engine.start()
    assert not ray.is_initialized()
    engine = RayEngine(EngineSettings(str(tmp_path / "nothing"), **SETTINGS), None)
    with pytest.raises(ConfigError, match=r"the replicas do not start: .*nothing"):
        engine.start()
    assert not engine.alive
    assert not ray.is_initialized()
    # Ray itself would try for minutes, and may end the process then
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:1"):
        RayEngine(EngineSettings("embedded", **SETTINGS), None).start()
    assert not ray.is_initialized()
