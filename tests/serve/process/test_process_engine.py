"""The engine in a process of its own answers, refuses, counts and ends as the one in this process does."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from tests.serve.servers import Offline, adapter, rebuilt, template

from modicum.errors import ConfigError, NotStoredError, StoreError
from modicum.serve import engines
from modicum.serve.engine.interface import (
    AdapterUnavailableError,
    GenerationError,
    Observer,
    OverloadedError,
    Request,
    Sampling,
)
from modicum.serve.process.engine import ProcessEngine
from modicum.serve.settings import EngineSettings
from modicum.serve.source import Source
from modicum.store import Store

SETTINGS = EngineSettings(
    "embedded", dtype="float32", max_batch=4, max_batch_tokens=16, max_queue=3, cache_tokens=2048, max_length=256,
    slots=6, max_rank=8, own_process=True,
)  # fmt: skip
PROMPT = "Once upon a time"
USERS = ("ada", "bob", "eve")
WHOSE = contextvars.ContextVar("whose", default=None)


class Noted(Observer):
    """What was observed, and for whom."""

    def __init__(self):
        self.steps, self.loads = [], []

    def step(self, sequences, tokens, seconds):
        assert seconds > 0
        self.steps.append((sequences, tokens))

    def load(self, seconds, *, failed):
        assert seconds > 0
        self.loads.append((WHOSE.get(), failed))


class Running:
    """A process engine, the loop that it belongs to, and its store."""

    def __init__(self, folder):
        self.store = Store(folder / "store", create=True)
        for seed, name in enumerate(USERS):
            self.store.put(name, adapter(seed))
        self.store.put(
            "nan", rebuilt({name: np.full_like(value, 1e30) for name, value in template().tensors()})
        )
        self.noted, self.source = Noted(), Source(self.store, 24)
        self.runner = asyncio.Runner()
        self.engine, self.tokenizer = engines.open_engine(SETTINGS, self.source, self.noted)

    def ids(self, prompt: str = PROMPT) -> tuple[int, ...]:
        return tuple(self.tokenizer(prompt).input_ids)

    def request(self, version=None, count=8, prompt=PROMPT, **other) -> Request:
        sampling = {"max_tokens": count, "temperature": 0.0, "ignore_eos": True, **other}
        return Request(self.ids(prompt), Sampling(**sampling), version)

    async def steps(self, *what, **other):
        return [step async for step in self.engine.generate(self.request(*what, **other))]

    async def tokens(self, *what, **other):
        return [step.token for step in await self.steps(*what, **other)]

    async def begin(self):
        self.engine.start()

    async def until(self, true):
        for _ in range(3000):
            if true():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"it never became so: {self.engine.stats()} {self.engine.residents()}")

    async def settled(self):
        await self.until(
            lambda: (
                not (s := self.engine.stats()).running
                and not s.waiting
                and s.cache_used < 1e-9
                and not any(one.requests for one in self.engine.residents())
            )
        )


@contextlib.contextmanager
def begun(folder):
    one = Running(folder)
    with one.runner, one.store:
        one.runner.run(one.begin())
        try:
            yield one
        finally:
            one.runner.run(one.engine.close())
        assert not psutil.pid_exists(one.engine._spawned.pid)


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    with begun(tmp_path_factory.mktemp("process")) as one:
        yield one


@pytest.fixture(scope="module")
def offline():
    return Offline()


@pytest.mark.parametrize(
    ("settings", "apart"),
    [
        ({"device": "cpu"}, True), ({"device": "cpu", "own_process": False}, False), ({"device": "cuda"}, False),
        ({"device": "cuda", "own_process": True}, True), ({"kind": "vllm", "own_process": True}, False),
    ],
)  # fmt: skip
def test_an_engine_on_a_processor_has_a_process_of_its_own(settings, apart):
    assert engines._apart(EngineSettings("embedded", **settings)) is apart


def test_every_adapter_in_the_batch_answers_as_it_does_alone(up, offline):
    asked = [
        (None, "The dog", 6),
        *((f"{name}@1", PROMPT + " very" * n, 5 + n) for n, name in enumerate(USERS)),
    ]

    async def main():
        assert isinstance(up.engine, ProcessEngine)
        found = await asyncio.gather(*(up.tokens(v, count=n, prompt=p) for v, p, n in asked))
        seeded = [await up.tokens("ada@1", temperature=1.0, seed=seed) for seed in (1, 2, 1)]
        await up.settled()
        return found, seeded

    found, seeded = up.runner.run(main())
    for (version, prompt, count), tokens in zip(asked, found, strict=True):
        record = None if version is None else adapter(USERS.index(version[:3]))
        assert tokens == offline.tokens(record, prompt, count, ignore_eos=True), version
    assert seeded[0] == seeded[2] != seeded[1]


def test_steps_say_all_that_they_say_in_one_process(up):
    async def main():
        first, *_, last = await up.steps("ada@1", logprobs=2)
        assert len(first.top) == 2
        assert first.logprob == first.top[0][1] < 0
        assert (first.finish, last.finish) == (None, "length")
        again = await up.steps("ada@1", count=2, prompt=" ".join([PROMPT] * 8))
        cached = await up.steps("ada@1", count=2, prompt=" ".join([PROMPT] * 8))
        assert (again[0].cached, cached[0].cached % 16, cached[0].cached > 0) == (0, 0, True)

    up.runner.run(main())


def test_what_is_refused_is_refused_with_the_same_words(up):
    async def main():
        longest = up.engine.max_length
        assert longest == 256
        with pytest.raises(
            ConfigError, match=r"tokens of prompt and 999 of answer are more than the 256 that fit"
        ):
            await up.steps(count=999)
        with pytest.raises(ConfigError, match=r"max_tokens is 0.*top_p is 2"):
            await up.steps(count=0, top_p=2.0)
        for wait in (up.steps("nobody@3"), up.engine.load("nobody@3")):
            with pytest.raises(
                AdapterUnavailableError, match=r"nobody@3 cannot be served: .*no adapter"
            ) as caught:
                await wait
            assert isinstance(caught.value.__cause__, NotStoredError)
        await up.settled()

    up.runner.run(main())


def test_more_than_the_queue_holds_is_refused_with_a_time(up):
    async def main():
        found = await asyncio.gather(*(up.tokens(count=30) for _ in range(12)), return_exceptions=True)
        refused = [one for one in found if isinstance(one, OverloadedError)]
        assert len(refused) == 12 - SETTINGS.max_batch - SETTINGS.max_queue
        assert all("no more are taken" in str(one) and 1 <= one.retry_after <= 60 for one in refused)
        assert sum(isinstance(one, list) and len(one) == 30 for one in found) == 12 - len(refused)
        await up.settled()

    up.runner.run(main())


def test_who_leaves_frees_the_place(up):
    async def main():
        streams = [up.engine.generate(up.request(f"{name}@1", count=200)) for name in USERS]
        for one in streams:
            await anext(one)
        waiting = [asyncio.create_task(up.tokens("ada@1", count=200)) for _ in range(3)]
        await up.until(lambda: up.engine.stats().waiting)
        assert (up.engine.stats().running, up.engine.stats().waiting) == (4, 2)
        for one in streams:
            await one.aclose()
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        before = up.engine.stats().generated_tokens
        await up.settled()
        assert not up.engine._asked
        # all of them would have been 1,200
        assert up.engine.stats().generated_tokens < before + 600
        assert len(await up.tokens("ada@1")) == 8

    up.runner.run(main())


def test_an_adapter_that_gives_nan_fails_alone(up, offline):
    async def main():
        company = [asyncio.create_task(up.tokens(version, count=40)) for version in ("ada@1", None)]
        for _ in range(2):
            with pytest.raises(GenerationError, match=r"nan@1 could not go on .* not finite"):
                await up.tokens("nan@1")
        return await asyncio.gather(*company)

    found = up.runner.run(main())
    assert found == [offline.tokens(one, PROMPT, 40, ignore_eos=True) for one in (adapter(0), None)]


def test_adapters_are_pinned_and_leave_and_that_is_known_at_once(up):
    async def main():
        engine = up.engine
        pinned = await engine.load("ada@1", pin=True)
        assert (pinned.version, pinned.method, pinned.rank, pinned.pinned) == ("ada@1", "lora_xs", 8, True)
        assert engine.residents()[0] == pinned
        assert engine.stats().pool.pinned == 1
        await engine.unpin("ada@1")
        assert (engine.residents()[0].version, engine.residents()[0].pinned) == ("ada@1", False)
        assert [await engine.unload("ada@1"), await engine.unload("ada@1")] == [True, False]
        assert "ada@1" not in {one.version for one in engine.residents()}

    up.runner.run(main())


def test_what_it_does_is_counted_and_put_down_to_who_asked(up):
    async def main():
        for name in USERS:
            await up.engine.unload(f"{name}@1")
        up.noted.steps.clear()
        up.noted.loads.clear()
        before = up.engine.stats()
        WHOSE.set("me")
        await up.tokens("ada@1", count=4, prompt=" ".join(["so"] * 24))
        with pytest.raises(AdapterUnavailableError):
            await up.tokens("nobody@1")
        await up.engine.load("bob@1")
        after = up.engine.stats()
        return before, after, len(up.ids(" ".join(["so"] * 24)))

    before, after, length = up.runner.run(main())
    prompts = [(1, min(16, length - at)) for at in range(0, length, 16)]
    assert up.noted.steps == [*prompts, (1, 1), (1, 1), (1, 1)]
    assert up.noted.loads == [("me", False), ("me", True), (None, False)]
    grown = {
        name: getattr(after, name) - getattr(before, name)
        for name in ("steps", "prompt_tokens", "generated_tokens")
    }
    assert grown == {"steps": len(prompts) + 3, "prompt_tokens": length, "generated_tokens": 4}
    pools = after.pool, before.pool
    assert [getattr(pools[0], one) - getattr(pools[1], one) for one in ("misses", "failures")] == [3, 1]
    assert after.resident > 1e8


def test_a_load_says_which_entry_it_read(up):
    async def main():
        await up.engine.load("ada@1")

    up.runner.run(main())
    _, entry = up.store.find_put("ada@1")
    assert not up.source.outdated("ada@1", entry)


def test_signals_are_for_the_process_that_asks(up):
    async def main():
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(up.engine._spawned.pid, number)
        assert len(await up.tokens("ada@1")) == 8
        assert up.engine.alive

    up.runner.run(main())


@pytest.mark.slow
def test_a_process_that_is_killed_fails_what_ran_and_another_one_takes_its_place(up, offline, caplog):
    async def main():
        engine, pid = up.engine, up.engine._spawned.pid
        await engine.load("eve@1", pin=True)
        running = [engine.generate(up.request(version, count=240)) for version in ("ada@1", None)]
        for one in running:
            await anext(one)
        os.kill(pid, signal.SIGKILL)
        for one in running:
            with pytest.raises(GenerationError, match="ended by SIGKILL"):
                await listed(one)
        assert not engine.alive
        with pytest.raises(OverloadedError, match="begins anew") as caught:
            await up.tokens()
        assert caught.value.retry_after >= 1
        assert not psutil.pid_exists(pid)
        assert (engine.residents(), engine.stats().running, await engine.unload("ada@1")) == ([], 0, False)
        await up.until(lambda: engine.alive)
        found = await up.tokens("ada@1")
        # what was pinned is in memory again
        await up.until(lambda: any(one.version == "eve@1" and one.pinned for one in engine.residents()))
        await engine.unpin("eve@1")
        return found

    assert up.runner.run(main()) == offline.tokens(adapter(0), PROMPT, 8, ignore_eos=True)
    assert "begins anew" in caplog.text


@pytest.mark.slow
def test_a_process_that_does_not_begin_again_is_given_up(tmp_path):
    async def main(one):
        assert len(await one.tokens("ada@1")) == 8
        (tmp_path / "store").rename(tmp_path / "elsewhere")
        one.engine._spawned.kill()
        await one.until(lambda: one.engine._dead)
        assert not one.engine.alive
        with pytest.raises(OverloadedError, match="stopped"):
            await one.tokens()

    with begun(tmp_path) as one:
        one.runner.run(main(one))


async def listed(steps):
    return [step async for step in steps]


@pytest.mark.slow
def test_what_is_wrong_with_model_settings_or_store_is_said_when_it_starts(tmp_path):
    wrong = (
        (EngineSettings(str(tmp_path / "nothing")), None, ConfigError, "nothing"),
        (EngineSettings("embedded"), "no-store", StoreError, "no-store"),
    )
    for settings, store, kind, words in wrong:
        engine = ProcessEngine(settings, None if store is None else At(str(tmp_path / store)))
        with pytest.raises(kind, match=words):
            engine.start()
        assert not engine.alive
        asyncio.run(engine.close())


class At:
    """A store by its place alone."""

    def __init__(self, location):
        self.location = location


_PARENT = """
import asyncio
from modicum.serve.process.engine import ProcessEngine
from modicum.serve.settings import EngineSettings

async def main():
    engine = ProcessEngine(EngineSettings("embedded"), None)
    asyncio.get_running_loop().run_in_executor(None, engine.start)
    while engine._spawned is None:
        await asyncio.sleep(0.01)
    print(engine._spawned.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_process_whose_parent_was_killed_while_it_opened_the_model_ends():
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        parent.kill()
    until = time.monotonic() + 20
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
        time.sleep(0.02)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
