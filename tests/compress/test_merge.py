"""Merging into quantized bases from files to files: exact where claimed, refused or measured where not."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.cli.adapter_files import tokenizer
from tests.models_for_tests import SMALL, llama, tokens
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modicum import AffineConfig
from modicum.adapters import registry
from modicum.adapters.elastic import Cut, SubNetwork, Switch
from modicum.compress.merge import merge_to_folder
from modicum.errors import BaseMismatchError, InexactMergeError
from modicum.quant.affine import AffineLinear
from modicum.quant.huggingface import AffineQuantizer, quantize_linears

TEXTS = ["w1 w2 w3 w4 w5", "w3 w9 w2 w7"]


def quantized_folder(folder, **options):
    model = llama()
    config = AffineConfig(**{"bits": 4, "group_size": 16, **options})
    quantize_linears(model, config)
    model.hf_quantizer = AffineQuantizer(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return quantized_folder(tmp_path_factory.mktemp("base") / "q4")


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapter(base, folder, method, **options):
    """A saved adapter that changes the model, and the logits with it."""
    if method == "lora":
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    else:
        values = {"r": 4, "init_weights": False, **SMALL.get(method, {}), **options}
        config = registry.config_class(method)(**values, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(base), config).eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(tokens()).logits


def logits(folder):
    with torch.no_grad():
        return load(folder)(tokens()).logits


def measured(model):
    """Logits on the texts that a merge is measured on."""
    found = tokenizer()(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        result = model(input_ids=found["input_ids"], attention_mask=found["attention_mask"]).logits
    return result[found["attention_mask"].bool()]


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("method", "options", "bits"),
    [
        ("qa_lora", {"pool": 16}, 7.0),
        ("qa_blora", {"pool": 16, "repeat": 4}, 7.0),
        ("qa_hira", {"pool": 4, "repeat": 8}, 7.0),
        ("q_bara", {"pool": 2, "repeat": 2}, 14.0),
    ],
)
def test_exact_methods_stay_quantized_bit_for_bit(base, tmp_path, method, options, bits):
    path, wanted = adapter(base, tmp_path / "adapter", method, **options)
    done = merge_to_folder(str(base), path, tmp_path / "merged", texts=TEXTS)
    assert done.exact
    assert done.dtype == "4-bit affine"
    assert done.report.logit_error < 1e-5
    assert done.report.effect > 0.01
    assert done.bits_before == 6.0
    assert done.bits_after == bits
    if method in {"qa_lora", "qa_blora"}:
        # float16 keeps three digits more than bfloat16, an integer zero-point none
        lost = done.coarser_offsets
        assert 0 < 4 * lost["float16"] < lost["bfloat16"] < lost["integer"]
    assert off(logits(tmp_path / "merged"), wanted) < 1e-5
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    kept = [key for key in before if not key.endswith("offsets")]
    assert len(kept) > 14 * 2
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert any(
        not torch.equal(before[key].float(), after[key].float()) for key in before if key not in kept
    ) or any(key.endswith("block_offsets") for key in after)


@pytest.mark.parametrize(
    ("method", "values"), [("qa_lora", {"pool": 16}), ("qa_hira", {"pool": 8, "repeat": 2})]
)
@pytest.mark.parametrize(
    "grid",
    [
        {"bits": 8},
        {"bits": 3, "offset_dtype": "float32"},
        {"bits": 2, "scale_dtype": "float16"},
        {"zero_point": "integer"},
        {"zero_point": "none"},
        {"block": (2, 8)},
        {"bits": 3, "block": (4, 8), "zero_point": "integer"},
    ],
    ids=str,
)
def test_a_merged_folder_is_the_unmerged_model_on_every_grid(tmp_path, grid, method, values):
    base = quantized_folder(tmp_path / "base", **grid)
    path, wanted = adapter(base, tmp_path / "adapter", method, **values)
    done = merge_to_folder(str(base), path, tmp_path / "merged", texts=TEXTS)
    assert done.exact
    assert done.report.logit_error < 1e-5
    assert done.report.effect > 0.01
    merged = load(tmp_path / "merged")
    with torch.no_grad():
        assert off(merged(tokens()).logits, wanted) < 1e-5
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    frozen = [key for key in before if not key.endswith("offsets")]
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    found = [layer for layer in merged.modules() if isinstance(layer, AffineLinear)]
    assert {layer.spec.bits for layer in found} == {grid.get("bits", 4)}
    assert len(found) == 14


@pytest.mark.parametrize("method", ["lora", "lora_xs"])
def test_other_methods_are_refused_or_go_where_they_fit(base, tmp_path, method):
    path, wanted = adapter(base, tmp_path / "adapter", method)
    with pytest.raises(InexactMergeError, match=r"--dtype bfloat16.*--allow-inexact"):
        merge_to_folder(str(base), path, tmp_path / "merged", texts=TEXTS)
    assert not (tmp_path / "merged").exists()
    dense = merge_to_folder(str(base), path, tmp_path / "dense", texts=TEXTS, dtype="float32")
    assert dense.exact
    model = load(tmp_path / "dense")
    assert not any(isinstance(m, AffineLinear) for m in model.modules())
    assert not hasattr(model.config, "quantization_config")
    assert off(logits(tmp_path / "dense"), wanted) < 1e-5
    narrow = merge_to_folder(str(base), path, tmp_path / "narrow", texts=TEXTS, dtype="bfloat16")
    assert 1e-6 < narrow.report.logit_error < 3e-2
    forced = merge_to_folder(str(base), path, tmp_path / "forced", texts=TEXTS, allow_inexact=True)
    assert not forced.exact
    assert forced.report.logit_error > 1e-3
    again = load(tmp_path / "forced")
    real = off(measured(again), measured(load(tmp_path / "dense")))
    assert real == pytest.approx(forced.report.logit_error, rel=1e-3)
    assert {m.spec.bits for m in again.modules() if isinstance(m, AffineLinear)} == {4}


def test_error_feedback_beats_rounding_on_the_inputs_it_saw(base, tmp_path):
    path, _ = adapter(base, tmp_path / "adapter", "lora_xs")
    merge_to_folder(str(base), path, tmp_path / "forced", texts=TEXTS, allow_inexact=True)
    dense = merge_to_folder(str(base), path, tmp_path / "dense", texts=TEXTS, dtype="float32")
    rounded = load(tmp_path / "dense")
    quantize_linears(rounded, AffineConfig(bits=4, group_size=16))
    assert dense.exact
    wanted = measured(load(tmp_path / "dense"))
    assert off(measured(load(tmp_path / "forced")), wanted) < off(measured(rounded), wanted)


def test_a_merge_that_fails_while_writing_leaves_nothing(base, tmp_path, monkeypatch):
    path, _ = adapter(base, tmp_path / "adapter", "qa_hira")

    def full(*_: object, **__: object):
        raise OSError("no space left")

    # the model is written already, the tokenizer comes last
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        merge_to_folder(str(base), path, tmp_path / "merged", texts=TEXTS)
    assert [left.name for left in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("residuals", [True, False])
@pytest.mark.parametrize("dry_run", [True, False])
def test_updates_on_the_grid_change_codes_and_nothing_else(tmp_path, residuals, dry_run):
    base = quantized_folder(tmp_path / "base", zero_point="integer", residuals=residuals)
    path, wanted = adapter(
        base, tmp_path / "adapter", "qa_sparse_peft", target_modules=["q_proj", "down_proj"]
    )
    done = merge_to_folder(
        str(base), path, tmp_path / "merged", texts=TEXTS, allow_inexact=True, dry_run=dry_run
    )
    assert done.exact
    assert done.dtype == "4-bit affine"
    assert done.report.logit_error < 1e-5
    assert done.report.effect > 0.01
    # 4 bits, a scale of 16 and an offset of 32 for 16 weights
    assert done.bits_before == (15.0 if residuals else 7.0)
    assert done.bits_after == 7.0
    assert done.coarser_offsets == {}
    if dry_run:
        assert not (tmp_path / "merged").exists()
        return
    assert off(logits(tmp_path / "merged"), wanted) < 1e-5
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert {key for key in before if not key.endswith("residuals")} == set(after)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.endswith(("q_proj.codes", "down_proj.codes"))}
    stored = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert stored["residuals"] is False
    dense = merge_to_folder(str(base), path, tmp_path / "dense", texts=TEXTS, dtype="float32")
    assert dense.exact
    assert off(logits(tmp_path / "dense"), wanted) < 1e-5


@pytest.mark.parametrize(("method", "dtype"), [("qa_sparse_peft", "auto"), ("elastic_lora", "float32")])
def test_a_narrower_sub_network_is_not_merged_as_if_it_were_whole(tmp_path, method, dtype):
    base = quantized_folder(tmp_path / "base", zero_point="integer", residuals=True)
    config = registry.config_class(method)(r=4, init_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(base), config)
    cut = Cut(outputs=((0, 16),))
    narrow = {f"model.layers.0.mlp.{name}": cut for name in ("gate_proj", "up_proj")}
    narrow["model.layers.0.mlp.down_proj"] = Cut(inputs=((0, 16),))
    Switch(model).activate(SubNetwork(cuts=narrow))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InexactMergeError, match="narrower sub-network"):
        merge_to_folder(str(base), tmp_path / "adapter", tmp_path / "merged", texts=TEXTS, dtype=dtype)
    assert not (tmp_path / "merged").exists()


def test_quantizing_again_forgets_the_residuals(tmp_path):
    base = quantized_folder(tmp_path / "base", zero_point="integer", residuals=True)
    path, _ = adapter(base, tmp_path / "adapter", "lora_xs")
    forced = merge_to_folder(str(base), path, tmp_path / "forced", texts=TEXTS, allow_inexact=True)
    assert (forced.bits_before, forced.bits_after) == (15.0, 7.0)
    assert torch.isfinite(logits(tmp_path / "forced")).all()


def test_an_adapter_of_another_quantization_of_the_same_base_is_refused(base, tmp_path):
    other = quantized_folder(tmp_path / "q3", bits=3)
    path, _ = adapter(base, tmp_path / "adapter", "qa_hira")
    with pytest.raises(BaseMismatchError, match="another base model"):
        merge_to_folder(str(other), path, tmp_path / "merged", texts=TEXTS)
    dense = tmp_path / "dense"
    llama().save_pretrained(dense)
    tokenizer().save_pretrained(dense)
    with pytest.raises(BaseMismatchError, match="another base model"):
        merge_to_folder(str(dense), path, tmp_path / "merged", texts=TEXTS)


def test_a_merged_model_takes_the_next_adapter(base, tmp_path):
    first, _ = adapter(base, tmp_path / "one", "qa_hira", pool=4, repeat=8)
    merge_to_folder(str(base), first, tmp_path / "merged", texts=TEXTS)
    second, wanted = adapter(tmp_path / "merged", tmp_path / "two", "qa_hira", pool=8, repeat=2, seed=1)
    done = merge_to_folder(str(tmp_path / "merged"), second, tmp_path / "again", texts=TEXTS)
    assert done.exact
    assert off(logits(tmp_path / "again"), wanted) < 1e-5


def test_nf4_merges_into_dense_or_is_quantized_again(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the extra modicum[quant]")
    from transformers import BitsAndBytesConfig

    dense = tmp_path / "dense"
    llama().save_pretrained(dense)
    nf4 = tmp_path / "nf4"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(nf4)
    tokenizer().save_pretrained(nf4)
    path, wanted = adapter(nf4, tmp_path / "adapter", "q_bara")
    with pytest.raises(InexactMergeError, match="exactly"):
        merge_to_folder(str(nf4), path, tmp_path / "merged", texts=TEXTS)
    done = merge_to_folder(str(nf4), path, tmp_path / "float", texts=TEXTS, dtype="float32")
    assert done.exact
    assert off(logits(tmp_path / "float"), wanted) < 1e-4
    forced = merge_to_folder(str(nf4), path, tmp_path / "low", texts=TEXTS, allow_inexact=True)
    assert not forced.exact
    assert all(
        isinstance(m, AffineLinear)
        for name, m in load(tmp_path / "low").named_modules()
        if isinstance(m, nn.Linear) and name != "lm_head"
    )
