"""The recipe: everything that is wrong at once, with lines and the nearest right names."""

from __future__ import annotations

from pathlib import Path

import pytest

from modicum.errors import ConfigError
from modicum.train.recipe import Recipe, json_schema, load_recipe, make_recipe

MINIMAL = {"model": {"name_or_path": "base"}, "data": {"train": "rows.jsonl"}, "method": {"name": "lora"}}
ROOT = Path(__file__).resolve().parents[2]


def saved(tmp_path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_model_data_and_method_suffice():
    recipe = make_recipe(MINIMAL)
    assert recipe.learning_rate == 2e-4
    assert recipe.metric == "loss"
    assert not recipe.larger_is_better


def test_all_faults_are_told_at_once_with_lines_and_nearest_names(tmp_path):
    path = saved(
        tmp_path,
        """modle: {}
model:
  name_or_path: x
  dtyp: float32
  task: causal
data:
  trian: x
  max_length: abc
method:
  name: lora
  lora_alfa: 3
train:
  seed: -1
  learning_rate: 1e-3
""",
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, ["train.batch_sise=3"])
    message = str(caught.value)
    for part in (
        ":1: no option 'modle' (did you mean 'model'",
        ":4: no option 'model.dtyp' (did you mean 'dtype'?)",
        ":5: model.task = 'causal'",
        ":7: no option 'data.trian' (did you mean 'train'?)",
        ":8: data.max_length = 'abc'",
        ":11: lora has no option 'lora_alfa' (did you mean 'lora_alpha'",
        ":13: train.seed = -1",
        "no option 'train.batch_sise' (did you mean 'batch_size'",
    ):
        assert part in message, message
    assert "learning_rate = " not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [\n", r"r.yaml:2: no valid YAML"),
        ("model: {name_or_path: a}\nmodel: {}\n", r"line 2: model is given twice"),
        ("- a\n", r"a recipe is a mapping of sections: model, sparsify, reorder, quantize, data"),
        ("", r"a recipe is a mapping of sections"),
        ("data: {train: x}\n", r"model is missing"),
        ("model: {name_or_path: a}\ndata: {validation: b}\n", r"r.yaml:2: data.train is missing"),
    ],
)
def test_broken_yaml(tmp_path, text, expected):
    with pytest.raises(ConfigError, match=expected):
        load_recipe(saved(tmp_path, text))


def test_a_missing_recipe_names_the_nearest(tmp_path):
    saved(tmp_path, "")
    with pytest.raises(ConfigError, match=r"did you mean 'r.yaml'"):
        load_recipe(tmp_path / "rr.yaml")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "lora_sx"}, "no method 'lora_sx' (did you mean 'lora_xs'"),
        ({"name": "lora_xs", "rank": 3}, "lora_xs has no option 'rank'"),
        ({"name": "lora_xs", "r": "many"}, "r = 'many': "),
        ({"name": "lora_xs", "r": 0}, "must be at least 1"),
        ({"name": "full", "r": 4}, "full has no option 'r'"),
        ({"name": "vera", "d_initail": 0.2}, "did you mean 'd_initial'"),
        ({"name": "dora", "use_dora": False}, "dora has no option 'use_dora'"),
        ({"name": "lora", "task_type": "SEQ_CLS"}, "lora has no option 'task_type'"),
    ],
)
def test_method_options_are_those_of_its_config(method, expected):
    with pytest.raises(ConfigError) as caught:
        make_recipe({**MINIMAL, "method": method})
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": {"bf16": True, "fp16": True}}, "exclude each other"),
        (
            {"train": {"metric": "acuracy"}, "model": {"name_or_path": "x", "task": "seq_cls"}},
            "did you mean 'accuracy'",
        ),
        ({"model": {"name_or_path": "x", "num_labels": 3}}, "model.num_labels is for seq_cls"),
        (
            {"data": {"train": "x", "packing": True}, "model": {"name_or_path": "x", "task": "seq_cls"}},
            "packing is for",
        ),
        ({"sweep": {"seeds": [1, 1]}}, "a seed twice"),
        ({"sweep": {"learning_rate": [0.0]}}, "must be above 0"),
        ({"sweep": {"learning_rates": [0.1]}}, "did you mean 'learning_rate'"),
    ],
)
def test_options_that_do_not_go_together(changes, expected):
    with pytest.raises(ConfigError) as caught:
        make_recipe({**MINIMAL, **changes})
    assert expected in str(caught.value)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_paged_optimizer_needs_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    values = {**MINIMAL, "train": {"optim": "paged_adamw_8bit"}}
    if gpu:
        assert make_recipe(values).train.optim == "paged_adamw_8bit"
        return
    with pytest.raises(
        ConfigError, match="'paged_adamw_8bit' pages between a GPU and the host, and there is no GPU"
    ):
        make_recipe(values)


def test_overrides_are_yaml(tmp_path):
    path = saved(tmp_path, "model: {name_or_path: a}\ndata: {train: b}\n")
    recipe = load_recipe(
        path,
        [
            "train.learning_rate=1e-3",
            "method.name=lora",
            "method.target_modules=[q_proj, v_proj]",
            "train.bf16=true",
        ],
    )
    assert recipe.learning_rate == 1e-3
    assert recipe.method.options == {"target_modules": ["q_proj", "v_proj"]}
    assert recipe.train.bf16
    assert recipe.output == "runs/r"
    with pytest.raises(ConfigError, match=r"write section.name=value"):
        load_recipe(path, ["train.seed"])


def test_the_digest_covers_what_changes_the_numbers():
    recipe = make_recipe(MINIMAL)
    same = recipe.with_values(output="elsewhere", train__report_to="none", train__logging_steps=1)
    # a default that is written out is the same recipe
    assert recipe.digest() == same.digest() == recipe.with_values(train__learning_rate=2e-4).digest()
    assert recipe.digest() != recipe.with_values(train__seed=1).digest()
    assert recipe.digest() != recipe.with_values(method__r=4).digest()


def test_a_recipe_survives_yaml(tmp_path):
    recipe = make_recipe({**MINIMAL, "method": {"name": "lora_xs", "r": 4, "target_modules": ["q_proj"]}})
    assert load_recipe(saved(tmp_path, recipe.to_yaml())).digest() == recipe.digest()


def test_lora_xs_keeps_rate_times_rank():
    rates = [
        make_recipe({**MINIMAL, "method": {"name": "lora_xs", "r": r}}).learning_rate * r
        for r in (1, 16, 128)
    ]
    assert rates == pytest.approx([0.064] * 3)


def test_every_option_is_described():
    schema = json_schema()
    for name, section in schema["$defs"].items():
        for option, entry in section["properties"].items():
            assert entry.get("description"), f"{name}.{option}"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_that_ship_are_valid(path):
    assert isinstance(load_recipe(path), Recipe)
    assert path.read_text().startswith("#")
