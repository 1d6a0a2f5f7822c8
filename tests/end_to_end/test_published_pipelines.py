"""The published pipelines as the recipes that ship, each run from end to end on a small model of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.cli.adapter_files import run as modicum
from tests.compress.test_export_integers import loaded
from tests.small_checkpoints import llama, recipe_values, write_jsonl

from modicum.adapters.elastic import Switch
from modicum.errors import ConfigError
from modicum.models.loading import load_adapted, load_base
from modicum.quant.affine import AffineLinear
from modicum.train.pipeline import run_recipe
from modicum.train.recipe import load_recipe, make_recipe
from modicum.train.run import tune

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = [
    "data.max_length=64",
    "method.r=4",
    "method.alpha=8",
    "train.max_steps=6",
    "train.batch_size=4",
    "train.learning_rate=0.02",
    "train.report_to=none",
    "search.trials=4",
    "search.max_rows=8",
]
CALIBRATION = {"sequences": 4, "sequence_length": 32, "eval_sequences": 4}
#: recipe -> what its low-bit and sparse stages need on so small a model
STAGES = {
    "lonas": {},
    "shears": {"sparsify": {}},
    "sqft": {"sparsify": {}, "quantize": {"group_size": 16}},
    "sqft_sparse_peft": {"sparsify": {}},
    "sqft_qa_sparse_peft": {"sparsify": {}, "quantize": {"group_size": 16}},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Recipe name -> its finished result, run when first asked for."""
    root = tmp_path_factory.mktemp("pipelines")
    text = root / "calibration.txt"
    text.write_text("".join(f"{a}+{b}={a + b}\n" for a in range(20) for b in range(20)))
    rows = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(7) for b in range(7)]
    data = {
        split: write_jsonl(root / f"{split}.jsonl", part)
        for split, part in {"train": rows[:24], "validation": rows[24:32], "test": rows[32:40]}.items()
    }
    done = {}

    def run(name):
        if name not in done:
            changes = [f"model.name_or_path={llama()}", f"output={root / name}", *SMALL]
            changes += [f"data.{split}={file}" for split, file in data.items()]
            for stage, options in STAGES[name].items():
                for key, value in {**CALIBRATION, **options}.items():
                    changes.append(f"{stage}.{key}={value}")
                changes += [f"{stage}.calibration={text}", f"{stage}.eval_text={text}"]
            if name == "lonas":
                changes += [
                    f"reorder.calibration={text}",
                    "reorder.sequences=4",
                    "reorder.sequence_length=32",
                ]
                changes.append("search.budgets.parameters=0.95")
            done[name] = run_recipe(load_recipe(RECIPES / f"{name}.yaml", changes))
        return done[name]

    return run


def zeros(model):
    """Where the linear layers of the transformer layers are zero, by layer."""
    return {
        name: module.weight == 0
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


@pytest.mark.parametrize("name", sorted(STAGES))
def test_runs_from_end_to_end(name, results):
    result = results(name)
    assert json.loads((result.folder / "pipeline.json").read_text())["measure"]
    assert {"base", "adapted"} <= set(result.report["measure"])
    assert result.report["measure"]["base"]["loss"] != result.report["measure"]["adapted"]["loss"]


@pytest.mark.parametrize("name", sorted(STAGES))
def test_what_was_measured_is_the_sub_network_that_was_found(name, results):
    result = results(name)
    found = json.loads((result.folder / "search/search.json").read_text())
    config = json.loads((result.folder / "chosen/adapter_config.json").read_text())
    assert config["sub_network"]["choices"] == found["best"]["choices"]
    assert len(found["points"]) <= 4


@pytest.mark.parametrize("name", ["lonas", "sqft_sparse_peft", "sqft_qa_sparse_peft"])
def test_the_model_that_ships_measures_like_the_one_that_was_trained(name, results):
    measured = results(name).report["measure"]
    shipped = measured["extracted" if name == "lonas" else "merged"]
    for metric in ("loss", "token_accuracy"):
        assert shipped[metric]["value"] == pytest.approx(measured["adapted"][metric]["value"], rel=1e-4), (
            metric
        )


@pytest.mark.parametrize("name", ["shears", "sqft", "sqft_sparse_peft", "sqft_qa_sparse_peft"])
def test_zeros_stay_zero_in_every_stage(name, results):
    folder = results(name).folder
    pruned = zeros(load_base(str(folder / "sparse")))
    assert all(0.45 < mask.float().mean() < 0.55 for mask in pruned.values())
    later = [stage for stage in ("base", "merged") if (folder / stage).is_dir()]
    for stage in later:
        now = zeros(load_base(str(folder / stage)))
        assert all(bool((now[layer] | ~mask).all()) for layer, mask in pruned.items()), stage


def test_qa_sparse_peft_changes_codes_and_nothing_else(results):
    folder = results("sqft_qa_sparse_peft").folder
    before, after = load_base(str(folder / "base")), load_base(str(folder / "merged"))
    changed = 0
    for name, layer in before.named_modules():
        if isinstance(layer, AffineLinear):
            merged = after.get_submodule(name)
            changed += int((layer.codes != merged.codes).sum())
            assert torch.equal(layer.scales, merged.scales)
            assert torch.equal(layer.offsets, merged.offsets)
    assert changed


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_another_engine_loads_the_sparse_low_bit_model_as_it_was_merged(results):
    folder = results("sqft_qa_sparse_peft").folder
    exported = json.loads((folder / "pipeline.json").read_text())["export"]["compressed-tensors"]
    assert (exported["exact"], exported["max_weight_error"]) == (True, 0.0)
    theirs, merged = loaded(folder / "export/compressed-tensors"), load_base(str(folder / "merged"))
    low_bit = {name: layer for name, layer in merged.named_modules() if isinstance(layer, AffineLinear)}
    assert len(low_bit) == 14
    for name, layer in low_bit.items():
        assert torch.equal(theirs.get_submodule(name).weight, layer.dequantized()), name
    now = zeros(theirs)
    for name, pruned in zeros(load_base(str(folder / "sparse"))).items():
        assert 0.45 < pruned.float().mean() < 0.55
        assert bool((now[name] | ~pruned).all()), name
    ids = torch.arange(5, 53).view(2, 24)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, merged(ids).logits, rtol=1e-5, atol=1e-5)


