"""A server whose engine is in another process, over HTTP: changes count at once, and counts are right."""

from __future__ import annotations

import os
import signal
import time

import httpx
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.end_to_end.test_serve_process import PROMPT, Process
from tests.serve.servers import Offline, adapter, serving

from modicum.serve.process.engine import ProcessEngine
from modicum.store import Store


@pytest.fixture(scope="module")
def offline():
    return Offline()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with Store(folder / "store", create=True) as store:
        for seed in range(3):
            store.put("ada", adapter(seed))
        store.put("bob", adapter(3))
        store.promote("ada@1")
        with serving(folder / "state", folder / "store", engine={"own_process": True, "slots": 4}) as one:
            assert isinstance(one.service.engine, ProcessEngine)
            one.store = store
            yield one


def complete(served, model="ada", **more):
    options = {"max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}} | more
    with served.client() as client:
        return client.completions.create(model=model, prompt=PROMPT, **options)


def admin(served, path, **body):
    answer = httpx.post(f"{served.url}/admin/adapters/{path}", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(offline, seed, count=8):
    return offline.text(adapter(seed), PROMPT, count, ignore_eos=True)


@pytest.mark.slow
def test_promote_and_rollback_count_from_the_next_request(served, offline):
    with served.client() as client:
        running = client.completions.create(
            model="ada", prompt=PROMPT, max_tokens=120, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        pieces = [next(iter(running)).choices[0].text]
        admin(served, "ada/promote", version=2)
        assert complete(served).choices[0].text == text(offline, 1)
        pieces += [chunk.choices[0].text for chunk in running]
    assert "".join(pieces) == text(offline, 0, 120)
    admin(served, "ada/rollback", alias="production")
    assert complete(served).choices[0].text == text(offline, 0)


@pytest.mark.slow
def test_what_is_pinned_stays_and_is_read_once(served, offline):
    """Requests must not have a version loaded anew that the other process has as it is in the store."""
    assert admin(served, "bob/load", version=1, pin=True)["pinned"]
    before = served.service.engine.stats().pool
    for _ in range(3):
        assert complete(served, "bob").choices[0].text == text(offline, 3)
    for number in (1, 2, 3, 1, 2, 3):
        complete(served, f"ada@{number}")
    after = served.service.engine.stats().pool
    assert after.misses - before.misses <= 3
    assert [one.pinned for one in served.service.engine.residents() if one.version == "bob@1"] == [True]
    admin(served, "bob/unpin", version=1)
    assert admin(served, "bob/unload", version=1)["unloaded"]


@pytest.mark.slow
def test_a_name_that_was_purged_never_answers_for_the_one_that_came_after(served, offline):
    for seed in (4, 5, 6):
        served.store.put("eve", adapter(seed))
        # by an admin, who names no entry, or by a request
        if seed == 5:
            admin(served, "eve/load", version=1, pin=True)
        for _ in range(2):
            assert complete(served, "eve@1").choices[0].text == text(offline, seed)
        served.store.purge("eve")
        with pytest.raises(openai.NotFoundError):
            complete(served, "eve")


def scraped(served):
    answer = httpx.get(f"{served.url}/metrics", timeout=30)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


@pytest.mark.slow
def test_metrics_are_those_of_the_other_process(served):
    httpx.post(f"{served.url}/admin/adapters/ada/unload", json={"version": 3}, timeout=30)
    before = scraped(served)
    answers = [complete(served, "ada@3") for _ in range(3)]
    after = scraped(served)

    def grown(*name):
        return after[name] - before.get(name, 0.0)

    tokens = sum(one.usage.completion_tokens for one in answers)
    assert tokens == 24
    assert grown("modicum_engine_generated_tokens_total") == tokens
    assert grown("modicum_engine_prompt_tokens_total") == sum(one.usage.prompt_tokens for one in answers)
    assert grown("modicum_pool_misses_total") == grown("modicum_adapter_load_seconds_count") == 1
    assert grown("modicum_pool_hits_total") == 2
    assert grown("modicum_steps_total") == grown("modicum_step_seconds_count") == tokens
    assert grown("modicum_step_sequences_total") == tokens
    assert after["modicum_requests_running",] == after["modicum_requests_waiting",] == 0
    # both processes hold a model's libraries at least
    mine = psutil.Process().memory_info().rss
    assert after["modicum_memory_bytes", "resident"] > mine + 1e8


@pytest.mark.slow
def test_a_client_that_hangs_up_is_not_worked_for(served):
    engine = served.service.engine
    before = engine.stats().generated_tokens
    body = {"model": "ada", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True, "n": 3}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=30) as answer:
        next(answer.iter_bytes())
    until = time.monotonic() + 20
    while engine.stats().running or any(one.requests for one in engine.residents()) or engine._asked:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert engine.stats().generated_tokens - before < 1000


@pytest.mark.slow
def test_a_process_that_dies_fails_its_requests_and_is_replaced(served, offline):
    with served.client() as client:
        running = client.completions.create(
            model="ada", prompt=PROMPT, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(running))
        os.kill(served.service.engine._spawned.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="begins anew"):
            list(running)
    ready = httpx.get(f"{served.url}/ready", timeout=30)
    assert (ready.status_code, ready.json()["engine"]) == (503, False)
    with pytest.raises(openai.RateLimitError) as caught:
        complete(served)
    assert int(caught.value.response.headers["retry-after"]) >= 1
    until = time.monotonic() + 60
    while httpx.get(f"{served.url}/ready", timeout=30).status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert complete(served).choices[0].text == text(offline, 0)


@pytest.fixture
def folder(tmp_path):
    with Store(tmp_path / "store", create=True) as store:
        store.put("ada", adapter(0))
    return tmp_path


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_while_it_streams_ends_with_its_engine(folder):
    # what ends within the grace: see test_serve_process, whose server has an engine in another process too
    with Process(folder, "--own-process", "--grace", "0.5") as server:
        (child,) = psutil.Process(server.process.pid).children()
        stream = server.stream(max_tokens=480)
        next(iter(stream))
        # as a supervisor does, to all of them
        for pid in (server.process.pid, child.pid):
            os.kill(pid, signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopped"):
            list(stream)
        assert server.process.wait(30) == 0
        assert not child.is_running()
    log = (folder / "log").read_text()
    assert "Traceback" not in log
    assert '"message": "request"' in log


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_no_engine(folder):
    with Process(folder, "--own-process") as server:
        (child,) = psutil.Process(server.process.pid).children()
        stream = server.stream(max_tokens=400)
        next(iter(stream))
        server.process.kill()
        with pytest.raises(openai.APIConnectionError):
            list(stream)
        until = time.monotonic() + 20
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < until
            time.sleep(0.02)
