"""Which sub-network of an elastic adapter is active, as its files say it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests import models_for_tests as models

import modicum
from modicum.adapters.elastic import Cut, SubNetwork, Switch
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.store.files import save_adapter
from modicum.store.inspection import inspect

SPACE = {"groups": [{"layers": "q_proj", "rank": [4, 2]}]}
Q, UP, DOWN = (f"model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"))
CHOSEN = SubNetwork(
    ranks={Q: 2, UP: 3},
    cuts={UP: Cut(outputs=((0, 16),)), DOWN: Cut(inputs=((0, 16),))},
    widths={"model.layers.0.mlp": 16},
    choices={"q": 2, "mlp": 16},
)


def written(config, folder, chosen):
    """The adapter as a folder and as a record, with `chosen` active."""
    model = get_peft_model(models.llama(), config)
    if chosen is not None:
        Switch(model).activate(chosen)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", save_adapter(model, folder / "a.modicum").path


def test_ranks_widths_and_numbers(tmp_path):
    for place in written(ElasticLoraConfig(r=4, search_space=SPACE), tmp_path, CHOSEN):
        found = inspect(place)
        active = found.sub_network
        assert found.state == "ok"
        assert (active.choices, active.widths, active.whole) == ({"q": 2, "mlp": 16}, CHOSEN.widths, False)
        assert active.ranks == {2: 1, 3: 1, 4: 12}
        layers = {layer.name: layer for layer in active.layers}
        assert (layers[Q].rank, layers[Q].largest) == (2, 4)
        assert (layers[Q].active, layers[Q].values) == (2 * 64, 4 * 64)
        assert (layers[UP].active, layers[UP].values) == (3 * (32 + 16), 4 * (32 + 48))
        assert (layers[DOWN].active, layers[DOWN].values) == (4 * (16 + 32), 4 * (48 + 32))
        assert sum(layer.values for layer in active.layers) == found.values
        saved = found.values - active.active_values
        assert saved == 2 * 64 + (4 * 80 - 3 * 48) + 4 * 32
        assert "sub_network" not in found.options


@pytest.mark.parametrize(("core", "numbers"), [("full", 9 + 13 * 16), ("diagonal", 3 + 13 * 4)])
def test_cores_of_lora_xs(core, numbers, tmp_path):
    config = modicum.LoraXSConfig(r=4, core=core)
    for place in written(config, tmp_path, SubNetwork(ranks={Q: 3})):
        active = inspect(place).sub_network
        assert active.active_values == numbers
        assert active.ranks == {3: 1, 4: 13}


def test_the_whole_super_network(tmp_path):
    for place in written(ElasticLoraConfig(r=4, search_space=SPACE), tmp_path, None):
        found = inspect(place)
        assert found.sub_network.whole
        assert found.sub_network.active_values == found.values
        assert found.options["search_space"] == SPACE


def test_adapters_without_sub_networks(tmp_path):
    for place in written(ElasticLoraConfig(r=4), tmp_path, None):
        assert inspect(place).sub_network is None


def test_the_digest_tells_sub_networks_apart_and_nothing_else(tmp_path):
    def digest(folder, chosen, **options):
        places = written(ElasticLoraConfig(r=4, search_space=SPACE, **options), tmp_path / folder, chosen)
        first, second = (inspect(place).sub_network.digest for place in places)
        assert first == second
        return first

    one = digest("a", SubNetwork(ranks={Q: 2}))
    assert len(one) == 32
    # a rank that is the largest is no difference, nor is what the choice is called, nor other numbers
    assert digest("b", SubNetwork(ranks={Q: 2, UP: 4}, choices={"x": 2}), seed=1) == one
    others = [
        digest("c", SubNetwork(ranks={Q: 3})),
        digest("d", SubNetwork(ranks={UP: 2})),
        digest("e", None),
        digest("f", CHOSEN),
        digest("g", SubNetwork(cuts={UP: Cut(outputs=((0, 16),))})),
        digest("h", SubNetwork(cuts={UP: Cut(outputs=((0, 8),))})),
    ]
    assert len({one, *others}) == 7


def test_the_fingerprint_is_of_the_numbers_that_run(tmp_path):
    def fingerprint(chosen, change=None):
        model = get_peft_model(models.llama(), ElasticLoraConfig(r=4, search_space=SPACE, init_weights=False))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())  # so that the record rounds nothing
            if change is not None:
                layer, part, row, column = change
                getattr(Switch(model).adapters[layer], part)[row, column] = 1
        Switch(model).activate(chosen)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model.save_pretrained(folder)
        places = (folder, save_adapter(model, folder / "a.modicum").path)
        first, second = (inspect(place).sub_network.fingerprint for place in places)
        assert first == second
        return first

    one = fingerprint(CHOSEN)
    assert len(one) == 32
    # Q runs two of four directions, UP three of them and the first 16 of 48 outputs
    for idle in ((Q, "A", 2, 0), (Q, "B", 0, 3), (UP, "A", 3, 5), (UP, "B", 16, 0), (DOWN, "A", 0, 16)):
        assert fingerprint(CHOSEN, idle) == one, idle
    runs = ((Q, "A", 1, 0), (Q, "B", 31, 1), (UP, "A", 2, 5), (UP, "B", 15, 2), (DOWN, "A", 3, 15))
    others = [fingerprint(CHOSEN, change) for change in runs]
    others += [fingerprint(None), fingerprint(None, (Q, "A", 2, 0)), fingerprint(SubNetwork(ranks={Q: 3}))]
    assert len({one, *others}) == 1 + len(others)


def test_what_is_active_is_what_loads(tmp_path):
    folder, _ = written(ElasticLoraConfig(r=4), tmp_path, CHOSEN)
    loaded = Switch(PeftModel.from_pretrained(models.llama(), folder))
    listed = {layer.name: layer.rank for layer in inspect(folder).sub_network.layers}
    assert listed == {name: adapter.active_rank for name, adapter in loaded.adapters.items()}


@pytest.mark.parametrize(
    ("sub_network", "told"),
    [
        ({"ranks": {"model.layers.9.q_proj": 2}}, "model.layers.9.q_proj carries no adapter"),
        ({"ranks": {Q: 9}}, f"rank 9 of {Q} (1 to 4)"),
        ({"ranks": [3]}, "does not fit"),
        ([1], "does not fit"),
    ],
)
def test_a_sub_network_that_does_not_fit_is_damage(sub_network, told, tmp_path):
    folder, _ = written(ElasticLoraConfig(r=4), tmp_path, None)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sub_network": sub_network}))
    assert told in inspect(folder).state
