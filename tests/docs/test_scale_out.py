"""The page on vLLM and several engines: its commands parse, its load generator works and stays on this machine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import pytest
from tests.docs.pages import ROOT, blocks
from tests.serve.servers import adapter, serving

from modicum.cli import _root
from modicum.store import Store

PAGE = ROOT / "docs" / "do" / "scale-out.md"
LOAD = ROOT / "benchmarks" / "serving" / "load.py"
LINES = "".join(blocks(PAGE, "bash")).replace("\\\n", " ").splitlines()


def test_servers_of_the_page_parse():
    started = [words[1:] for words in map(shlex.split, LINES) if words[0].endswith("modicum")]
    assert len(started) == 3
    for words in started:
        start = _root.load(words[0]).commands["start"].make_context("start", words[1:])
        assert start.params["replicas"] > 1 or start.params["kind"] == "vllm"


def generate(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, LOAD, *words], capture_output=True, text=True, timeout=100, check=False
    )


def test_the_load_generator_of_the_page(tmp_path):
    (line,) = [line for line in LINES if "serving/load.py" in line]
    words = shlex.split(line)[2:]
    with Store(tmp_path / "store", create=True) as store:
        for n in range(3):
            store.put(f"user-{n}", adapter(n))
    with serving(tmp_path / "state", tmp_path / "store") as served:
        words[words.index("--of") + 1] = "4"
        words[0] = f"{served.url}/v1"
        closed = generate(*words, "--requests", "24", "--clients", "4", "--tokens", "5")
        opened = generate(*words, "--requests", "8", "--rate", "50", "--tokens", "5", "--model", "base")
    found = json.loads(closed.stdout)
    # the fourth adapter is not there
    assert found["requests"] == 24
    assert set(found["errors"]) <= {"404"}
    assert found["answered"] == 24 - found["errors"].get("404", 0) > 0
    assert found["first_token_ms"]["p50"] > 0
    assert json.loads(opened.stdout)["answered"] == 8


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["http://192.0.2.1:8000/v1"], "another machine"),
        (["http://127.0.0.1:1/v1", "--requests", "0", "--clients", "100000"], "requests = 0"),
        (["http://127.0.0.1:1/v1", "--rate", "-1"], "rate = -1"),
    ],
)
def test_what_the_load_generator_refuses(words, fault):
    done = generate(*words)
    assert done.returncode != 0
    assert fault in done.stderr
