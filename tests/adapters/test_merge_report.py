"""The merge error is measured, and tells a lost adapter from a rounded one."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import models_for_tests as models

import modicum
from modicum.adapters.merge_report import merge_error, relative_error
from modicum.errors import ConfigError


def adapted(size=0.3, config=None, model=None):
    model = get_peft_model(model or models.llama(), config or modicum.LoraXSConfig(r=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def batch():
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {"input_ids": models.tokens(), "attention_mask": mask}


CONFIGS = {
    "lora_xs": lambda: modicum.LoraXSConfig(r=4),
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_report_is_what_a_real_merge_gives(name):
    model = adapted(config=CONFIGS[name]())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = merge_error(model, batch(), torch.bfloat16)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    model.eval()
    mask = batch()["attention_mask"].bool()
    with torch.no_grad():
        unmerged = model(**batch()).logits[mask]
        merged = model.merge_and_unload()
        for module_name, module in merged.named_modules():
            if isinstance(module, torch.nn.Linear) and module_name != "lm_head":
                module.weight.copy_(module.weight.bfloat16())
        rounded = merged(**batch()).logits[mask]
    assert report.tokens == 19
    assert report.dtype == "bfloat16"
    assert report.logit_error == pytest.approx(
        ((rounded - unmerged).norm() / unmerged.norm()).item(), rel=1e-3
    )
    assert report.max_difference == pytest.approx((rounded - unmerged).abs().max().item(), rel=1e-3)
    assert 1e-4 < report.logit_error < report.tolerance
    assert report.exact
    assert len(report.worst_layers) == 5
    assert report.worst_layers[0].error >= report.worst_layers[-1].error > 1e-4


@pytest.mark.parametrize("make", [models.llama, models.gpt2, models.bert])
def test_float32_merges_are_exact(make):
    targets = {models.gpt2: ["c_attn", "c_fc"], models.bert: ["query", "output.dense"]}.get(
        make, "all-linear"
    )
    model = adapted(config=modicum.LoraXSConfig(r=4, target_modules=targets), model=make())
    report = merge_error(model, batch())
    assert report.dtype == "float32"
    assert report.logit_error < 1e-5
    assert report.worst_layers[0].error < 1e-5
    assert report.effect > 0.01
    assert report.same_answer == 1.0
    assert report.exact


def test_an_adapter_that_bfloat16_swallows_is_not_exact():
    report = merge_error(adapted(size=1e-4), batch(), torch.bfloat16)
    assert report.logit_error < report.tolerance
    assert report.lost > 1
    assert not report.exact


def test_an_adapter_without_effect_loses_nothing():
    report = merge_error(adapted(size=0.0), batch())
    assert (report.effect, report.lost, report.logit_error) == (0.0, 0.0, 0.0)
    assert report.exact


def test_models_that_are_merged_already_or_carry_nothing_are_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        merge_error(model, batch())


def test_an_error_is_relative_to_what_is_expected():
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_error(expected, torch.zeros(2)) == 5
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