def test_lonas_ships_a_smaller_model_within_its_budget(results):
    result = results("lonas")
    report = result.report["extract"]
    assert report["parameters"] <= 0.95 * report["parameters_before"]
    model = load_base(str(result.folder / "extracted"))
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]
    assert result.report["search"]["best"]["values"]["parameters"] == report["parameters"]


def test_inspect_says_which_sub_network_was_shipped(results, capsys):
    result = results("lonas")

    def inspected(name):
        return modicum(capsys, "inspect", result.folder / name, "--json").json

    trained, chosen, shipped = (inspected(name) for name in ("tune/adapter", "chosen", "extracted"))
    assert trained["state"] == chosen["state"] == shipped["state"] == "ok"
    assert not chosen["sub_network"]["whole"]
    assert chosen["sub_network"]["choices"] == result.report["search"]["best"]["choices"]
    for entry in ("digest", "choices", "widths", "ranks"):
        assert shipped["sub_network"][entry] == chosen["sub_network"][entry], entry
    # what was active while it was trained is said too, and is another one unless the search came back to it
    same = trained["sub_network"]["choices"] == chosen["sub_network"]["choices"]
    assert (trained["sub_network"]["digest"] == shipped["sub_network"]["digest"]) == same
    assert shipped["parameters"] == result.report["extract"]["parameters"]
    model = load_base(str(result.folder / "extracted"))
    assert shipped["parameters"] == sum(p.numel() for p in model.parameters())
    # another model of the same shape is another model
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():
        layer.weight[0, 0] += 1
    model.save_pretrained(result.folder / "changed")
    changed = inspected("changed")
    assert changed["fingerprint"] != shipped["fingerprint"]


def test_a_model_of_uneven_layers_is_tuned_again(results, tmp_path):
    values = recipe_values(tmp_path, "causal_lm")
    values["model"] |= {"name_or_path": str(results("lonas").folder / "extracted")}
    values["method"] = {"name": "lora_xs", "r": 4}
    tuned = tune(make_recipe(values))
    model = load_base(values["model"]["name_or_path"])
    assert model.config.model_type == "modicum_llama"
    adapted = load_adapted(model, tuned.adapter)
    assert tuned.report["trained_values"]["adapter"] == 14 * 4 * 4
    assert any(bool(p.any()) for name, p in adapted.named_parameters() if ".R" in name)


def test_the_adapter_of_shears_keeps_its_rank_beside_the_sparse_model(results):
    folder = results("shears").folder
    model = load_adapted(load_base(str(folder / "sparse")), folder / "chosen")
    ranks = {adapter.active_rank for adapter in Switch(model).adapters.values()}
    assert ranks <= {4, 3, 2}
    assert len(ranks) > 1


def test_a_finished_pipeline_is_passed_over(results):
    from modicum.train.yaml_lines import read_yaml

    first = results("lonas")
    values, _ = read_yaml((first.folder / "recipe.yaml").read_text(), "recipe")
    again = run_recipe(make_recipe(values), resume=True)
    assert set(again.reused) == {"reorder", "tune", "search", "extract"}
    assert again.report["measure"] == first.report["measure"]
    # what stages said that are not run again is still in the report
    assert set(again.report) == set(first.report)
    assert json.loads((first.folder / "pipeline.json").read_text()) == again.report


def test_a_classifier_is_searched_and_cut_out(tmp_path):
    rows = [{"sentence": f"{n}{'z' if n % 2 else 'y'}", "label": n % 2} for n in range(48)]
    values = recipe_values(tmp_path, "seq_cls")
    for split, part in {"train": rows[:24], "validation": rows[24:36], "test": rows[36:]}.items():
        values["data"][split] = str(write_jsonl(tmp_path / f"{split}.jsonl", part))
    values["data"]["label_names"] = ["no", "yes"]
    values["method"] = {"name": "elastic_lora", "r": 4, "alpha": 8}
    values |= {"elastic": {"space": "lonas_bert"}, "extract": {}}
    values["search"] = {"strategy": "nsga2", "trials": 3, "population": 2, "budgets": {"parameters": 0.95}}
    swept = make_recipe({**values, "sweep": {"seeds": [0, 1]}})
    with pytest.raises(ConfigError, match="drop the section sweep"):
        run_recipe(swept)
    assert not swept.folder.exists()
    result = run_recipe(make_recipe(values))
    measured = result.report["measure"]
    for metric, value in measured["adapted"].items():
        assert measured["extracted"][metric]["value"] == pytest.approx(value["value"], rel=1e-4), metric
    config = json.loads((result.folder / "extracted/config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
