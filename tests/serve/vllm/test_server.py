"""vLLM's own server with the plug-in: versions by name, a few names at a time; and a vLLM that has changed."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from tests.serve.vllm.adapters_for_tests import base, offline, prompts

from modicum.models.embedded import path
from modicum.store import Store
from modicum.store.convert import export_adapter
from modicum.store.files import install
from modicum.store.state import config_from, state_from

pytestmark = pytest.mark.slow
#: seconds that vLLM may take to start
PATIENCE = 300


@contextlib.contextmanager
def served(python: str, environment: dict[str, str], log, *options: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path()), "--served-model-name", "base",
        "--dtype", "float32", "--max-model-len", "128", "--block-size", "32", "--num-gpu-blocks-override", "256",
        "--enable-lora", "--max-loras", "4", "--max-cpu-loras", "4", "--max-lora-rank", "16", "--enforce-eager",
        "--host", "127.0.0.1", "--port", str(port), *options,
    ]  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer,
            ):
                assert answer.status == 200
                break
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def ask(port: int, route: str, body: dict | None = None) -> tuple[int, dict]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{route}", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def tokens(port: int, model: str, prompt: list[int]) -> list[int]:
    body = {
        "model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True,
    }  # fmt: skip
    status, answer = ask(port, "completions", body)
    assert status == 200, answer
    return answer["choices"][0]["token_ids"]


def test_versions_by_name_a_few_at_a_time(vllm_python, vllm_environment, store_of_many, tmp_path):
    store, versions = store_of_many
    prompt = prompts(1)[0]
    settings = {
        "MODICUM_VLLM_STORE": store,
        "MODICUM_VLLM_NAMES": "2",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    with served(vllm_python, vllm_environment | settings, tmp_path / "log") as port:
        names = [versions[0], versions[1], versions[-3], "base"]
        expected = {name: offline(store, None if name == "base" else name, prompt, 6) for name in names}
        for name in [*names, *names]:
            assert tokens(port, name, prompt) == expected[name]
        known = [one["id"] for one in ask(port, "models")[1]["data"]]
        assert known[0] == "base"
        assert len(known) == 3
        # what may change is not remembered, so it is not answered either
        for name in ("user-0", "user-0@latest", "user-0@77", "nobody@1"):
            assert ask(port, "completions", {"model": name, "prompt": prompt, "max_tokens": 1})[0] == 404


def test_exported_adapters_are_served_by_vllm_alone(vllm_python, vllm_environment, store_of_many, tmp_path):
    """As standard LoRA: without a store the plug-in does nothing."""
    store, versions = store_of_many
    chosen = {"ada": versions[0], "bob": versions[1]}
    with Store(store) as opened:
        for name, version in chosen.items():
            record = opened.get(version)
            loaded = install(base(), config_from(record), state_from(record))
            export_adapter(loaded, tmp_path / name, "lora", dtype="float32")
    environment = {name: value for name, value in vllm_environment.items() if "MODICUM_VLLM" not in name}
    modules = [f"{name}={tmp_path / name}" for name in chosen]
    with served(vllm_python, environment, tmp_path / "log", "--lora-modules", *modules) as port:
        for name, version in {**chosen, "base": None}.items():
            for prompt in prompts(3):
                assert tokens(port, name, prompt) == offline(store, version, prompt, 6), name


def test_a_changed_vllm_is_refused_with_every_seam(vllm_python, vllm_environment, store_of_many):
    code = """
import vllm.lora.layers.base_linear as layers, vllm.lora.worker_manager as manager
del layers.BaseLinearLayerWithLoRA._apply_lora_to_output
manager.WorkerLoRAManager._load_adapter = lambda self, request, extra: None
from vllm.plugins import load_general_plugins
load_general_plugins()
"""
    environment = vllm_environment | {"MODICUM_VLLM_STORE": store_of_many[0]}
    done = subprocess.run(
        [vllm_python, "-c", code],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode != 0
    assert "VllmChangedError" in done.stderr
    assert "no BaseLinearLayerWithLoRA._apply_lora_to_output" in done.stderr
    assert "_load_adapter takes (self, request, extra), not (self, lora_request)" in done.stderr
