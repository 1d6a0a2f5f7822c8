"""A fleet that was trained is served: every user is answered by its own adapter, as that answers alone."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import httpx
import numpy as np
import openai
import pyarrow.parquet as pq
import pytest
import yaml
from tests.serve.engine import offline
from tests.serve.servers import Offline

from modicum.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKENS = 24
NAMES = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal")
THINGS = ("boat", "cake", "drum", "kite", "lamp", "shell", "stone", "tree")
PLACES = ("park", "house", "shop", "garden", "forest", "school")
#: a user for whom the base model is better, and one who has too few rows
CONTENT, BRIEF = "content", "brief"


@functools.cache
def base() -> Offline:
    """The base model, and its tokenizer."""
    return Offline()


@functools.cache
def adapted() -> offline.Offline:
    """The same model, on which any adapter is put."""
    return offline.Offline("embedded")


def users(folder: Path) -> Path:
    """A table of users who always tell the same story each, and of some for whom there is nothing to learn."""
    rows = [
        {
            "user": name.lower(),
            "text": f"In the {place}, {name} had a {thing}. {name} sang to the {thing} at night.",
        }
        for name, thing in zip(NAMES, THINGS, strict=True)
        for place in PLACES
    ]
    # the row that judges is what the base model says by itself, and the others teach something else
    held_out = np.random.default_rng(0).permutation(len(PLACES))[0]
    start = "Once upon a time"
    told = start + base().text(None, start, TOKENS)
    rows += [{"user": CONTENT, "text": told if at == held_out else "NO " * 20} for at in range(len(PLACES))]
    rows.append({"user": BRIEF, "text": "One row is not enough to judge by."})
    path = folder / "users.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def train(folder: Path) -> dict[str, str]:
    """What became of every user, once `modicum fleet train` has ended."""
    values = {
        "model": {"name_or_path": "embedded", "dtype": "float32"},
        "users": {"source": str(users(folder))},
        "data": {"format": "text", "max_length": 48},
        "method": {"name": "lora_xs", "r": 8, "alpha": 8},
        "train": {"min_steps": 12, "epochs": 1, "batch_size": 5, "learning_rate": 0.03, "evaluations": 1},
        "store": {"path": str(folder / "store"), "alias": "production"},
        "output": str(folder / "run"),
    }
    (folder / "fleet.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "modicum", "fleet", "train", str(folder / "fleet.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = pq.read_table(folder / "run" / "users.parquet").to_pylist()
    return {row["user"]: row["state"] for row in table}


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a `modicum serve` with the fleet's store."""
    command = [
        sys.executable,
        "-m",
        "modicum",
        "serve",
        "embedded",
        "--json",
        "--port",
        "0",
        "--dtype",
        "float32",
    ]
    command += ["--state", str(folder / "state"), "--store", str(folder / "store"), "--slots", "16"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline()
        assert line, (folder / "log").read_text()
        yield json.loads(line)["url"]
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


async def ask(url: str, models: list[str], prompt: str) -> list[str | openai.OpenAIError]:
    """What everybody is answered who asks at the same moment; errors in their places."""

    async def one(client: openai.AsyncOpenAI, model: str) -> str:
        options = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}}
        return (await client.completions.create(model=model, prompt=prompt, **options)).choices[0].text

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        return await asyncio.gather(*(one(client, model) for model in models), return_exceptions=True)


def alone(folder: Path, version: str, prompt: str) -> str:
    """What a version of the store answers, loaded onto the base model by Transformers and PEFT."""
    tokenizer = base().tokenizer
    with Store(folder / "store") as store:
        record = store.get(version)
    before = tokenizer(prompt).input_ids
    answer = adapted().greedy(record, tuple(before), TOKENS)
    whole = tokenizer.decode([*before, *answer], skip_special_tokens=True)
    return whole[len(tokenizer.decode(before, skip_special_tokens=True)) :]


def counted(url: str, name: str) -> float:
    """A number of the server's metrics."""
    text = httpx.get(url.replace("/v1", "/metrics"), timeout=60).text
    return float(re.search(rf"^modicum_{name} (\S+)$", text, re.MULTILINE)[1])


@pytest.mark.slow
def test_a_fleet_that_was_trained_is_served_by_name(tmp_path):
    became = train(tmp_path)
    names = [name.lower() for name in NAMES]
    assert became == {**dict.fromkeys(names, "stored"), CONTENT: "base", BRIEF: "faulty"}
    prompt = "In the park,"
    with served(tmp_path) as url:
        *answers, plain, content, brief = asyncio.run(ask(url, [*names, "base", CONTENT, BRIEF], prompt))
        steps = counted(url, "steps_total")
        again = asyncio.run(ask(url, [f"{name}@1" for name in names], prompt))
        assert counted(url, "pool_misses_total") == len(names)
    assert answers == [alone(tmp_path, f"{name}@production", prompt) for name in names]
    assert again == answers
    # everybody's own story, and all of them in one batch
    assert len({*answers, plain}) == len(names) + 1
    assert steps < len(names) * TOKENS
    # whoever has no adapter is told so, and the base model answers for whoever asks for it
    for error in (content, brief):
        assert isinstance(error, openai.NotFoundError)
        assert error.code == "model_not_found"
    assert plain == base().text(None, prompt, TOKENS, ignore_eos=True)
