"""`modicum serve` as a process: signals, kills, and what is on the disk afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import httpx
import openai
import pytest
from tests.serve.servers import adapter

from modicum.store import Store

PROMPT = "Once upon a time"


class Process:
    """A server in a process of its own."""

    def __init__(self, folder, *options):
        command = [sys.executable, "-m", "modicum", "serve", "embedded", "--json", "--port", "0"]
        command += ["--state", folder / "state", "--store", folder / "store", "--dtype", "float32", *options]
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        line = self.process.stdout.readline()
        assert line, (folder / "log").read_text()
        self.said = json.loads(line)
        self.client = openai.OpenAI(base_url=self.said["url"], api_key="none", max_retries=0, timeout=60)

    def stream(self, **options):
        return self.client.completions.create(
            model="ada", prompt=PROMPT, stream=True, extra_body={"ignore_eos": True}, **options
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()


@pytest.fixture
def folder(tmp_path):
    with Store(tmp_path / "store", create=True) as store:
        for seed in range(3):
            store.put("ada", adapter(seed))
        store.promote("ada@1")
    return tmp_path


def _read(stream, found):
    """Returns when the stream has ended; its text and its error are in `found`."""
    try:
        for chunk in stream:
            found["text"] = found.get("text", "") + chunk.choices[0].text
            found["finish"] = chunk.choices[0].finish_reason
    except openai.OpenAIError as error:
        found["error"] = error


@pytest.mark.slow
def test_a_signal_lets_requests_end_within_the_grace(folder):
    with Process(folder, "--grace", "3") as server:
        assert server.said["open"]
        long = [server.stream(max_tokens=500) for _ in range(60)]
        # the last to come, so that it is running when the signal comes
        short = server.stream(max_tokens=16)
        server.process.send_signal(signal.SIGTERM)
        found = [{} for _ in range(61)]
        threads = [
            threading.Thread(target=_read, args=pair) for pair in zip((short, *long), found, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert server.process.wait(30) == 0
        assert found[0]["finish"] == "length", "what can end within the grace does"
        for cut in found[1:]:
            assert type(cut["error"]) is openai.APIError, "an error event, not a broken connection"
            assert "stopped" in str(cut["error"])
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.said["url"])
    log = (folder / "log").read_text()
    assert "Traceback" not in log
    assert PROMPT not in log
    assert sum(json.loads(line)["message"] == "request" for line in log.splitlines() if line[0] == "{") == 61


@pytest.mark.slow
def test_what_was_acknowledged_outlives_a_kill(folder):
    admin = {"Content-Type": "application/json"}
    with Process(folder) as server:
        root = server.said["url"].removesuffix("/v1")
        for version in (2, 3):
            answer = httpx.post(
                f"{root}/admin/adapters/ada/promote", json={"version": version}, headers=admin, timeout=30
            )
            assert answer.status_code == 200, answer.text
        assert httpx.post(f"{root}/admin/adapters/ada/rollback", timeout=30).json()["version"] == 2
        server.process.kill()
        server.process.wait()
    with Store(folder / "store") as store:
        assert store.show("ada@production").version == 2
        assert store.verify().ok
        assert [entry.actor for entry in store.log("ada")][-3:] == ["local"] * 3
