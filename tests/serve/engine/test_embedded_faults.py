"""What goes wrong with one request, one version or one step does not go wrong with the others."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading

import pytest
import torch
from tests.serve.engine.offline import (
    Offline,
    adapter,
    base,
    broken,
    mixed,
    prompt,
    request,
    serving,
    settled,
    steps,
    tokens,
)

from modicum.errors import CorruptAdapterError
from modicum.serve.engine import sampler
from modicum.serve.engine.interface import AdapterUnavailableError, GenerationError, OverloadedError


async def _company(engine, count: int = 40) -> list[asyncio.Task[list[int]]]:
    """Requests that run while something goes wrong."""
    tasks = [
        asyncio.create_task(tokens(engine, request((9 + i, 8), version, count=count)))
        for i, version in enumerate(["a0@1", "lora@1", None])
    ]
    await _until(lambda: engine.stats().running == len(tasks))
    return tasks


async def _until(true) -> None:
    """Returns when it is so; engines work in threads of their own."""
    for _ in range(3000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never became so")


def _untouched(found, count: int = 40) -> bool:
    offline = Offline("small")
    versions = ["a0@1", "lora@1", None]
    return found == [
        offline.greedy(mixed().get(version or ""), (9 + i, 8), count) for i, version in enumerate(versions)
    ]


@pytest.mark.parametrize("native", ["1", "0"])
def test_an_adapter_that_gives_nan_fails_alone(native, monkeypatch):
    from modicum.serve.engine.native import paged

    if native == "0":
        monkeypatch.setattr(paged, "available", lambda: False)
    records = mixed() | {"bad@1": broken(mixed()["a1@1"])}

    async def main():
        async with serving(records) as engine:
            company = await _company(engine)
            for _ in range(3):
                with pytest.raises(GenerationError, match=r"bad@1 could not go on .* not finite"):
                    await tokens(engine, request(prompt(0, 20), "bad@1"))
            assert _untouched(await asyncio.gather(*company))
            await settled(engine)

    asyncio.run(main())


def test_a_sampler_that_fails_for_one_request_fails_it_alone(monkeypatch):
    real = sampler.draw

    def draw(scores, temperatures, top_p, uniform):
        if (temperatures == 3).any():
            raise ZeroDivisionError("no such temperature")
        return real(scores, temperatures, top_p, uniform)

    monkeypatch.setattr(sampler, "draw", draw)

    async def main():
        async with serving(mixed()) as engine:
            company = await _company(engine)
            good = [request((9, 10), "a2@1", temperature=1.0, seed=seed) for seed in range(3)]
            bad = request((9, 10), "a2@1", temperature=3.0)
            found = await asyncio.gather(
                *(tokens(engine, one) for one in [*good, bad]), return_exceptions=True
            )
            assert isinstance(found[3], GenerationError)
            assert "no such temperature" in str(found[3])
            assert found[:3] == [await tokens(engine, one) for one in good]
            assert _untouched(await asyncio.gather(*company))

    asyncio.run(main())


@contextlib.contextmanager
def _failing(model, token: int, error: Exception):
    """A model whose forward pass fails in every batch that holds the token."""

    def fail(_, __, kwargs):
        if (kwargs["input_ids"] == token).any():
            raise error

    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    yield
    hook.remove()


@pytest.mark.parametrize(
    "error", [RuntimeError("a broken layer"), MemoryError("no more"), torch.OutOfMemoryError("none")]
)
def test_a_step_that_fails_ends_what_ran_and_the_engine_goes_on(error):
    async def main():
        model = copy.deepcopy(base("small"))
        with _failing(model, 66, error):
            async with serving(mixed(), model=model) as engine:
                for _ in range(2):
                    running = engine.generate(request((9, 10), "a0@1", count=50))
                    await anext(running)
                    with pytest.raises(GenerationError, match=str(error)):
                        await tokens(engine, request((9, 66), "a1@1"))
                    with pytest.raises(GenerationError, match="a0@1"):
                        [step async for step in running]
                    await _until(lambda: engine.alive)
                    answer = await tokens(engine, request((9, 10), "a0@1"))
                    assert answer == Offline("small").greedy(mixed()["a0@1"], (9, 10), 8)
                await settled(engine)

    asyncio.run(main())


def test_who_waits_while_the_engine_begins_anew_is_answered_by_the_next_thread():
    async def main():
        model = copy.deepcopy(base("small"))
        with _failing(model, 66, RuntimeError("a broken layer")):
            async with serving(mixed(), model=model, max_batch=1) as engine:
                asked = [request((9, 66), count=4), *(request((9, 10 + i), count=4) for i in range(6))]
                found = await asyncio.gather(*(tokens(engine, one) for one in asked), return_exceptions=True)
                await settled(engine)
        assert isinstance(found[0], GenerationError)
        # one more may have had a place; all others waited for one
        assert sum(isinstance(one, Exception) for one in found) <= 2
        for one, answer in zip(asked, found, strict=True):
            if not isinstance(answer, Exception):
                assert answer == Offline("small").greedy(None, one.prompt, 4)

    asyncio.run(main())


def test_an_engine_that_only_fails_is_given_up():
    async def main():
        model = copy.deepcopy(base("small"))
        hook = model.model.register_forward_pre_hook(lambda *_: 1 / 0)
        async with serving(mixed(), model=model) as engine:
            for _ in range(3):
                await _until(lambda: engine.alive)
                with pytest.raises(GenerationError):
                    await tokens(engine, request((9, 10)))
            await _until(lambda: engine._dead)
            assert not engine.alive
            with pytest.raises(OverloadedError, match="stopped"):
                await tokens(engine, request((9, 10)))
        hook.remove()

    asyncio.run(main())


def test_leaving_early_frees_pages_and_slots():
    async def main():
        async with serving(mixed(), max_batch=3) as engine:
            for count in range(1, 5):
                running = [engine.generate(request((9, 10 + i), f"a{i}@1", count=50)) for i in range(6)]
                first = [asyncio.create_task(anext(one)) for one in running]
                await asyncio.gather(*first[:count])
                for task in first:
                    task.cancel()
                await asyncio.gather(*first, return_exceptions=True)
                for one in running:
                    await one.aclose()
                await settled(engine)
                assert engine.stats().pool.pinned == 0
            assert len(await tokens(engine, request((9, 10), "a0@1"))) == 8

    asyncio.run(main())


def test_who_leaves_while_the_version_is_loaded_leaves_nothing_behind():
    began, go_on = threading.Event(), threading.Event()

    class Slow(dict):
        def __getitem__(self, version):
            began.set()
            assert go_on.wait(10)
            return super().__getitem__(version)

    async def main():
        async with serving(Slow(mixed())) as engine:
            waiting = asyncio.create_task(tokens(engine, request((9, 10), "a0@1")))
            await asyncio.to_thread(began.wait, 10)
            # nobody else waits for the load
            assert len(await tokens(engine, request((9, 10), count=20))) == 20
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            go_on.set()
            await _until(engine.residents)
            await settled(engine)

    asyncio.run(main())


def test_a_version_that_cannot_be_read_fails_alone_and_may_come_back():
    records = dict(mixed())

    class Store:
        gone = True

        def __getitem__(self, version):
            if version == "new@1" and self.gone:
                raise CorruptAdapterError("one bit is wrong")
            return records.get(version, records["a0@1"])

    async def main():
        store = Store()
        async with serving(store) as engine:
            company = await _company(engine)
            with pytest.raises(AdapterUnavailableError, match=r"new@1.*one bit is wrong"):
                await tokens(engine, request((9,), "new@1"))
            store.gone = False
            assert len(await tokens(engine, request((9,), "new@1"))) == 8
            assert _untouched(await asyncio.gather(*company))

    asyncio.run(main())


def test_closing_waits_for_what_runs_and_then_fails_it():
    async def main():
        async with serving(mixed()) as engine:
            short = asyncio.create_task(tokens(engine, request((9, 10), "a0@1", count=40)))
            await _until(lambda: engine.stats().running)
            await engine.close(grace=20)
            assert len(await short) == 40
            assert not engine.alive
            with pytest.raises(OverloadedError):
                await tokens(engine, request((9, 10)))
        async with serving(mixed()) as engine:
            company = await _company(engine, count=60)
            await engine.close()
            failed = await asyncio.gather(*company, return_exceptions=True)
            assert all(isinstance(one, GenerationError) for one in failed)
            await engine.close()

    asyncio.run(main())


def test_a_slot_that_was_given_away_is_noticed():
    async def main():
        async with serving(mixed()) as engine:
            company = await _company(engine)
            running = engine.generate(request((9, 10), "a3@1", count=50))
            await anext(running)
            row = next(row for row in engine._table.all() if row.request.version == "a3@1")
            engine._slots._generations[row.lease.slot] += 1
            with pytest.raises(GenerationError, match="given to another"):
                [step async for step in running]
            assert _untouched(await asyncio.gather(*company))

    asyncio.run(main())


def test_a_cancelled_request_that_arrives_late_is_cancelled_again():
    async def main():
        async with serving(mixed()) as engine:
            batching = engine._batching
            running = engine.generate(request((9, 10), count=50))
            await anext(running)
            # as if the cancellation had overtaken the request
            row = engine._table.all()[0]
            engine._table.end(row)
            await asyncio.sleep(0)
            before = engine.stats().steps
            await _until(lambda: not batching._processor.has_pending_requests())
            assert engine.stats().steps < before + 20
            await running.aclose()

    asyncio.run(main())


def test_answers_of_different_lengths_end_when_they_should():
    async def main():
        async with serving({"a@1": adapter(5)}) as engine:
            found = await asyncio.gather(
                *(steps(engine, request((9, i), "a@1", count=i)) for i in range(1, 30))
            )
            assert [len(one) for one in found] == list(range(1, 30))
            assert all(one[-1].finish == "length" and not any(s.finish for s in one[:-1]) for one in found)

    asyncio.run(main())
