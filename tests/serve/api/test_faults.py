"""What goes wrong in production, on real servers: each fault hurts the request it belongs to, and no other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import time

import httpx
import numpy as np
import openai
import pytest
from tests.serve.servers import Offline, adapter, rebuilt, serving, template

from modicum.store import Store

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def offline():
    return Offline()


@pytest.fixture
def store(tmp_path):
    """A store with three adapters that answer, and one that gives NaN."""
    with Store(tmp_path / "store", create=True) as opened:
        for seed, name in enumerate(("ada", "bob", "eve")):
            opened.put(name, adapter(seed))
        opened.put("nan", rebuilt({name: np.full_like(value, 1e30) for name, value in template().tensors()}))
    return tmp_path / "store"


@pytest.fixture
def start(tmp_path, store):
    """A function that starts a server on the store; all are stopped at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(tmp_path / "state", store, **options))


def _ask(client, model, **options):
    options = {
        "prompt": PROMPT,
        "max_tokens": 6,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    } | options
    return client.completions.create(model=model, **options)


def _text(client, model, **options):
    return _ask(client, model, **options).choices[0].text


def _until(condition, what):
    """Returns as soon as it holds."""
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def _idle(served):
    """Whether nothing runs and no adapter is held."""
    engine = served.service.engine
    stats = engine.stats()
    return stats.running == stats.waiting == 0 and all(one.requests == 0 for one in engine.residents())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_not_worked_for(start, stream):
    served = start()
    body = {"model": "ada", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": stream, "n": 3}
    engine = served.service.engine
    if stream:
        with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=30) as answer:
            # the answer is closed with what reads it
            pieces = answer.iter_bytes()
            next(pieces)
            assert engine.residents()[0].requests == 3
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json=body, timeout=1.0)
    _until(lambda: _idle(served), "the requests of a client that is gone go on")
    assert 0 < engine.stats().generated_tokens < 1000
    assert served.service.metrics.usage()["local"].requests == {"cancelled": 1}


def test_numbers_that_overflow_fail_their_own_request(start, offline):
    served = start()

    async def ask_all():
        async with served.aclient() as client:
            asked = [
                client.completions.create(
                    model=model, prompt=PROMPT, max_tokens=6, temperature=0, extra_body={"ignore_eos": True}
                )
                for model in ("ada", "nan", "bob", "nan", "base")
            ]
            return await asyncio.gather(*asked, return_exceptions=True)

    ada, nan, bob, again, base = asyncio.run(ask_all())
    for failed in (nan, again):
        assert isinstance(failed, openai.InternalServerError)
        assert failed.code == "generation_failed"
        assert "nan@1" in str(failed)
    for answer, record in ((ada, adapter(0)), (bob, adapter(1)), (base, None)):
        assert answer.choices[0].text == offline.text(record, PROMPT, 6, ignore_eos=True)
    with served.client() as client, pytest.raises(openai.APIError, match="nan@1"):
        list(_ask(client, "nan", stream=True))
    _until(lambda: _idle(served), "a failed request holds its adapter")


def test_a_damaged_record_fails_its_own_requests(start, store, offline):
    served = start()
    (segment,) = (store / "segments").iterdir()
    data = bytearray(segment.read_bytes())
    with Store(store) as opened:
        payload = opened.get_bytes("bob@1")
    data[data.index(payload) + len(payload) // 2] ^= 1
    segment.write_bytes(data)
    with served.client() as client:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError) as caught:
                _ask(client, "bob")
            assert (caught.value.status_code, caught.value.code) == (503, "adapter_unavailable")
        assert _text(client, "ada") == offline.text(adapter(0), PROMPT, 6, ignore_eos=True)
        assert served.service.engine.stats().pool.failures


