"""Comparisons as they are written: cells, defaults, and everything that is wrong at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from tests.compare.small import comparison_values, write

from modicum.compare.plan import plan
from modicum.compare.spec import load_comparison, make_comparison
from modicum.errors import ConfigError
from modicum.train.yaml_lines import read_yaml

ROOT = Path(__file__).resolve().parents[2]


def names(spec):
    return [(cell.compression, cell.label) for cell in spec.cells]


def test_cells_are_bases_by_methods_by_ranks(tmp_path):
    spec = load_comparison(write(tmp_path, comparison_values(tmp_path)))
    labels = ["lora r=1", "lora r=2", "xs r=2", "xs r=4"]
    assert names(spec) == [(base, label) for base in ("none", "4bit") for label in labels]
    assert (
        [cell.options["r"] for cell in spec.cells[:4]]
        == [cell.rank for cell in spec.cells[:4]]
        == [1, 2, 2, 4]
    )
    assert spec.cells[0].options["lora_alpha"] == 4
    recipe = spec.cells[7].recipe(spec, "base-folder")
    assert recipe.method.name == "lora_xs"
    assert recipe.sweep.learning_rate == [1e-3, 5e-2]
    assert recipe.sweep.seeds == [0, 1]
    assert recipe.model.name_or_path == "base-folder"
    assert recipe.folder == tmp_path / "out" / "cells" / "4bit" / "xs r=4"
    # the budget is that of the recipe, the rate is not
    assert recipe.train.max_steps == 3
    assert recipe.train.learning_rate is None
    assert spec.name == "comparison"


def test_rates_and_ranks_that_nobody_names_are_the_methods_own(tmp_path):
    values = comparison_values(tmp_path, methods={"lora_xs": {"ranks": [16, 32]}, "lora": None, "full": None})
    spec = make_comparison(values)
    rates = {cell.label: cell.rates for cell in spec.cells if cell.compression == "none"}
    # LoRA-XS takes 4e-3 at rank 16, and half of it at twice the rank
    assert rates["lora_xs r=16"] == (1e-3, 4e-3, 1.6e-2)
    assert rates["lora_xs r=32"] == (5e-4, 2e-3, 8e-3)
    assert rates["full"] == (5e-6, 2e-5, 8e-5)
    assert next(cell.rank for cell in spec.cells if cell.label == "lora") == 8
    shared = make_comparison({**values, "learning_rate": [1e-4, 2e-4]})
    assert {cell.rates for cell in shared.cells} == {(1e-4, 2e-4)}
    # full fine-tuning would lose the compression
    assert [cell.compression for cell in spec.cells if cell.label == "full"] == ["none"]


def test_only_and_train_are_for_one_method(tmp_path):
    values = comparison_values(tmp_path)
    values["methods"]["xs"] |= {"only": ["4bit"], "train": {"weight_decay": 0.1}}
    spec = make_comparison(values)
    assert {cell.compression for cell in spec.cells if cell.method == "lora_xs"} == {"4bit"}
    decays = {cell.method: cell.recipe(spec, "x").train.weight_decay for cell in spec.cells}
    assert decays == {"lora": 0.0, "lora_xs": 0.1}


def test_a_recipe_may_lie_in_a_file_beside(tmp_path):
    values = comparison_values(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text(yaml.safe_dump(values["recipe"]))
    spec = load_comparison(write(tmp_path, {**values, "recipe": "recipes/r.yaml"}))
    assert spec.digest() == make_comparison(values).digest()
    # what is written down holds the recipe itself
    assert make_comparison(yaml.safe_load(spec.to_yaml())).digest() == spec.digest()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"name": "other"}, True),
        ({"workers": 3}, True),
        ({"output": "elsewhere"}, True),
        ({"prices": {"kwh": 0.3, "currency": "EUR"}}, True),
        ({"seeds": [0, 2]}, False),
        ({"select_on": "first_seed"}, False),
        ({"learning_rate": [1e-3]}, False),
        ({"threads": 2}, False),
    ],
)
def test_the_digest_is_of_what_changes_numbers(tmp_path, change, same):
    values = comparison_values(tmp_path)
    assert (make_comparison({**values, **change}).digest() == make_comparison(values).digest()) is same


WRONG = """\
recipe:
  model: {name_or_path: embedded}
  data: {train: bundled:notes}
  quantize: {bits: 4}
