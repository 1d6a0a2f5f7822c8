"""Formats with integer zero-points hold integer grids exactly, and say what they do to all others."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.compress import export_cases as cases
from transformers import AutoModelForCausalLM

from modicum.compress.export import export_model
from modicum.errors import ConfigError, InexactMergeError
from modicum.quant.interchange import from_gptq

FORMATS = ("compressed-tensors", "gptq")
EXACT = {
    "4 bits": cases.Case(zero_point="integer"),
    "3 bits": cases.Case(3, (1, 32), "integer"),
    "2 bits": cases.Case(2, (1, 16), "integer"),
    "8 bits": cases.Case(8, (1, 32), "integer"),
    "symmetric": cases.Case(zero_point="none", options={"tie_word_embeddings": True, "attention_bias": True}),
    "head too": cases.Case(zero_point="integer", head=True),
    "tiles": cases.Case(block=(4, 16), zero_point="integer"),
    "qwen2": cases.Case(zero_point="integer", kind="qwen2"),
}
INEXACT = {
    "float zero-points": cases.Case(),
    "2 bits": cases.Case(2),
    "update on groups": cases.Case(zero_point="integer", update=(1, 32)),
    "update on tiles": cases.Case(zero_point="integer", update=(8, 4)),
}


def bits_of(words, bits, count):
    """Rows of int32 words as fields, by Python's own integers."""
    rows = []
    for row in words.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
        rows.append([(stream >> (bits * i)) & (2**bits - 1) for i in range(count)])
    return torch.tensor(rows)


