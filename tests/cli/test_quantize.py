"""`modicum quantize`: plan, run, table and JSON, errors that leave nothing behind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tests import small_checkpoints as small
from tests.cli.adapter_files import run
from transformers import AutoModelForCausalLM

from modicum.cli._shown import quantization
from modicum.compress.quantize_report import QuantizationReport
from modicum.quant.affine import AffineLinear


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("so it goes, on and on; " * 30, encoding="utf-8")
    return file


def words(text, output, *more):
    return ["quantize", small.llama(), "--output", output, "--group-size", 16, "--sequence-length", 24,
            "--eval-text", text, *more]  # fmt: skip


def test_a_plan_then_the_model(text, tmp_path, capsys):
    out = tmp_path / "q"
    chosen = ["--calibration", text, "--sequences", 9, "--bits", 3, "--act-order", "--exclude", "down_proj"]
    plan = run(capsys, *words(text, out, *chosen, "--dry-run", "--json"))
    assert plan.code == 0, plan.out
    assert not out.exists()
    assert plan.json["dry_run"]
    assert len(plan.json["layers"]) == 12
    assert plan.json["bits_per_weight"] == pytest.approx(3 + 32 / 16)
    done = run(capsys, *words(text, out, *chosen, "--json"))
    assert done.code == 0, done.out
    assert "quantize 2/2 model.layers.1" in done.err
    assert done.json["bytes_after"] == plan.json["bytes_after"]
    assert done.json["options"]["act_order"] is True
    assert done.json == json.loads((out / "quantization_report.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, AffineLinear)
    assert (layer.spec.bits, layer.spec.block) == (3, (1, 16))
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_the_head_is_asked_for(text, tmp_path, capsys):
    for more, layers in (([], 14), (["--head"], 15)):
        plan = run(capsys, *words(text, tmp_path / "q", "--algorithm", "mse", *more, "--dry-run", "--json"))
        assert plan.json["options"]["head"] is bool(more)
        assert len(plan.json["layers"]) == layers
    refused = run(capsys, *words(text, tmp_path / "q", "--algorithm", "nf4", "--head"))
    assert refused.code == 1
    assert "keeps the output head in full precision" in refused.err


def test_double_quantization_can_be_left_out(text, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    for more, double in (([], True), (["--no-double-quant"], False)):
        chosen = [
            "quantize",
            small.llama(),
            "--output",
            tmp_path / "q",
            "--algorithm",
            "nf4",
            "--no-eval",
            *more,
        ]
        plan = run(capsys, *chosen, "--dry-run", "--json")
        assert plan.code == 0, plan.out
        assert plan.json["options"]["double_quant"] is double


def test_the_table(text, tmp_path, capsys):
    shown = run(capsys, *words(text, tmp_path / "q", "--algorithm", "mse", "--block", "8x4"))
    assert shown.code == 0, shown.err
    for part in ("bits per weight", "5.000", "perplexity", "->", "layers with the largest output error"):
        assert part in shown.out
    again = run(capsys, *words(text, tmp_path / "q", "--algorithm", "mse"))
    assert again.code == 1
    assert "exists already; choose another name or pass --overwrite" in again.err
    plan = run(capsys, *words(text, tmp_path / "p", "--algorithm", "rtn", "--dry-run"))
    assert "(nothing written)" in plan.out
    assert "model.layers.1.mlp.down_proj" in plan.out


def test_a_model_that_overflows_when_quantized_is_shown_without_perplexity():
    about: dict = {"model": "m", "output": "q", "options": {}, "bits_per_weight": 4.0, "quantized_weights": 8}
    about |= {"kept_weights": 2, "bytes_before": 40, "bytes_after": 12, "layers": [], "notes": ["a note"]}
    shown = {}
    for after in (None, 7.25):
        report = QuantizationReport(**about, perplexity_before=6.5, perplexity_after=after, evaluation="text")
        facts = quantization(report)[0]
        shown[after] = list(facts.columns[1].cells)
    assert [cell for cell in shown[7.25] if cell not in shown[None]] == ["6.500 -> 7.250 on text"]


def test_zeros_and_residuals_are_asked_for(text, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "sparse"
    shutil.copytree(small.llama(), folder)
    tensors = load_file(folder / "model.safetensors")
    for key in tensors:
        if key.endswith("_proj.weight"):
            tensors[key][::2] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    chosen = ["quantize", folder, "--group-size", 16, "--no-eval", "--algorithm", "mse", "--keep-zeros"]
    refused = run(capsys, *chosen, "--output", tmp_path / "q")
    assert "zero_point = 'integer' or 'none', not 'float'" in refused.err
    done = run(capsys, *chosen, "--keep-residuals", "--zero-point", "integer", "--output", tmp_path / "q")
    assert done.code == 0, done.err
    assert "(50.0%), all kept" in done.out
    # 4 bits, 48 for a group of 16, 8 of residuals
    assert "15.000" in done.out
    assert (
        json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["residuals"] is True
    )


def test_without_evaluation_no_text_is_needed(tmp_path, capsys):
    done = run(capsys, "quantize", small.llama(), "--output", tmp_path / "q", "--group-size", "16",
               "--algorithm", "rtn", "--no-eval", "--zero-point", "none", "--json")  # fmt: skip
    assert done.code == 0, done.out
    assert done.json["perplexity_after"] is None
    assert done.json["options"]["zero_point"] == "none"


def test_errors_are_one_message_and_leave_nothing(text, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    refused = run(capsys, *words(text, tmp_path / "q", "--bits", 5, "--algorithm", "gtpq"))
    assert refused.code == 1
    assert refused.err.count("error:") == 1
    for part in ("bits = 5", "did you mean 'gptq'"):
        assert part in refused.err
    for block in ("8", "8x", "axb"):
        wrong = run(capsys, *words(text, tmp_path / "q", "--block", block))
        assert f"block = {block!r}; write outputs x inputs, e.g. 8x4" in wrong.err
    assert sorted(tmp_path.iterdir()) == before
