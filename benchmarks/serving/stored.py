"""What the benchmarks of serving share: a random Llama with a tokenizer in a folder, and stores full of adapters."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from modicum import LoraXSConfig
from modicum.models import embedded
from modicum.models.loading import load_base
from modicum.store import Store
from modicum.store.files import to_record
from modicum.store.record import Record, build

if TYPE_CHECKING:
    from collections.abc import Iterator

#: records that are put at once
_CHUNK = 5000


def random_llama(folder: Path, *, vocabulary: int = 4096, small: bool = False) -> Path:
    """The folder, with a random Llama (hidden 768, 12 layers) and the tokenizer of the embedded model in it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128 if small else 768,
        intermediate_size=352 if small else 2048,
        num_hidden_layers=2 if small else 12,
        num_attention_heads=2 if small else 12,
        num_key_value_heads=2 if small else 12,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded.path() / name, folder / name)
    return folder


def template(model: str, rank: int) -> Record:
    """A LoRA-XS adapter on all linear layers of the model."""
    adapted = get_peft_model(
        load_base(model, dtype="float32"), LoraXSConfig(r=rank, target_modules="all-linear")
    )
    return to_record(adapted)[0]


def adapters(first: Record, count: int, seed: int = 0) -> Iterator[tuple[str, Record]]:
    """`count` adapters `user-0`, `user-1` … like the first, each with cores of its own."""
    rng = np.random.default_rng(seed)
    names, shapes = first.layout.names, first.layout.shapes
    about = {
        name: getattr(first, name)
        for name in ("config", "task_type", "base_fingerprint", "basis_fingerprint", "metadata")
    }
    for n in range(count):
        cores = {
            name: rng.standard_normal(shape, np.float32) * 0.02
            for name, shape in zip(names, shapes, strict=True)
        }
        yield f"user-{n}", build(first.method, cores, **about)


def fill(folder: Path, model: str, count: int, rank: int) -> Path:
    """The folder, a store with `user-0` … of which as many as it has already are kept."""
    with Store(folder, create=True) as store:
        there = store.stats().versions
        if there < count:
            made = adapters(template(model, rank), count)
            for n, one in enumerate(made):
                if n % _CHUNK == 0:
                    print(f"\r{n:,} of {count:,} adapters", end="", file=sys.stderr)
                    batch: list = []
                if n >= there:
                    batch.append(one)
                if batch and (n % _CHUNK == _CHUNK - 1 or n == count - 1):
                    store.put_many(batch)
            print(file=sys.stderr)
    return folder


@contextlib.contextmanager
def server(
    model: str, store: Path | None, state: Path, *options: str, threads: int = 1
) -> Iterator[tuple[str, int]]:
    """(address, process) of a `modicum serve` with the options, ended with the block."""
    command = [
        sys.executable,
        "-m",
        "modicum",
        "serve",
        model,
        "--state",
        str(state),
        "--port",
        "0",
        "--json",
        *options,
    ]
    if store is not None:
        command += ["--store", str(store)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    log = (state.parent / f"{state.name}.log").open("w")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("{"):
            raise SystemExit(f"the server did not start: {Path(log.name).read_text()[-2000:]}")
        yield json.loads(line)["url"], process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
