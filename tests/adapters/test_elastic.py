"""Sub-networks on a whole model: what a switch refuses; merges, mixed batches, copies and compilers beside them."""

from __future__ import annotations

import copy
import io

import peft
import pytest
import torch
from tests.models_for_tests import llama, tokens

from modicum.adapters.elastic import SubNetwork, Switch
from modicum.errors import ConfigError, InexactMergeError
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.search.space import SearchSpace

SPACE = {
    "groups": [
        {"rank": ["heads.outputs"], "choices": [4, 2]},
        {"width": "mlp", "choices": [48, 24]},
        {"width": "heads", "choices": [4, 2]},
    ]
}
LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def model():
    """Adapters `default` and `two`, of which the first one runs as the smallest sub-network."""
    torch.manual_seed(0)
    options = {"r": 4, "alpha": 8, "init_weights": False}
    made = peft.get_peft_model(llama(), ElasticLoraConfig(**options)).eval()
    space = SearchSpace.of_model(SPACE, made)
    Switch(made).activate(space.sub_network(space.smallest()))
    made.add_adapter("two", ElasticLoraConfig(**options, seed=3))
    return made.eval()


def logits(model, **options):
    with torch.no_grad():
        return model(input_ids=tokens(), **options).logits


def test_there_is_no_such_adapter(model):
    with pytest.raises(ConfigError, match="did you mean 'two'"):
        Switch(model, "twoo")
    with pytest.raises(ConfigError, match="loaded: none"):
        Switch(llama())


def test_merged_adapters_stay_at_their_ranks(model):
    Switch(model).activate(None)
    model.merge_adapter(["default"])
    with pytest.raises(ConfigError, match="unmerge them first"):
        Switch(model).activate(SubNetwork({LAYER: 2}))
    Switch(model, "two").activate(SubNetwork({LAYER: 2}))
    model.unmerge_adapter()
    Switch(model).activate(SubNetwork({LAYER: 2}))
    assert model.peft_config["default"].sub_network == {"ranks": {LAYER: 2}}


def test_what_is_merged_is_all_that_runs(model):
    """Also while the active adapter is a narrower sub-network, as PEFT has it for all adapters."""
    with pytest.raises(InexactMergeError, match="narrower"):
        model.merge_adapter(["default"])
    cut = logits(model)
    model.set_adapter("two")
    two = logits(model)
    model.set_adapter("default")
    model.merge_adapter(["two"])
    torch.testing.assert_close(logits(model), two)
    model.unmerge_adapter()
    assert torch.equal(logits(model), cut)


def test_mixed_batches_take_no_narrower_sub_network(model):
    count = len(tokens())
    for active in ("default", "two"):
        model.set_adapter(active)
        with pytest.raises(ConfigError, match=r"different widths \(default\)"):
            logits(model, adapter_names=["default", *["two"] * (count - 1)])
    two = logits(model)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, adapter_names=["two"] * count), two)


def test_two_active_adapters_need_one_width(model):
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(ConfigError, match="different parts"):
        logits(model)


def test_an_adapter_by_another_name_comes_with_its_sub_network(model, tmp_path):
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    other = peft.PeftModel.from_pretrained(llama(), tmp_path, adapter_name="renamed").eval()
    assert Switch(other, "renamed").adapters[LAYER].active_rank == 2
    torch.testing.assert_close(logits(other), logits(model))


def test_copies_and_pickles_run_the_same_sub_network_on_their_own(model):
    before = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), before)
        Switch(other).activate(None)
        assert not torch.equal(logits(other), before)
        assert torch.equal(logits(model), before)


def test_compiled_models_follow_the_switch(model):
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), logits(model))
    Switch(model).activate(SubNetwork({LAYER: 1}))
    torch.testing.assert_close(logits(compiled), logits(model))
