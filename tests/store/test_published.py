"""Checkpoints in the layout of the authors' LoRA-XS code."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from tests import models_for_tests as models
from tests.store.test_files import logits

import modicum
from modicum.adapters.basis import Basis
from modicum.errors import BasisMismatchError, ConfigError, CorruptAdapterError
from modicum.store.files import load_adapter, save_adapter
from modicum.store.published import import_published, read_published

#: how the r×r matrix of the layer `…self_attn.q_proj` has been called
VARIANTS = {
    "old PEFT": "{parent}.{last}_lora_latent_mapping.weight",
    "new PEFT": "{parent}.{last}.default_lora_latent_mapping.weight",
    "without a name": "{parent}.{last}.lora_latent_mapping.weight",
}


def factors(name, weight, r, kind):
    """What the authors' code makes of one weight, (out, in): the decomposition of its transpose."""
    generator = torch.Generator().manual_seed(len(name))
    if kind == "random":
        a, b = (
            torch.randn(r, weight.shape[1], generator=generator),
            torch.randn(weight.shape[0], r, generator=generator),
        )
        a, b = a * 0.2, b * 0.2
    else:
        u, s, vh = torch.linalg.svd(weight.T, full_matrices=False)
        signs = torch.where(torch.rand(r, generator=generator) < 0.5, -1.0, 1.0)  # whatever their solver gave
        a, b = ((u * s)[:, :r] * signs).T, (vh[:r] * signs[:, None]).T
    return a.contiguous(), b.contiguous(), torch.randn(r, r, generator=generator) * 0.3


def checkpoint(folder, model, targets, variant="new PEFT", kind="svd", r=4, alpha=6, head=(), **config):
    """A published checkpoint in `folder`, and the dense updates it stands for: scaling · B R A."""
    state, updates = {}, {}
    scaling = alpha / (r**0.5 if config.get("use_rslora") else r)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(targets):
            a, b, core = factors(name, module.weight.detach(), r, kind)
            # the authors' forward: lora_B(mapping(lora_A(x))), three nn.Linear without bias
            x = torch.eye(module.in_features)
            y = torch.nn.functional.linear(
                torch.nn.functional.linear(torch.nn.functional.linear(x, a), core), b
            )
            updates[name] = scaling * y.T
            parent, last = name.rsplit(".", 1)
            state[f"base_model.model.{name}.lora_A.weight"] = a
            state[f"base_model.model.{name}.lora_B.weight"] = b
            state["base_model.model." + VARIANTS[variant].format(parent=parent, last=last)] = core
    for name in head:
        value = model.get_submodule(name.rpartition(".")[0]).state_dict()[name.rpartition(".")[2]]
        state[f"base_model.model.{name}"] = value + 0.1
    folder.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
                 "target_modules": [t.removeprefix(".") for t in targets], **config}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return updates


@torch.no_grad()
def with_updates(model, updates):
    for name, update in updates.items():
        model.get_submodule(name).weight.add_(update)
    return model


LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["svd", "random"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["", "rslora"])
def test_the_imported_adapter_is_the_published_update(variant, kind, options, tmp_path):
    updates = checkpoint(tmp_path, models.llama(), LLAMA, variant, kind, **options)
    assert len(updates) == 14
    model = import_published(tmp_path, models.llama())
    for name, update in updates.items():
        layer = model.base_model.model.get_submodule(name)
        torch.testing.assert_close(layer.get_delta_weight("default"), update, rtol=1e-5, atol=1e-5)
    expected = logits(with_updates(models.llama(), updates))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_classifier_with_its_head(tmp_path):
    targets = ("query", "value", "attention.output.dense", "output.dense")
    head = ("classifier.weight", "classifier.bias")
    updates = checkpoint(tmp_path, models.bert(), targets, "old PEFT", head=head, task_type="SEQ_CLS")
    assert len(updates) == 8
    model = import_published(tmp_path / "adapter_model.safetensors", models.bert())
    expected = with_updates(models.bert(), updates)
    with torch.no_grad():
        expected.classifier.weight.add_(0.1)
        expected.classifier.bias.add_(0.1)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


def test_an_imported_adapter_is_saved_and_loaded_like_any_other(tmp_path, monkeypatch):
    checkpoint(tmp_path / "c", models.llama(), LLAMA)
    model = import_published(tmp_path / "c", models.llama())
    saved = save_adapter(model, tmp_path / "a", dtype="float32")
    assert saved.values == 14 * 16
    torch.testing.assert_close(logits(load_adapter(models.llama(), saved.path)), logits(model))
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(BasisMismatchError, match="modicum basis add"):
        load_adapter(models.llama(), saved.path)
    basis = read_published(tmp_path / "c").basis()
    basis.save(tmp_path / "basis.safetensors")
    from modicum.adapters.basis import BasisCache

    BasisCache().add(Basis.load(tmp_path / "basis.safetensors"))
    torch.testing.assert_close(logits(load_adapter(models.llama(), saved.path)), logits(model))


def test_an_imported_adapter_can_be_trained_on(tmp_path):
    checkpoint(tmp_path, models.llama(), LLAMA)
    model = import_published(tmp_path, models.llama(), is_trainable=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 14 * 16
    model(input_ids=models.tokens(), labels=models.tokens()).loss.backward()


def test_incomplete_checkpoints_list_what_is_missing(tmp_path):
    from safetensors.torch import load_file

    checkpoint(tmp_path, models.llama(), ("q_proj", "v_proj"))
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    keys = sorted(whole)
    broken = {key: value for key, value in whole.items() if key not in (keys[0], keys[4])}
    broken[keys[1]] = torch.zeros(3, 3)
    save_file(broken, file)
    with pytest.raises(CorruptAdapterError) as caught:
        read_published(tmp_path)
    assert "is missing in model.layers.0.self_attn.q_proj" in str(caught.value)
    assert "is missing in model.layers.0.self_attn.v_proj" in str(caught.value)
    save_file({key: value for key, value in whole.items() if "latent" not in key}, file)
    with pytest.raises(ConfigError, match="plain LoRA: load it with load_adapter"):
        read_published(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=r"adapter_config\.json"):
        read_published(file)


def test_options_that_lora_xs_lacks_are_refused(tmp_path):
    checkpoint(tmp_path, models.llama(), ("q_proj",), use_dora=True, bias="all")
    with pytest.raises(ConfigError, match="use_dora, bias"):
        read_published(tmp_path)
    model = get_peft_model(models.llama(), modicum.LoraXSConfig(r=2))
    assert model.peft_config["default"].basis == "svd"
