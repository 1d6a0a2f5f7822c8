"""vLLM behind Ray Serve behind `modicum serve`: two replicas, 64 adapters at once, more than both have room for.

Where the Python of vLLM has Ray too: `pip install 'ray[serve]'` in that environment.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time

import httpx
import openai
import psutil
import pytest
from tests.serve.vllm.adapters_for_tests import MODEL, offline, prompts, record_of, varied

from modicum import LoraXSConfig
from modicum.models.loading import load_tokenizer
from modicum.store import Store

pytestmark = pytest.mark.slow
TOKENS, SLOTS, USERS = 8, 40, 58
#: seconds that two engines may take to start, and that a killed one may take to be replaced
PATIENCE = 400
OPTIONS = {
    "--engine": "vllm", "--replicas": 2, "--slots": SLOTS, "--max-batch": 80, "--max-batch-tokens": 256,
    "--cache-tokens": 16384, "--max-rank": 16, "--max-length": 128, "--dtype": "float32", "--port": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def python(vllm_python) -> str:
    done = subprocess.run(
        [vllm_python, "-c", "import ray.serve"], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"{vllm_python} has no Ray: pip install 'ray[serve]' there")
    return vllm_python


@pytest.fixture(scope="module")
def cores() -> list[str]:
    """One for each replica."""
    found = [str(core) for core in sorted(os.sched_getaffinity(0))[-2:]]
    if len(found) < 2:
        pytest.skip("this machine has one core")
    return found


@pytest.fixture(scope="module")
def store(store_of_many, tmp_path_factory) -> str:
    """64 adapters, 58 of them in two versions, of which the first one is in production."""
    folder = tmp_path_factory.mktemp("cluster") / "store"
    shutil.copytree(store_of_many[0], folder)
    other = record_of(LoraXSConfig(r=8, alpha=16.0, init_weights=False))
    with Store(folder) as opened:
        for n in range(USERS):
            opened.put(f"user-{n}", varied(other, 1000 + n))
            opened.promote(f"user-{n}@1")
    return str(folder)


@contextlib.contextmanager
def served(python: str, environment: dict[str, str], store: str, folder):
    """The address of a server, and its process."""
    command = [
        python,
        "-m",
        "modicum",
        "serve",
        MODEL,
        "--json",
        "--store",
        store,
        "--state",
        folder / "state",
    ]
    command += [word for option in OPTIONS.items() for word in map(str, option)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
        # without it a server that hangs would hang the test
        patience = threading.Timer(PATIENCE, process.kill)
        patience.start()
        try:
            lines = iter(process.stdout.readline, "")
            said = next((line for line in lines if line.startswith("{")), None)
            assert said, (folder / "log").read_text()[-4000:]
            patience.cancel()
            yield json.loads(said)["url"], psutil.Process(process.pid)
            process.terminate()
            process.wait(60)
        finally:
            patience.cancel()
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def running(python, vllm_environment, cores, store, tmp_path_factory):
    environment = {name: value for name, value in vllm_environment.items() if name != "RAY_ADDRESS"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "|".join(cores), "RAY_USAGE_STATS_ENABLED": "0"}
    with served(python, environment, store, tmp_path_factory.mktemp("server")) as found:
        yield found


def ask(url: str, models: list[str], texts: list[list[int]]) -> list[str | openai.APIStatusError]:
    """What every model goes on with, all of them asked at once; errors in their places."""

    async def one(client: openai.AsyncOpenAI, model: str, prompt: list[int]) -> str | openai.APIStatusError:
        options = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
        try:
            answer = await client.completions.create(model=model, prompt=prompt, **options)
        except openai.APIStatusError as error:
            return error
        return answer.choices[0].text

    async def every() -> list:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(one(client, *each) for each in zip(models, texts, strict=True)))

    return asyncio.run(every())


def alone(store: str, versions: list[str | None], texts: list[list[int]]) -> list[str]:
    """The text of every version's answer offline."""
    tokenizer, found = load_tokenizer(MODEL), []
    for version, prompt in zip(versions, texts, strict=True):
        whole = tokenizer.decode(prompt + offline(store, version, prompt, TOKENS), skip_special_tokens=True)
        found.append(whole[len(tokenizer.decode(prompt, skip_special_tokens=True)) :])
    return found


