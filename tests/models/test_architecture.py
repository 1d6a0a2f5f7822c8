"""Shapes without weights: the same layers that PEFT adapts, from every kind of source."""

from __future__ import annotations

import json

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tests.models_for_tests import bert, gpt2, llama

from modicum.errors import ConfigError, TargetError
from modicum.models.architecture import linear_shapes, meta_model, parse_targets, read_architecture


def _adapted(model, **options):
    peft_model = get_peft_model(model, LoraConfig(r=1, **options))
    return {
        name.removeprefix("base_model.model."): (module.out_features, module.in_features)
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {"target_modules": "all-linear"}),
        (llama, {"target_modules": ["q_proj", "down_proj"]}),
        (llama, {"target_modules": r".*\.1\..*_proj"}),
        (llama, {"target_modules": "all-linear", "exclude_modules": ["v_proj"]}),
        (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        (gpt2, {"target_modules": "all-linear"}),
        (bert, {"target_modules": ["query", "output.dense"]}),
    ],
)
def test_the_layers_that_peft_adapts(make, options):
    expected = _adapted(make(), **options)
    options = dict(options)
    found = linear_shapes(
        make(), options.pop("target_modules"), exclude=options.pop("exclude_modules", None), **options
    )
    assert found == expected


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_a_config_file_is_enough(make, tmp_path):
    model = make()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        found = read_architecture(str(source))
        assert found.parameters == sum(p.numel() for p in model.parameters())
        assert found.shapes() == {k: v for k, v in linear_shapes(model).items() if k != "classifier"}


def test_a_classification_head_is_counted_and_left_alone(tmp_path):
    bert().config.save_pretrained(tmp_path)
    found = read_architecture(str(tmp_path), "seq_cls", num_labels=5)
    assert found.head == {"classifier"}
    assert found.head_parameters == 32 * 5 + 5
    assert "classifier" not in found.shapes()


def test_shapes_from_yaml(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: Mine\nlayers: 3\nper_layer: {q: [8, 4], up: [16, 8]}\noutside: {head: [9, 8]}\nother_parameters: 10\n"
    )
    found = read_architecture(str(file))
    assert (found.name, len(found.shapes())) == ("Mine", 6)
    assert found.shapes(["q"]) == {f"layers.{i}.q": (8, 4) for i in range(3)}
    assert found.parameters == 3 * (32 + 128) + 72 + 10


@pytest.mark.parametrize(
    "text", ["[1]", "layers: 2", "layers: x\nper_layer: {}", "layers: 1\nper_layer: {q: [1]}", "{"]
)
def test_bad_yaml_says_what_is_needed(text, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"per_layer: \{name: \[out, in\]\}"):
        read_architecture(str(file))


def test_a_wrong_target_names_the_nearest():
    with pytest.raises(TargetError, match=r"'q_prj' \(did you mean 'q_proj'"):
        linear_shapes(llama(), ["q_prj", "v_proj"])


def test_a_target_that_is_no_linear_layer():
    with pytest.raises(TargetError, match="no linear layer matches 'embed_tokens'"):
        linear_shapes(llama(), ["embed_tokens"])


def test_no_model_there(tmp_path):
    with pytest.raises(ConfigError):
        read_architecture(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "never-heard-of"}))
    with pytest.raises(ConfigError, match="no model config"):
        read_architecture(str(tmp_path))


def test_a_task_the_model_cannot_do():
    with pytest.raises(ConfigError, match="did you mean 'seq_cls'"):
        meta_model(llama().config, "seqcls")


def test_targets_from_words():
    assert parse_targets(["all-linear"]) == "all-linear"
    assert parse_targets(["q_proj, v_proj", "up_proj"]) == ["q_proj", "v_proj", "up_proj"]
    assert parse_targets([r".*\.(q|v)_proj"]) == r".*\.(q|v)_proj"
