"""The door of the exports: what it refuses, and that it leaves all or nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from tests import models_for_tests
from tests.compress import export_cases as cases

from modicum.compress.export import export_model, formats
from modicum.compress.export._source import Source, narrow
from modicum.errors import ConfigError, InexactMergeError, MissingExtraError

LIBRARIES = {"gguf": "gguf", "onnx": "onnx", "openvino": "openvino"}


def test_formats_are_files():
    assert formats() == ("compressed-tensors", "gguf", "gptq", "onnx", "openvino")


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
def test_what_exports_read_is_the_weight(case):
    model = case.model()
    source = Source(model, None)
    for name, module in cases.low_bit(model).items():
        weight = source.weight(name)
        torch.testing.assert_close(weight.decoded(), module.dequantized(), rtol=1e-6, atol=1e-7)
        group, scales, offsets = weight.in_row_groups()
        steps = (t.repeat_interleave(group, 1) for t in (scales, offsets))
        scale, offset = steps
        torch.testing.assert_close(
            weight.centred() * scale + offset, module.dequantized(), rtol=1e-6, atol=1e-7
        )


def test_narrow_keeps_every_bit():
    values = torch.tensor([1.0, -0.375, 2.0**-20])
    assert narrow(values).dtype == torch.float16
    assert narrow(values * 2.0**-60).dtype == torch.bfloat16
    assert narrow(values + 2.0**-15).dtype == torch.float32
    for factor in (1.0, 2.0**-60, 1 / 3):
        assert torch.equal(narrow(values * factor).float(), values * factor)


@pytest.mark.parametrize("fmt", formats())
def test_unknown_models_are_refused(fmt, tmp_path):
    with pytest.raises(
        ConfigError,
        match="LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, not GPT2",
    ):
        export_model(models_for_tests.gpt2(), cases.tokenizer(), tmp_path / "out", fmt)
    assert list(tmp_path.iterdir()) == []


def test_options_that_no_file_knows_are_named_together():
    model = cases.Case(kind="mistral", options={"hidden_act": "gelu", "sliding_window": 8}).model()
    with pytest.raises(ConfigError, match=r"hidden_act = 'gelu'.*sliding_window = 8"):
        Source(model, None)


def test_an_adapter_is_merged_first():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ConfigError, match="merge the adapter first"):
        Source(get_peft_model(models_for_tests.llama(), LoraConfig(target_modules=["q_proj"])), None)


def test_an_unknown_format(tmp_path):
    with pytest.raises(ConfigError, match=r"no format 'ggf' \(did you mean 'gguf'"):
        export_model(cases.Case().model(), cases.tokenizer(), tmp_path / "out", "ggf")


@pytest.mark.parametrize("fmt", LIBRARIES)
def test_a_missing_library_is_named(fmt, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARIES[fmt], None)
    with pytest.raises(MissingExtraError, match=rf"needs {LIBRARIES[fmt]}: pip install 'modicum\[export\]'"):
        export_model(cases.Case().model(), cases.tokenizer(), tmp_path / "out", fmt)


@pytest.mark.parametrize("fmt", ["gguf", "gptq"])
def test_numbers_outside_float16_are_no_rounding(fmt, tmp_path):
    if fmt == "gguf":
        pytest.importorskip("gguf", reason="gguf is not installed")
    model = cases.Case(zero_point="integer").model()
    small, large = (model.model.layers[i].self_attn.o_proj for i in (0, 1))
    for layer, factor in ((small, 2.0**-24), (large, 2.0**20)):
        scales, offsets = layer.grid()
        layer.set_grid(type(layer.grid())(scales * factor, offsets * factor))
    with pytest.raises(InexactMergeError, match="2 of 14 low-bit layers"):
        export_model(model, cases.tokenizer(), tmp_path / "out", fmt)
    result = export_model(model, cases.tokenizer(), tmp_path / "out", "compressed-tensors")
    assert (result.exact, result.max_weight_error) == (True, 0.0)


class Failing:
    """A tokenizer that cannot be written."""

    def save_pretrained(self, folder):
        raise OSError(f"no space in {folder}")


def test_a_failed_export_leaves_what_was_there(tmp_path):
    model, out = cases.Case(zero_point="integer").model(), tmp_path / "out"
    with pytest.raises(OSError, match="no space"):
        export_model(model, Failing(), out, "compressed-tensors")
    assert list(tmp_path.iterdir()) == []
    export_model(model, cases.tokenizer(), out, "compressed-tensors")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OSError, match="no space"):
        export_model(model, Failing(), out, "compressed-tensors", overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_outputs_are_replaced_on_request_only(tmp_path):
    model, out = cases.Case(zero_point="integer").model(), tmp_path / "out"
    out.mkdir()
    export_model(model, cases.tokenizer(), out, "compressed-tensors")
    with pytest.raises(ConfigError, match="exists already"):
        export_model(model, cases.tokenizer(), out, "gptq")
    result = export_model(model, cases.tokenizer(), out, "gptq", overwrite=True)
    assert result.files == {path.name: path.stat().st_size for path in out.iterdir()}
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="no earlier export"):
        export_model(model, cases.tokenizer(), mine, "gptq", overwrite=True)
    assert (mine / "thesis.tex").read_text() == "years"


def test_a_dry_run_measures_and_writes_nothing(tmp_path):
    integer, free = cases.Case(zero_point="integer").model(), cases.Case().model()
    result = export_model(integer, cases.tokenizer(), tmp_path / "out", "gptq", dry_run=True)
    assert (result.dry_run, result.exact, result.files) == (True, True, {})
    with pytest.raises(InexactMergeError):
        export_model(free, cases.tokenizer(), tmp_path / "out", "gptq", dry_run=True)
    measured = export_model(
        free, cases.tokenizer(), tmp_path / "out", "gptq", allow_inexact=True, dry_run=True
    )
    assert measured.max_weight_error > 0.01
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_as_a_whole(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    out = tmp_path / "out.gguf"
    out.write_text("old")
    with pytest.raises(ConfigError, match="exists already"):
        export_model(cases.Case().model(), cases.tokenizer(), out, "gguf")
    result = export_model(cases.Case().model(), cases.tokenizer(), out, "gguf", overwrite=True)
    assert result.files == {"out.gguf": out.stat().st_size}
    assert out.read_bytes()[:4] == b"GGUF"
    assert list(tmp_path.iterdir()) == [out]
    assert out.stat().st_mode & 0o777 == 0o644