methods:
  lora: {ranks: [2, 2], learning_rat: [0.01]}
  lora_x: {ranks: [4]}
  qa_sparse_peft: {only: [4bit]}
  full:
    learning_rate: [-0.1]
    train: {epochs: 3, wieght_decay: 1}
  vera: {only: [4bits]}
  xs: {name: lora_xs, core: diagnal}
compressions:
  4bit: {quantise: {}, quantize: {bitz: 4}}
  8 bit: {quantize: {bits: 99}}
seeds: [0, 0]
sedes: 1
prices: {kwhs: 1}
"""


def test_everything_wrong_is_said_at_once_with_lines_and_nearest_names(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(WRONG)
    with pytest.raises(ConfigError) as caught:
        load_comparison(file)
    said = str(caught.value)
    for words in (
        ":18: no option 'sedes' (did you mean 'seeds'",
        ":17: seeds holds a seed twice",
        ":4: the recipe has the section quantize: put it into compressions",
        ":6: lora: ranks = [2, 2]",
        ":6: lora: lora has no option 'learning_rat' (did you mean 'learning_rate'",
        ":7: no method 'lora_x' (did you mean 'lora_xs'",
        ":8: qa_sparse_peft on 4bit: it trains codes on grids that hold 0",
        ":10: full: learning_rate holds -0.1",
        ":11: full: train.epochs is part of what all methods share",
        ":11: full: no option train.wieght_decay (did you mean 'weight_decay'",
        ":9: full has no base to train on",
        ":12: vera: no compression '4bits' (did you mean '4bit'",
        ":13: xs: LoraXSConfig: core = 'diagnal' (did you mean 'diagonal'",
        ":15: 4bit: no stage 'quantise' (did you mean 'quantize'",
        ":15: 4bit: quantize has no option 'bitz' (did you mean 'bits'",
        ":16: compressions: '8 bit' becomes a folder",
        ":16: 8 bit: quantize: bits = 99",
        ":19: prices have no 'kwhs' (did you mean 'kwh'",
    ):
        assert words in said, f"{words}\nis not in\n{said}"


def test_a_plan_counts_what_will_be_trained(tmp_path):
    values = comparison_values(tmp_path)
    found = plan(make_comparison({**values, "select_on": "first_seed"}))
    counts = {(cell["compression"], cell["label"]): cell["trained_values"] for cell in found["cells"]}
    # fourteen layers with r² numbers each
    assert counts["none", "xs r=4"] == counts["4bit", "xs r=4"] == 14 * 16
    assert [cell["runs"] for cell in found["cells"]] == [2, 2, 3, 3] * 2
    assert plan(make_comparison(values))["runs"] == 2 * (2 + 2 + 4 + 4)
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_the_model_or_the_data_is_told_before_anything_runs(tmp_path):
    values = comparison_values(tmp_path)
    values["methods"]["xs"]["ranks"] = [2, 64]
    values["methods"]["lora"]["target_modules"] = ["q_prj"]
    del values["recipe"]["data"]["validation"]
    with pytest.raises(ConfigError) as caught:
        plan(make_comparison(values))
    said = str(caught.value)
    assert "xs r=64: lora_xs does not fit" in said
    assert "lora r=1: no linear layer matches 'q_prj' (did you mean 'q_proj'" in said
    assert "choosing among learning rates needs validation rows" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/comparisons").glob("*.yaml")), ids=lambda p: p.stem)
def test_comparisons_that_ship_can_be_run(path):
    assert plan(load_comparison(path))["runs"] > 0


def test_the_comparison_in_the_docs_is_valid():
    page = (ROOT / "docs" / "do" / "compare.md").read_text()
    text = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]
    assert len(make_comparison(read_yaml(text, "page")[0]).cells) == 3 * 5 + 1 + 1