def pool(url: str) -> dict[str, float]:
    """What the replicas said last of their adapters."""
    text = httpx.get(url.replace("/v1", "/metrics"), timeout=60).text
    return {
        name: float(value) for name, value in re.findall(r"^modicum_pool_(\w+) (\S+)$", text, re.MULTILINE)
    }


def test_names_and_versions_of_64_adapters_at_once(running, store, store_of_many):
    url, _ = running
    users = [f"user-{n}" for n in range(USERS)]
    others = [version.partition("@")[0] for version in store_of_many[1] if "user" not in version]
    texts = prompts(len(users + others) + 4)
    rest = [*others, *["base"] * 4]
    of_rest = [*(f"{name}@1" for name in others), *[None] * 4]
    assert len(users + others) == 64
    first = alone(store, [*(f"{name}@1" for name in users), *of_rest], texts)
    second = alone(store, [*(f"{name}@2" for name in users), *of_rest], texts)
    assert len(set(first + second)) > 64
    # a bare name is what production points at
    assert ask(url, [*users, *rest], texts) == first
    assert ask(url, [*(f"{name}@latest" for name in users), *rest], texts) == second
    assert ask(url, [*(f"{name}@1" for name in users), *rest], texts) == first
    with Store(store) as opened:
        opened.promote("user-0@2")
    assert ask(url, users[:2], texts[:2]) == [second[0], first[1]]


def test_replicas_forget_what_they_have_no_room_for(running, store):
    url, _ = running
    text = prompts(1)
    versions = [f"user-{n}@{number}" for number in (1, 2) for n in range(USERS)]
    # everything once, a few at a time: more than both have slots for
    for first in range(0, len(versions), 8):
        some = versions[first : first + 8]
        assert not any(isinstance(one, Exception) for one in ask(url, some, text * len(some)))
    # each of them tells with an answer, once a second at most
    least, end = len(versions) - 2 * SLOTS, time.monotonic() + PATIENCE
    while time.monotonic() < end:
        told = pool(url)
        if told["slots"] == 2 * SLOTS and told["evictions_total"] >= least:
            break
        time.sleep(1.1)
        ask(url, versions[:16], text * 16)
    assert told["slots"] == 2 * SLOTS
    assert told["slots_used"] <= 2 * SLOTS
    assert told["evictions_total"] >= least
    assert told["failures_total"] == 0


def test_what_cannot_be_served_is_told_as_by_one_engine(running, store):
    url, _ = running
    with Store(store) as opened:
        record = opened.get("user-0@1")
        opened.put("stranger", _of_another_base(record))
    text = prompts(1)[0]
    nobody, gone, stranger, fine = ask(url, ["nobody", "user-0@9", "stranger", "user-3"], [text] * 4)
    for error in (nobody, gone):
        assert (error.status_code, error.code) == (404, "model_not_found")
    assert (stranger.status_code, stranger.code) == (503, "adapter_unavailable")
    assert "trained on another base model" in str(stranger)
    assert fine == alone(store, ["user-3@1"], [text])[0]


def test_every_replica_has_cores_of_its_own_and_is_replaced_when_its_engine_dies(running, store, cores):
    url, server = running
    engines = _engines(server)
    assert sorted(one.environ()["VLLM_CPU_OMP_THREADS_BIND"] for one in engines) == sorted(cores)
    names = [f"user-{n}" for n in range(8, 16)]
    texts = prompts(8)
    expected = alone(store, [f"{name}@1" for name in names], texts)
    engines[0].kill()
    end = time.monotonic() + PATIENCE
    found = []
    while time.monotonic() < end:
        found = ask(url, names, texts)
        now = _engines(server)
        if found == expected and len(now) == 2:
            break
        # requests of the one that died fail by name, and the server goes on
        for one in found:
            assert isinstance(one, str) or one.code == "generation_failed"
        time.sleep(1)
    assert found == expected
    assert len(now) == 2
    assert engines[0] not in now


def _engines(server: psutil.Process) -> list[psutil.Process]:
    """The processes in which vLLM computes."""
    found = []
    for process in server.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and "VLLM::EngineCore" in " ".join(process.cmdline()):
                found.append(process)
    return found


def _of_another_base(record):
    import dataclasses

    return dataclasses.replace(record, base_fingerprint="0" * 32)
