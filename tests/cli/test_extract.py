"""`modicum extract`: from an adapter on disk to a smaller model on disk."""

from __future__ import annotations

import json

import pytest
import torch
from tests import models_for_tests as models
from tests.cli.adapter_files import run, tokenizer, trained
from transformers import AutoModelForCausalLM

from modicum.adapters.elastic import SubNetwork, Switch
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.store.files import save_adapter

SPACE = {
    "groups": [
        {"rank": ["down_proj"], "choices": [4, 2, 1]},
        {"width": "mlp", "choices": [48, 36, 24]},
    ]
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and an elastic adapter of which the first two ranks are active."""
    path = tmp_path_factory.mktemp("files")
    models.llama(torch.bfloat16).save_pretrained(path / "base")
    tokenizer().save_pretrained(path / "base")
    model = trained(models.llama(torch.bfloat16).float(), ElasticLoraConfig(r=4, search_space=SPACE), 0.1)
    Switch(model).activate(SubNetwork(dict.fromkeys(Switch(model).adapters, 2)))
    save_adapter(model, path / "adapter.modicum")
    return path


def words(folder, output, *more):
    return ["extract", folder / "base", folder / "adapter.modicum", "--output", output, *more]


def test_the_active_sub_network_is_the_default_and_the_dtype_the_base_models(folder, tmp_path, capsys):
    done = run(capsys, *words(folder, tmp_path / "out", "--json"))
    assert done.code == 0, done.err
    assert set(done.json["ranks"].values()) == {2}
    assert (done.json["dtype"], done.json["stock"], done.json["widths"]) == ("bfloat16", True, {})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    again = run(capsys, *words(folder, tmp_path / "out"))
    assert again.code == 1
    assert "exists already" in again.err


@pytest.mark.parametrize(
    ("wanted", "rank", "units"), [("heuristic", 2, 36), ("smallest", 1, 24), ("largest", 4, 48)]
)
def test_sub_networks_of_the_search_space_by_name(folder, tmp_path, capsys, wanted, rank, units):
    done = run(capsys, *words(folder, tmp_path / "out", "--sub-network", wanted, "--json"))
    assert done.code == 0, done.err
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert small.config.intermediate_size == units
    assert done.json["ranks"]["model.layers.0.mlp.down_proj"] == rank
    assert small.config.modicum["sub_network"]["choices"] == done.json["choices"]


def test_files_hold_choices_or_a_sub_network(folder, tmp_path, capsys):
    choices = run(capsys, *words(folder, tmp_path / "a", "--sub-network", "smallest", "--json")).json[
        "choices"
    ]
    files = {"choices": choices, "full": {"widths": {"model.layers.1.mlp": 30}}}
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
        done = run(capsys, *words(folder, tmp_path / name, "--sub-network", tmp_path / f"{name}.json"))
        assert done.code == 0, done.err
    small = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "choices", "full")]
    assert torch.equal(small[0].lm_head.weight, small[1].lm_head.weight)
    assert small[1].config.intermediate_size == 24
    assert small[2].config.mlp_channels == [48, 30]
    assert "import modicum first" in done.out


def test_wrong_names_and_files_are_explained(folder, tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{")
    for wanted, said in (("smalest", "did you mean 'smallest'"), (tmp_path / "bad.json", "is no JSON")):
        done = run(capsys, *words(folder, tmp_path / "out", "--sub-network", wanted))
        assert done.code == 1
        assert said in done.err
    assert not (tmp_path / "out").exists()