def test_adapters_that_are_removed(start, store, offline):
    served = start()
    with served.client() as client, Store(store) as opened:
        assert _text(client, "ada")
        with _ask(client, "ada", max_tokens=60, stream=True) as stream:
            pieces = [next(stream).choices[0].text]
            opened.purge("ada")
            pieces += [chunk.choices[0].text for chunk in stream]
        wanted = offline.text(adapter(0), PROMPT, 60, ignore_eos=True)
        assert "".join(pieces) == wanted, "what runs goes on"
        opened.remove("bob", 1)
        for model in ("ada", "ada@1", "bob", "bob@1"):
            with pytest.raises(openai.NotFoundError):
                _ask(client, model)
        opened.put("ada", adapter(7))
        assert _text(client, "ada") == offline.text(adapter(7), PROMPT, 6, ignore_eos=True)


def test_an_experiment_does_not_answer_with_what_was_removed(start, store, offline):
    served = start()
    experiments = served.service.experiments
    arms = [{"label": name, "version": f"{name}@1", "weight": 1} for name in ("ada", "bob")]
    experiments.create({"name": "a-b", "arms": arms}, "test")
    experiments.start("a-b", "test")
    with served.client() as client, Store(store) as opened:
        first = offline.text(adapter(0), PROMPT, 6, ignore_eos=True)
        assert _text(client, "a-b") == first, "without a user it is the control"
        opened.purge("ada")
        with pytest.raises(openai.NotFoundError, match="no longer in the store"):
            _ask(client, "a-b")
        opened.put("ada", adapter(8))
        assert _text(client, "a-b") == offline.text(adapter(8), PROMPT, 6, ignore_eos=True) != first


def test_a_store_that_is_locked_or_gone(start, store, offline):
    served = start()
    ada = offline.text(adapter(0), PROMPT, 6, ignore_eos=True)
    with served.client() as client:
        assert _text(client, "ada") == ada
        other = sqlite3.connect(store / "index.sqlite")
        other.execute("BEGIN IMMEDIATE")
        assert _text(client, "ada") == ada
        assert _text(client, "bob"), "writers keep nobody from reading"
        other.close()
        # what is open stays readable under another name, so the bytes go away, too
        (segment,) = (store / "segments").iterdir()
        data = segment.read_bytes()
        os.truncate(segment, 0)
        store.rename(store.with_name("elsewhere"))
        assert _text(client, "ada") == ada, "what is in memory is served without the store"
        ready = httpx.get(f"{served.url}/ready", timeout=30)
        assert (ready.status_code, ready.json()["store"], ready.json()["engine"]) == (503, False, True)
        with pytest.raises(openai.InternalServerError) as caught:
            _ask(client, "eve")
        assert caught.value.status_code == 503
        assert _text(client, "base")
        store.with_name("elsewhere").rename(store)
        segment.write_bytes(data)

        def back():
            try:
                return _text(client, "eve")
            except openai.InternalServerError:
                return None

        _until(back, "the store is back, and not used")
        _until(lambda: httpx.get(f"{served.url}/ready").status_code == 200, "the store is back, and not seen")


def test_a_change_that_a_locked_store_does_not_take_is_told_and_not_made(start, store, offline, monkeypatch):
    monkeypatch.setitem(Store.__init__.__kwdefaults__, "timeout", 0.3)
    with Store(store) as opened:
        opened.put("ada", adapter(5))
        opened.promote("ada@1")
    served = start()
    old, new = (offline.text(adapter(seed), PROMPT, 6, ignore_eos=True) for seed in (0, 5))
    promote = f"{served.url}/admin/adapters/ada/promote"
    with served.client() as client, Store(store) as opened:
        with contextlib.closing(sqlite3.connect(store / "index.sqlite")) as other:
            other.execute("BEGIN IMMEDIATE")
            refused = httpx.post(promote, json={"version": 2}, timeout=60)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
            assert _text(client, "ada") == old
        assert opened.show("ada@production").version == 1
        assert _text(client, "ada") == old
        assert httpx.post(promote, json={"version": 2}, timeout=60).status_code == 200
        assert opened.show("ada@production").version == 2
        assert _text(client, "ada") == new