def gptq_weight(stored, name, bits, less):
    """The weight of a GPTQ layer, unpacked by hand; `less` is what zero-points are stored less."""
    qweight, qzeros, scales, index = (
        stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    codes = bits_of(qweight.T.contiguous(), bits, qweight.shape[0] * 32 // bits)
    zeros = bits_of(qzeros, bits, scales.shape[1]).T + less
    index = index.long()
    return (codes - zeros[:, index]) * scales.float().T[:, index]


@pytest.mark.parametrize("name", EXACT)
def test_gptq_holds_integer_grids(name, tmp_path):
    model = EXACT[name].model()
    result = export_model(model, cases.tokenizer(), tmp_path / "out", "gptq")
    assert result.exact
    stored = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    bits, less = EXACT[name].bits, int(config["checkpoint_format"] == "gptq")
    assert (config["bits"], config["sym"]) == (bits, name == "symmetric")
    for layer, module in cases.low_bit(model).items():
        # the scales are bfloat16 of sizes that float16 holds as well
        assert torch.equal(gptq_weight(stored, layer, bits, less), module.dequantized())
        parts = {part: stored[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
        torch.testing.assert_close(from_gptq(parts, minus_one=bool(less)).weight(), module.dequantized())
    assert result.max_weight_error == 0.0
    dense = {n: p for n, p in model.named_parameters() if n in stored}
    assert all(torch.equal(stored[n].float(), p) for n, p in dense.items())
    assert "model.embed_tokens.weight" in dense


def with_zeros_of_zero():
    """A model of which one layer has positive weights alone, so that its zero-points are 0."""
    model = cases.Case(zero_point="integer").model()
    weight = torch.nn.Linear(64, 64, bias=False)
    weight.weight.data = torch.rand(64, 64)
    model.set_submodule("model.layers.0.self_attn.q_proj", cases.Case(zero_point="integer").layer(weight))
    return model


def test_a_zero_point_of_zero_takes_the_second_form_of_gptq(tmp_path):
    model = with_zeros_of_zero()
    export_model(model, cases.tokenizer(), tmp_path / "out", "gptq")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.equal(gptq_weight(stored, "model.layers.0.self_attn.q_proj", 4, 0), layer.dequantized())


def loaded(folder):
    """The folder as Transformers loads it, in float32."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import CompressedTensorsConfig

    # Transformers loads packed zero-points decompressed only
    options = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=options)
    return model.eval().requires_grad_(requires_grad=False)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", EXACT)
def test_transformers_computes_our_logits(name, tmp_path):
    model, given = EXACT[name].model(), cases.batch()
    result = export_model(model, cases.tokenizer(), tmp_path / "out", "compressed-tensors")
    assert (result.exact, result.max_weight_error) == (True, 0.0)
    theirs = loaded(tmp_path / "out")
    for layer, module in cases.low_bit(model).items():
        assert torch.equal(theirs.get_submodule(layer).weight, module.dequantized())
    found, wanted = cases.logits(theirs, given), cases.logits(model, given)
    assert cases.relative(found[given.real], wanted[given.real]) < 1e-6


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("name", INEXACT)
def test_other_grids_are_refused_and_measured(name, tmp_path):
    model = INEXACT[name].model()
    for fmt in FORMATS:
        with pytest.raises(
            InexactMergeError, match=r"14 of 14 low-bit layers .* up to \d+\.\d+%.*Nothing was written"
        ):
            export_model(model, cases.tokenizer(), tmp_path / "out", fmt)
        assert list(tmp_path.iterdir()) == []
    result = export_model(
        model, cases.tokenizer(), tmp_path / "out", "compressed-tensors", allow_inexact=True
    )
    assert not result.exact
    theirs, errors = loaded(tmp_path / "out"), {}
    for layer, module in cases.low_bit(model).items():
        wanted = module.dequantized()
        errors[layer] = float((theirs.get_submodule(layer).weight - wanted).norm() / wanted.norm())
    assert result.max_weight_error == pytest.approx(max(errors.values()), rel=1e-4)
    assert result.mean_weight_error == pytest.approx(np.mean(list(errors.values())), rel=1e-4)
    assert result.worst_layers[0].name == max(errors, key=errors.__getitem__)
    assert result.max_update_error == pytest.approx(result.max_weight_error / 0.02)
    # an update of 2 % on its own block is mostly lost
    assert result.max_weight_error > 0.012
    by_hand = export_model(model, cases.tokenizer(), tmp_path / "gptq", "gptq", allow_inexact=True)
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    less = int(config["checkpoint_format"] == "gptq")
    for layer, module in cases.low_bit(model).items():
        wanted = module.dequantized()
        found = gptq_weight(stored, layer, INEXACT[name].bits, less)
        errors[layer] = float((found - wanted).norm() / wanted.norm())
    assert not by_hand.exact
    assert by_hand.max_weight_error == pytest.approx(max(errors.values()), rel=1e-4)
    assert by_hand.mean_weight_error == pytest.approx(np.mean(list(errors.values())), rel=1e-4)


def test_layers_that_differ_have_no_form(tmp_path):
    model = cases.Case(zero_point="integer").model()
    other = cases.Case(8, (1, 64), "none").layer(torch.nn.Linear(64, 64, bias=False))
    model.set_submodule("model.layers.1.self_attn.o_proj", other)
    for fmt in FORMATS:
        with pytest.raises(ConfigError, match=r"8 bits in groups of 64: model\.layers\.1\.self_attn\.o_proj"):
            export_model(model, cases.tokenizer(), tmp_path / fmt, fmt, allow_inexact=True)


def test_gptq_wants_every_layer_and_whole_words(tmp_path):
    model = cases.Case(3, (1, 16), "integer", options={"intermediate_size": 160, "head_dim": 12}).model()
    model.set_submodule("model.layers.1.mlp.up_proj", torch.nn.Linear(64, 160, bias=False))
    with pytest.raises(ConfigError) as caught:
        export_model(model, cases.tokenizer(), tmp_path / "out", "gptq")
    assert "model.layers.1.mlp.up_proj are dense" in str(caught.value)
    assert "k_proj: 24 × 64 codes of 3 bits fill no whole 32-bit words" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("bits", "zero_point"),
    [(4, "integer"), (8, "integer"), (4, "none"), (3, "integer"), (2, "integer"), (4, "second form")],
)
def test_gptqmodel_computes_our_logits(bits, zero_point, tmp_path):
    pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")
    from modicum.models.loading import load_base

    given = cases.batch()
    if zero_point == "second form":
        model = with_zeros_of_zero()
    else:
        model = cases.Case(bits=bits, zero_point=zero_point).model()
    export_model(model, cases.tokenizer(), tmp_path / "out", "gptq")
    opened = load_base(str(tmp_path / "out"), dtype="float32")
    with torch.no_grad():
        found = opened(
            input_ids=torch.as_tensor(given.ids),
            attention_mask=torch.as_tensor(given.mask),
            position_ids=torch.as_tensor(given.positions),
        ).logits
    wanted = cases.logits(model, given)
    # gptqmodel's CPU kernel multiplies in 16 bits
    assert cases.relative(found.float().numpy()[given.real], wanted[given.real]) < 3e-3
