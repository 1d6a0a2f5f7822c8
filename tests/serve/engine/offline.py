"""Adapters for tests of engines, and what each of them answers alone: Transformers' generate and PEFT."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import functools

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tests import models_for_tests as models

from modicum import LoraXSConfig
from modicum.models.loading import load_base
from modicum.serve.engine.embedded import EmbeddedEngine
from modicum.serve.engine.interface import Request, Sampling, Step
from modicum.serve.settings import EngineSettings
from modicum.store.files import install, to_record
from modicum.store.record import Record, build
from modicum.store.state import AdapterState, config_from, state_from

SMALL = EngineSettings("small", max_batch=8, max_batch_tokens=24, cache_tokens=1024, slots=8, max_rank=16)
ABOUT = ("config", "task_type", "base_fingerprint", "basis_fingerprint", "metadata")


@functools.cache
def base(name: str):
    """A model that is never changed."""
    return load_base("embedded", dtype="float32") if name == "embedded" else models.llama()


@functools.cache
def template(name: str, kind: str, r: int) -> Record:
    """A record of one kind of adapter for one of the models."""
    if kind == "lora":
        first = "model.layers.0.self_attn.q_proj"
        config = LoraConfig(
            r=r, lora_alpha=2 * r, target_modules="all-linear", rank_pattern={first: max(1, r // 2)}
        )
    else:
        config = LoraXSConfig(r=r, alpha=2 * r, init_weights=False)
    return to_record(get_peft_model(copy.deepcopy(base(name)), config), dtype="float32")[0]


def adapter(
    seed: int, *, name: str = "small", kind: str = "lora_xs", r: int = 4, size: float = 0.3
) -> Record:
    """An adapter whose answers differ from the base model's and from those of other seeds."""
    like = template(name, kind, r)
    rng = np.random.default_rng(seed)
    size = size if kind == "lora_xs" else 0.05
    tensors = {key: rng.normal(0, size, value.shape).astype(np.float32) for key, value in like.tensors()}
    return rebuilt(like, tensors)


@functools.cache
def mixed() -> dict[str, Record]:
    """Versions of several methods and ranks for the small model."""
    return {f"a{i}@1": adapter(i, r=(2, 4, 8)[i % 3]) for i in range(6)} | {
        "lora@1": adapter(10, kind="lora", r=4),
        "lora@2": adapter(11, kind="lora", r=8),
    }


def rebuilt(like: Record, tensors: dict[str, np.ndarray]) -> Record:
    """A record like another one, with other numbers."""
    about = {
        field.name: getattr(like, field.name) for field in dataclasses.fields(like) if field.name in ABOUT
    }
    return build(like.method, tensors, "float32", **about)


def broken(record: Record) -> Record:
    """The adapter with numbers so large that its answers are not finite."""
    tensors = {key: np.full(value.shape, 1e38, np.float32) for key, value in record.tensors()}
    return rebuilt(record, tensors)


class Offline:
    """One model, with any adapter on it, alone."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._adapted: dict[tuple, object] = {}

    @torch.no_grad()
    def greedy(self, record: Record | None, prompt: tuple[int, ...], count: int) -> list[int]:
        """The greedy tokens behind the prompt."""
        return greedy(base(self._name) if record is None else self._with(record), prompt, count)

    def _with(self, record: Record):
        kind = record.method, str(record.config)
        if kind not in self._adapted:
            self._adapted[kind] = install(
                copy.deepcopy(base(self._name)), config_from(record), state_from(record)
            )
        AdapterState.of(self._adapted[kind], "default").copy_from(state_from(record))
        return self._adapted[kind]


@torch.no_grad()
def greedy(model, prompt: tuple[int, ...], count: int) -> list[int]:
    """What `generate` puts behind the prompt, end tokens taken for any other."""
    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].tolist()


def sampling(count: int = 8, **other) -> Sampling:
    """Greedy, to the last token, unless said otherwise."""
    return Sampling(**{"max_tokens": count, "temperature": 0.0, "ignore_eos": True, **other})


def request(prompt, version=None, salt: str = "", **other) -> Request:
    """A request with `sampling(**other)`."""
    return Request(tuple(prompt), sampling(**other), version, salt)


def prompt(seed: int, length: int, vocabulary: int = models.VOCABULARY) -> tuple[int, ...]:
    """Random tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(8, vocabulary, (length,), generator=generator).tolist())


async def steps(engine, one: Request) -> list[Step]:
    """All of an answer."""
    return [step async for step in engine.generate(one)]


async def tokens(engine, one: Request) -> list[int]:
    """The tokens of an answer."""
    return [step.token for step in await steps(engine, one)]


@contextlib.asynccontextmanager
async def serving(
    records: dict[str, Record] | None = None,
    settings: EngineSettings = SMALL,
    model=None,
    observer=None,
    **more,
):
    """An engine of a small model that is running, with these versions in its store."""
    settings = dataclasses.replace(settings, **more)
    read = None if records is None else records.__getitem__
    engine = EmbeddedEngine(
        copy.deepcopy(base("small")) if model is None else model,
        settings,
        read=read,
        observer=observer,
        eos_token_ids=[2],
    )
    engine.start()
    try:
        yield engine
    finally:
        await engine.close()


async def settled(engine) -> None:
    """Returns when nothing runs and nothing is held any more."""
    for _ in range(500):
        found = engine.stats()
        if not (found.running or found.waiting or found.cache_used > 1e-9) and not any(
            one.requests for one in engine.residents()
        ):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{engine.stats()} {engine.residents()}")