def test_a_cold_adapter_that_several_want_is_loaded_once(start, offline):
    served = start()
    engine, reads = served.service.engine, []
    read = engine._slots._read

    def slow(version):
        reads.append(version)
        _until(lambda: engine.stats().waiting == 4, "they wait for each other")
        return read(version)

    engine._slots._read = slow

    async def ask_all():
        async with served.aclient() as client:
            asked = [
                client.completions.create(
                    model="ada", prompt=PROMPT, max_tokens=6, temperature=0, extra_body={"ignore_eos": True}
                )
                for _ in range(4)
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == [offline.text(adapter(0), PROMPT, 6, ignore_eos=True)] * 4
    assert reads == ["ada@1"]
    assert served.service.metrics.totals.load.count == 1
    assert engine.stats().pool.used == 1


def test_a_request_that_takes_too_long(start):
    served = start(request_timeout=1.0)
    with served.client() as client:
        with pytest.raises(openai.InternalServerError, match="not finished within 1 seconds") as caught:
            _ask(client, "base", max_tokens=500, n=8)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match="not finished within 1 seconds"):
            list(_ask(client, "base", max_tokens=500, n=8, stream=True))
        _until(lambda: _idle(served), "what takes too long goes on")
        assert _text(client, "base")


def test_more_than_the_queue_takes_is_sent_away(start):
    served = start(engine={"max_batch": 2, "max_queue": 2})

    async def ask_all():
        async with served.aclient() as client:
            asked = [client.completions.create(model="base", prompt=PROMPT, max_tokens=20) for _ in range(12)]
            return await asyncio.gather(*asked, return_exceptions=True)

    answers = asyncio.run(ask_all())
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert len(refused) >= 6
    assert len(refused) + sum(isinstance(a, openai.types.Completion) for a in answers) == 12
    assert all(answer.code == "overloaded" for answer in refused)
    assert all(int(answer.response.headers["retry-after"]) >= 1 for answer in refused)


def test_a_stopping_server_sends_new_requests_away(start):
    served = start()
    with httpx.Client(base_url=served.url, timeout=30) as client:
        body = {"model": "base", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            # a connection that is open already, between two requests
            with httpx.Client(base_url=served.url, timeout=30) as other:
                served.server._gate.close()
                refused = other.post("/v1/completions", json=body)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
                assert other.get("/ready").status_code == 503
                assert other.get("/health").status_code == 200
            rest = list(lines)
    assert rest[-2:] == ["data: [DONE]", ""]


@pytest.mark.slow
def test_a_thousand_connections_at_once(start, offline):
    served = start(engine={"max_queue": 600})
    host, port = served.url.removeprefix("http://").split(":")
    models = {"base": None, "ada": adapter(0), "bob": adapter(1), "eve": adapter(2)}
    wanted = {name: offline.text(record, PROMPT, 4, ignore_eos=True) for name, record in models.items()}

    async def ask(number):
        model = list(models)[number % len(models)]
        body = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        data = json.dumps(body)
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n{data}".encode())
        try:
            status, _, rest = (await reader.read()).partition(b"\r\n")
        finally:
            writer.close()
            await writer.wait_closed()
        code = int(status.split()[1])
        answer = json.loads(rest.partition(b"\r\n\r\n")[2])
        return code, model, answer["choices"][0]["text"] if code == 200 else answer["error"]["message"]

    async def ask_all():
        async with asyncio.timeout(120):
            return await asyncio.gather(*map(ask, range(1000)))

    answers = asyncio.run(ask_all())
    assert [(code, said) for code, _, said in answers if code not in {200, 429}] == []
    assert sum(code == 200 for code, _, _ in answers) >= 500
    for code, model, said in answers:
        assert said == wanted[model] if code == 200 else "no more are taken" in said
    _until(lambda: _idle(served), "requests are left")
