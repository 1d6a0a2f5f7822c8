"""Every method of the recipe goes onto a model; heads train beside adapters with their own rate."""

from __future__ import annotations

import pytest
import torch
from tests import models_for_tests as models
from tests.small_checkpoints import bert, llama, recipe_values

from modicum.models.loading import load_base
from modicum.train.methods import BASELINES, apply_method, head_parameters, method_names, trained_values
from modicum.train.recipe import MethodOptions, make_recipe

SMALL = {"vera": {"r": 4}, "tiny_lora": {"u": 4}, "psoft": {"r": 4}, "lora_xs": {"r": 4}} | models.SMALL


@pytest.mark.parametrize("name", method_names())
def test_every_method_trains_its_own_numbers_only(name):
    model = models.base_for(name, load_base(str(llama())))
    every = sum(p.numel() for p in model.parameters())
    adapted = apply_method(model, MethodOptions(name=name, **SMALL.get(name, {})), "causal_lm", seed=0)
    counts = trained_values(adapted)
    assert counts["head"] == 0
    assert counts["total"] == counts["adapter"] > 0
    assert (counts["total"] == every) == (name == "full")


@pytest.mark.parametrize("name", [*BASELINES, "full", "lora_xs"])
def test_the_head_of_a_classifier_trains_along(name):
    model = load_base(str(bert()), "seq_cls", num_labels=3)
    adapted = apply_method(model, MethodOptions(name=name, **SMALL.get(name, {})), "seq_cls", seed=0)
    counts = trained_values(adapted)
    assert counts["head"] == 32 * 3 + 3
    assert counts["adapter"] > 0
    assert all("classifier" in key for key, _ in head_parameters(adapted))


def test_lora_and_dora_differ_by_the_magnitudes_alone():
    counts = {}
    for name in ("lora", "dora"):
        model = load_base(str(llama()))
        method = MethodOptions(name=name, r=2, target_modules=["q_proj"])
        counts[name] = trained_values(apply_method(model, method, "causal_lm"))["adapter"]
    assert counts["dora"] - counts["lora"] == 2 * 32


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_head_has_its_own_learning_rate(tmp_path, name):
    from modicum.train.run import load
    from modicum.train.trainer import build_trainer

    values = recipe_values(tmp_path, "seq_cls", head_learning_rate=0.5, weight_decay=0.1)
    recipe = make_recipe({**values, "method": {"name": name}})
    loaded = load(recipe)
    trainer = build_trainer(recipe, loaded.model, loaded.data, 0, tmp_path)
    optimizer = trainer.create_optimizer()
    head = {id(p) for _, p in head_parameters(loaded.model)}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    assert set(rates) == {id(p) for p in trained}
    assert all(rates[id(p)] == (0.5 if id(p) in head else 5e-3) for p in trained)
    # weight decay stays with matrices on both sides
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for n, p in head_parameters(loaded.model) if n.endswith("bias")} == {0.0}
    assert {decays[id(p)] for n, p in head_parameters(loaded.model) if n.endswith("weight")} == {0.1}


def test_seeds_reach_the_adapter():
    def first(seed):
        adapted = apply_method(
            load_base(str(llama())), MethodOptions(name="lora_xs", r=4), "causal_lm", seed=seed
        )
        return next(p for p in adapted.parameters() if p.requires_grad)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
