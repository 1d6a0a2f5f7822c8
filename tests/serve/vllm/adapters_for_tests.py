"""Adapters of many kinds for the embedded model, with large updates, in a store; and what they answer offline."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from modicum import LoraXSConfig
from modicum.adapters import registry
from modicum.models.loading import load_base
from modicum.store import Store
from modicum.store.files import install, to_record
from modicum.store.record import build
from modicum.store.state import AdapterState, config_from, state_from

MODEL = "embedded"


def base():
    return load_base(MODEL, dtype="float32")


def record_of(config):
    model = get_peft_model(base(), config)
    return to_record(model, dtype="float32")[0]


def varied(record, seed: int):
    """The record with other numbers of the same size."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, value.std() or 0.3, value.shape).astype(np.float32)
        for name, value in record.tensors()
    }
    fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
    about = {
        name: fields[name]
        for name in ("config", "task_type", "base_fingerprint", "basis_fingerprint", "metadata")
    }
    return build(record.method, tensors, "float32", **about)


def fill(folder, count: int) -> list[str]:
    """`count` versions of small LoRA-XS adapters and some of other kinds, as `name@1`, in a new store."""
    q_bara = registry.config_class("q_bara")
    first = record_of(LoraXSConfig(r=8, alpha=16.0, init_weights=False))
    others = {
        "wide": record_of(
            LoraXSConfig(r=16, target_modules=["q_proj", "v_proj", "down_proj"], init_weights=False)
        ),
        "diagonal": record_of(LoraXSConfig(r=8, core="diagonal", init_weights=False)),
        "exact": record_of(LoraXSConfig(r=4, svd_mode="exact", init_weights=False)),
        "plain": record_of(LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], init_lora_weights=False)),
        "mixed": record_of(
            LoraConfig(
                r=8,
                rank_pattern={"o_proj": 2},
                target_modules="all-linear",
                use_rslora=True,
                init_lora_weights=False,
            )
        ),
        "bara": record_of(q_bara(r=4, target_modules=["o_proj"], init_weights=False)),
    }
    with Store(folder, create=True) as store:
        for n in range(count):
            store.put(f"user-{n}", varied(first, n))
        for name, record in others.items():
            store.put(name, record)
    return [f"user-{n}@1" for n in range(count)] + [f"{name}@1" for name in others]


def prompts(count: int) -> list[list[int]]:
    """Prompts of different lengths, many of which begin alike."""
    generator = torch.Generator().manual_seed(7)
    common = torch.randint(10, 400, (48,), generator=generator).tolist()
    return [common[: 40 + n % 9] + [20 + n] * (n % 3) for n in range(count)]


#: kind of adapter → a model with one of it
_ADAPTED: dict[str, Any] = {}


def offline(store: str, version: str | None, prompt: list[int], tokens: int) -> list[int]:
    """The greedy answer of the version alone, by Transformers and PEFT."""
    ids = torch.tensor([prompt])
    answer = _model(store, version).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return answer[0, len(prompt) :].tolist()


def _model(store: str, version: str | None) -> Any:
    """The base model, or one with the version on it: adapters of one kind take turns on the same."""
    if version is None:
        if "" not in _ADAPTED:
            _ADAPTED[""] = base()
        return _ADAPTED[""]
    with Store(store) as opened:
        record = opened.get(version)
    kind = json.dumps([record.method, record.config], sort_keys=True)
    if kind not in _ADAPTED:
        _ADAPTED[kind] = install(base(), config_from(record), state_from(record))
    AdapterState.of(_ADAPTED[kind], "default").copy_from(state_from(record))
    return _ADAPTED[kind]
