"""What two versions differ in: facts, configuration, metrics, and distances against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from tests.store.small_records import NAMES, record

from modicum.errors import NotStoredError
from modicum.store import Store, diff
from modicum.store.difference import Change, layer_of
from modicum.store.record import Section, build


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", create=True) as made:
        yield made


def test_distances_are_those_of_the_numbers(store):
    store.put("ada", record(0, dtype="float32"))
    store.put("ada", record(1, dtype="float32"))
    found = diff(store, "ada@1", "ada@latest")
    assert (found.a, found.b, found.same_record) == ("ada@1", "ada@2", False)
    a, b = dict(record(0, dtype="float32").tensors()), dict(record(1, dtype="float32").tensors())
    assert [one.layer for one in found.layers] == [name.removesuffix(".R") for name in NAMES]
    for one in found.layers:
        x, y = (values[f"{one.layer}.R"].astype(float).ravel() for values in (a, b))
        wanted = [np.linalg.norm(x), np.linalg.norm(y), np.linalg.norm(x - y)]
        assert [*one.norms, one.distance] == pytest.approx(wanted)
        assert one.relative == pytest.approx(wanted[2] / wanted[0])
        assert one.cosine == pytest.approx(x @ y / (wanted[0] * wanted[1]))
        assert one.values == (64, 64)
    x, y = (np.concatenate([values.ravel() for values in of.values()]).astype(float) for of in (a, b))
    assert found.total.distance == pytest.approx(np.linalg.norm(x - y))
    assert found.total.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert found.notes == ()


def test_what_is_said_and_configured(store):
    store.put(
        "ada", record(0, config={"r": 8, "rank_pattern": {"q": 4}}), metrics={"acc": 0.5, "f1": 0.1}, seed=1
    )
    bob = record(0, config={"r": 8, "alpha": 2}, recipe_digest="blake2b:a1")
    store.put("bob", bob, metrics={"acc": 0.75}, tags=["x"])
    found = diff(store, "ada", "bob")
    assert found.configuration == (Change("alpha", None, 2), Change("rank_pattern.q", 4, None))
    assert found.metrics == (Change("acc", 0.5, 0.75), Change("f1", 0.1, None))
    assert {change.name for change in found.facts} >= {"seed", "tags"}
    assert Change("recipe_digest", None, "blake2b:a1") in found.facts
    assert (found.total.distance, found.total.cosine) == (0.0, pytest.approx(1.0))
    store.put("bob", store.get("ada"))
    assert diff(store, "ada", "bob").same_record


def test_other_shapes_bases_and_heads(store):
    head = Section("score.weight", "float32", (2, 2), np.ones(4, np.float32))
    store.put("ada", record(0, r=8, sections=(head,)))
    store.put("bob", record(0, r=4, basis_fingerprint=[1.0] * 16))
    found = diff(store, "ada", "bob")
    assert all(one.distance is None for one in found.layers)
    assert (found.layers[-1].layer, found.layers[-1].values) == ("score.weight", (4, 0))
    assert found.total.distance is None
    assert "different bases" in found.notes[0]
    assert "5 of 5 layers" in found.notes[1]
    with pytest.raises(NotStoredError):
        diff(store, "ada", "eve")


def test_no_direction_has_no_cosine(store):
    store.put("ada", build("lora_xs", {"a.R": np.zeros((2, 2), np.float32)}))
    found = diff(store, "ada", "ada")
    assert (found.total.distance, found.total.relative, found.total.cosine) == (0.0, None, None)
    assert (found.layers[0].relative, found.layers[0].cosine) == (None, None)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.0.self_attn.q_proj.R", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "model.layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.q_proj.lora_magnitude_vector", "model.layers.0.self_attn.q_proj"),
        ("prompt_embeddings", "prompt_embeddings"),
    ],
)
def test_the_layer_of_a_tensor(name, layer):
    assert layer_of(name) == layer
