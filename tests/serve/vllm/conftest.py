"""A store for vLLM, and vLLM itself where `$MODICUM_VLLM_PYTHON` names a Python that has it and modicum."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tests.serve.vllm.adapters_for_tests import fill

VARIABLE = "MODICUM_VLLM_PYTHON"
#: small enough for a machine that does other things too
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
SETTINGS = {
    "model": "embedded",
    "dtype": "float32",
    "max_batch": 80,
    "max_batch_tokens": 256,
    "cache_tokens": 16384,
    "slots": 80,
    "max_rank": 16,
    "max_length": 128,
}


@pytest.fixture(scope="package")
def vllm_python() -> str:
    """The Python of vLLM's environment."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"${VARIABLE} names no Python that has vLLM; docs/do/scale-out.md makes one")
    return python


@pytest.fixture(scope="package")
def vllm_environment() -> dict[str, str]:
    core = max(os.sched_getaffinity(0))
    return {**os.environ, **ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": str(core)}


@pytest.fixture(scope="package")
def store_of_many(tmp_path_factory) -> tuple[str, list[str]]:
    """A store, and 64 versions in it."""
    folder = str(tmp_path_factory.mktemp("vllm") / "store")
    return folder, fill(folder, 58)


@pytest.fixture(scope="package")
def ask(vllm_python, vllm_environment, store_of_many):
    """What the engine answers to rounds of requests that are made at once; every call starts one."""

    def answers(rounds: list[list[dict]], **settings) -> dict:
        asked = {"store": store_of_many[0], "settings": {**SETTINGS, **settings}, "rounds": rounds}
        script = Path(__file__).with_name("in_vllm.py")
        done = subprocess.run(
            [vllm_python, script], check=False,
            input=json.dumps(asked), env=vllm_environment, capture_output=True, text=True,
            timeout=400,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        assert lines, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return json.loads(lines[0].removeprefix("RESULT "))

    return answers
