"""What cannot be served is refused when it is loaded, with the reason; what can is checked once for its family."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch
from tests.models_for_tests import llama
from tests.serve.engine.adapters_for_tests import record_of

from modicum.errors import (
    BaseMismatchError,
    BasisMismatchError,
    ConfigError,
    CorruptAdapterError,
    ModicumError,
    TargetError,
)
from modicum.serve.engine.interface import AdapterUnavailableError
from modicum.serve.engine.slots import Slots
from modicum.store.files import to_record
from modicum.store.record import Section, build


@pytest.fixture(scope="module")
def base():
    return llama()


def changed(record, values):
    """The record with other numbers, unchecked."""
    return dataclasses.replace(record, values=values)


def refused(base, record) -> ModicumError:
    """The error that the record is refused with."""
    slots = Slots(copy.deepcopy(base), lambda _: record, slots=2, max_rank=16)
    with pytest.raises(AdapterUnavailableError, match="ada@1 cannot be served") as caught:
        slots.acquire("ada@1")
    stats = slots.stats()
    assert (stats.used, stats.failures, stats.misses) == (0, 1, 1)
    assert isinstance(caught.value.__cause__, Exception)
    assert str(caught.value.__cause__) in str(caught.value)
    return caught.value.__cause__


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("qa_hira", {"pool": 4, "repeat": 4}, ["qa_hira has no low-rank update", "modicum merge"]),
        ("sparse_peft", {}, ["sparse_peft has no low-rank update", "modicum merge"]),
        ("peft:LORA", {"use_dora": True, "r": 2}, ["use_dora", "merge it"]),
        ("peft:LORA", {"bias": "lora_only", "r": 2}, ["bias", "merge it"]),
        ("lora_xs", {"r": 20, "target_modules": ["q_proj"]}, ["rank is 20", "up to rank 16"]),
        ("lora_xs", {"r": 4, "task_type": "SEQ_CLS"}, ["SEQ_CLS", "text generation"]),
        ("lora_xs", {"r": 4, "target_modules": ["q_proj", "lm_head"]}, ["the output head lm_head"]),
        ("peft:LORA", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}, ["embed_tokens (Embedding)"]),
    ],
)
def test_what_cannot_be_served_is_refused_with_what_to_do(base, method, options, words):
    task = options.pop("task_type", None) if "task_type" in options else None
    record = record_of(base, method, **options)
    error = refused(base, dataclasses.replace(record, task_type=task) if task else record)
    assert isinstance(error, ConfigError)
    for word in words:
        assert word in str(error)


def test_other_methods_of_peft_are_refused(base):
    model = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=4, target_modules=["q_proj"]))
    error = str(refused(base, to_record(model)[0]))
    assert error.startswith("peft:VERA has no factors that are served here: merge it with PEFT")


def test_lora_that_changes_the_base_weights_is_refused(base):
    record = record_of(base, "peft:LORA", r=2)
    record = dataclasses.replace(record, config={**record.config, "init_lora_weights": "pissa"})
    assert "init_lora_weights='pissa'" in str(refused(base, record))


def test_whole_modules_are_refused(base):
    record = record_of(base, "lora_xs", r=4)
    head = Section("model.norm.weight", "float32", (32,), np.ones(32, np.float32))
    error = refused(base, dataclasses.replace(record, sections=(head,)))
    assert "model.norm.weight" in str(error)
    assert "modules_to_save" in str(error)


def test_narrower_sub_networks_are_refused_and_lower_ranks_served(base):
    record = record_of(base, "elastic_lora", r=8)
    cut = {"cuts": {"model.layers.0.mlp.up_proj": {"outputs": [[0, 8]]}}}
    error = refused(base, dataclasses.replace(record, config={**record.config, "sub_network": cut}))
    assert "modicum extract" in str(error)
    lower = {"ranks": {"model.layers.0.mlp.up_proj": 3}}
    slots = Slots(
        copy.deepcopy(base),
        lambda _: dataclasses.replace(record, config={**record.config, "sub_network": lower}),
        slots=1,
        max_rank=16,
    )
    slots.load("ada@1")
    held = slots._by_version["ada@1"]
    assert sorted({place.rank for place in held.family.places.values()}) == [3, 8]


def test_another_base_and_another_basis_are_refused(base):
    other = record_of(llama(seed=1), "lora_xs", r=4)
    assert isinstance(refused(base, other), BaseMismatchError)
    mine = record_of(base, "lora_xs", r=4)
    turned = dataclasses.replace(mine, basis_fingerprint=other.basis_fingerprint)
    assert isinstance(refused(base, turned), BasisMismatchError)


def test_damaged_records_are_refused(base):
    record = record_of(base, "lora_xs", r=4)
    values = record.values.copy()
    values[5] = np.nan
    assert "NaN or infinite values in model.layers.0.mlp.down_proj.R" in str(
        refused(base, changed(record, values))
    )
    tensors = dict(record.tensors())
    about = {"config": record.config, "base_fingerprint": record.base_fingerprint}
    name = "model.layers.1.mlp.up_proj.R"
    missing = build("lora_xs", {k: v for k, v in tensors.items() if k != name}, **about)
    assert "1 tensors missing: model.layers.1.mlp.up_proj.R" in str(refused(base, missing))
    wrong = refused(
        base, build("lora_xs", {**tensors, name: np.zeros((3, 3), np.float32), "x.R": tensors[name]}, **about)
    )
    assert isinstance(wrong, CorruptAdapterError)
    assert "1 tensors unexpected: x.R" in str(wrong)
    assert "up_proj.R (3, 3) instead of (4, 4)" in str(wrong)


def test_targets_that_match_nothing_are_refused(base):
    record = record_of(base, "lora_xs", r=4)
    record = dataclasses.replace(record, config={**record.config, "target_modules": ["q_prj"]})
    error = refused(base, record)
    assert isinstance(error, TargetError)
    assert "q_proj" in str(error)


def test_a_record_of_a_known_family_is_not_checked_again(base):
    """Only numbers, seeds and names of files differ: the weights are neither digested nor decomposed again."""
    first = record_of(base, "lora_xs", r=4)
    records = {
        "a@1": first,
        "b@1": dataclasses.replace(first, values=first.values * 2, config={**first.config, "seed": 7}),
        "c@1": dataclasses.replace(first, config={**first.config, "alpha": 1.0}),
    }
    slots = Slots(copy.deepcopy(base), records.__getitem__, slots=4, max_rank=16)
    for version in records:
        slots.load(version)
    a, b, c = (slots._by_version[version] for version in records)
    assert a.family is b.family
    assert a.family is not c.family
    assert torch.equal(b.row.values, 2 * a.row.values)
    # alpha / r = 4 and 1 / 4
    assert torch.allclose(c.row.values, a.row.values / 16)
    # both families share the directions of one basis
    assert len(slots._directions.all) == 14


def test_a_model_that_carries_adapters_is_refused(base):
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="carries a PEFT adapter already"):
        Slots(model, lambda _: None, slots=1, max_rank=4)
    with pytest.raises(ConfigError, match="without linear layers"):
        Slots(torch.nn.Sequential(torch.nn.ReLU()), lambda _: None, slots=1, max_rank=4)
