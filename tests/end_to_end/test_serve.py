"""A server on the bundled model: 64 clients with 64 adapters at once get what each adapter answers alone."""

from __future__ import annotations

import asyncio

import pytest
from tests.serve.servers import Offline, adapter, serving

from modicum.store import Store

USERS, TOKENS = 64, 10
_PROMPTS = ("Once upon a time", "The dog was", "A girl named Lily went to the park and", "He")


def _prompt(user: int) -> str:
    return f"{_PROMPTS[user % len(_PROMPTS)]}{' very' * (user % 5)}"


async def _ask_all(served) -> tuple[list[str], int]:
    """What everybody gets, half of them as a stream, and how many ran in one step at most."""
    most = 0

    async def ask(client, user: int) -> str:
        nonlocal most
        options = {"model": f"user{user}" if user < USERS else "base", "prompt": _prompt(user)}
        options |= {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
        if user % 2:
            return (await client.completions.create(**options)).choices[0].text
        stream = await client.completions.create(**options, stream=True)
        text = ""
        async for chunk in stream:
            most = max(most, served.service.engine.stats().running)
            text += chunk.choices[0].text
        return text

    async with served.aclient() as client:
        return list(await asyncio.gather(*(ask(client, user) for user in range(USERS + 4)))), most


@pytest.mark.slow
def test_64_adapters_in_one_batch_answer_as_each_does_alone(tmp_path):
    with Store(tmp_path / "store", create=True) as store:
        store.put_many((f"user{user}", adapter(user)) for user in range(USERS))
    with serving(tmp_path / "state", tmp_path / "store", engine={"max_batch": USERS + 4}) as served:
        texts, most = asyncio.run(_ask_all(served))
        stats = served.service.engine.stats()
    offline = Offline()
    alone = [
        offline.text(adapter(user) if user < USERS else None, _prompt(user), TOKENS, ignore_eos=True)
        for user in range(USERS + 4)
    ]
    assert texts == alone
    assert len(set(texts)) > USERS * 0.9, "the adapters differ"
    assert most >= USERS, "they ran together"
    assert (stats.pool.used, stats.pool.misses) == (USERS, USERS)
    assert stats.running == stats.waiting == 0
