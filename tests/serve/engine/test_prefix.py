"""Keys and values are shared between equal versions and salts, and between nothing else."""

from __future__ import annotations

import asyncio

import pytest
from tests.serve.engine.offline import Offline, mixed, prompt, request, serving, settled, steps, tokens

from modicum.errors import ConfigError
from modicum.serve.engine import batching
from modicum.serve.engine.admission import PAGE
from modicum.serve.engine.prefix import PrefixCache, page_name
from modicum.serve.engine.running import realm

#: of several pages
LONG = prompt(3, 3 * PAGE + 5)


async def _cached(engine, version, salt="") -> int:
    return sum(step.cached for step in await steps(engine, request(LONG, version, salt, count=4)))


async def _one_after_the_other() -> tuple[list[list[int]], int]:
    """Answers to one prompt under every version, two tenants and the base model, and what they shared."""
    async with serving(mixed()) as engine:
        found = [await tokens(engine, request(LONG, version, count=6)) for version in [*mixed(), None]]
        found.append(await tokens(engine, request(LONG, None, "tenant", count=6)))
        return found, engine.stats().cached_tokens


def _alone() -> list[list[int]]:
    offline = Offline("small")
    answers = [offline.greedy(record, LONG, 6) for record in [*mixed().values(), None]]
    return [*answers, answers[-1]]


def test_equal_prompts_of_different_versions_and_tenants_share_nothing():
    found, shared = asyncio.run(_one_after_the_other())
    assert found == _alone()
    assert shared == 0


def test_with_names_of_tokens_alone_they_would_be_answered_wrongly(monkeypatch):
    # what this package replaces is put back: if this test fails, the one above proves nothing
    monkeypatch.setattr(batching, "PrefixCache", lambda *_: None)
    found, _ = asyncio.run(_one_after_the_other())
    assert found[0] == _alone()[0]
    assert found != _alone()


def test_equal_versions_and_salts_share_whole_pages():
    async def main():
        async with serving(mixed()) as engine:
            assert await _cached(engine, "a0@1", "one") == 0
            assert await _cached(engine, "a0@1", "one") == 3 * PAGE
            assert await _cached(engine, "a0@1", "other") == 0
            assert await _cached(engine, "a1@1", "one") == 0
            assert await _cached(engine, None, "one") == 0
            assert await _cached(engine, None, "one") == 3 * PAGE
            assert engine.stats().cached_tokens == 6 * PAGE
            await settled(engine)

    asyncio.run(main())


def test_an_answer_is_shared_with_the_next_question_of_a_chat():
    async def main():
        async with serving(mixed()) as engine:
            first = await tokens(engine, request(LONG[:24], "a0@1", count=20))
            chat = (*LONG[:24], *first)
            assert (await steps(engine, request(chat[:40], "a0@1")))[0].cached == 2 * PAGE
            # the last token of a prompt is always computed, and so is its page
            assert (await steps(engine, request(chat[:32], "a0@1")))[0].cached == PAGE

    asyncio.run(main())


def test_requests_that_run_together_share_and_differ_as_they_must():
    async def main():
        offline = Offline("small")
        async with serving(mixed(), max_batch_tokens=64, cache_tokens=2048) as engine:
            await tokens(engine, request(LONG, "a2@1"))
            asked = [request((*LONG[: 2 * PAGE + i], 9), "a2@1") for i in range(4)]
            asked += [request((*LONG[: 2 * PAGE + i], 9), "a5@1") for i in range(4)]
            found = await asyncio.gather(*(steps(engine, one) for one in asked))
        for one, answer in zip(asked, found, strict=True):
            assert [step.token for step in answer] == offline.greedy(mixed()[one.version], one.prompt, 8)
        assert [answer[0].cached for answer in found[:4]] == [2 * PAGE] * 4

    asyncio.run(main())


def test_nothing_is_shared_when_it_is_switched_off():
    async def main():
        async with serving(mixed(), prefix_caching=False) as engine:
            assert [await _cached(engine, "a0@1") for _ in range(2)] == [0, 0]

    asyncio.run(main())


def test_a_failed_request_leaves_no_pages_behind():
    from tests.serve.engine.offline import broken

    from modicum.serve.engine.interface import GenerationError

    records = mixed() | {"bad@1": broken(mixed()["a0@1"])}

    async def main():
        async with serving(records, max_batch_tokens=64) as engine:
            for _ in range(2):
                with pytest.raises(GenerationError, match="bad@1"):
                    await tokens(engine, request(LONG, "bad@1"))
            assert engine.stats().cached_tokens == 0
            await settled(engine)

    asyncio.run(main())


def test_realms_and_pages_have_names_that_do_not_meet():
    names = [realm(None, ""), realm("", ""), realm("a@1", ""), realm("a", "@1"), realm(None, "a@1")]
    names += [realm("a@1", "x"), realm("a@2", "x"), realm("a@1", "y")]
    names += [page_name(names[0], [1, 2]), page_name(names[0], [2, 1]), page_name(names[1], [1, 2])]
    assert len(set(names)) == len(names)
    assert {len(name) for name in names} == {32}


def test_another_way_of_keeping_pages_is_refused():
    class Strange:
        def __init__(self):
            self.cache_allocators = {}

        def search_prefix_match(self, request_id, prompt_ids, adapter):
            pass

    with pytest.raises(ConfigError, match=r"Strange\.mark_complete_blocks, Strange\.search_prefix_match"):
        PrefixCache(Strange(), lambda _: None, lambda *_: None)  # pyright: ignore[reportArgumentType]
