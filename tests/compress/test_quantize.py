"""Quantized folders: what is stored, what it costs, streaming against the loaded model, resuming, refusing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import models_for_tests as models
from tests import small_checkpoints as small
from tests.compress import export_cases
from tests.compress.folder_cases import (
    LENGTH,
    Stop,
    files_of,
    perplexity,
    saved,
    stop_at,
    tensors_of,
    write_text,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import modicum  # noqa: F401 - registers the format
from modicum.compress.calibration import calibration_sequences
from modicum.compress.export import export_model, formats
from modicum.compress.import_quantized import import_quantized
from modicum.compress.quantize import quantize_model
from modicum.compress.quantize_report import QuantizeOptions
from modicum.compress.source import Source
from modicum.compress.streaming import Stack, layer_names
from modicum.compress.work import Work
from modicum.compress.writing import write_shards
from modicum.errors import ConfigError, CorruptAdapterError, MissingExtraError
from modicum.ops.affine import decode, encode, fit_grid, pack, unpack
from modicum.ops.gptq import Hessian, gptq
from modicum.quant.affine import AffineLinear
from modicum.quant.huggingface import dense_linear

#: both dimensions of the small models (32 and 48) are multiples
GROUP = 16


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def options(text):
    return QuantizeOptions(
        bits=3, group_size=GROUP, algorithm="rtn", sequence_length=LENGTH, sequences=12, eval_text=text,
        eval_sequences=10,
    )  # fmt: skip


def with_gptq(options, text, **others):
    return dataclasses.replace(options, algorithm="gptq", calibration=(text,), **others)


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"algorithm": "mse", "bits": 4, "offset_dtype": "float32"},
        {"bits": 8, "zero_point": "none", "scale_dtype": "float16"},
        {"bits": 2, "block": (8, 4), "zero_point": "integer"},
        {"algorithm": "gptq", "bits": 4},
        {"algorithm": "gptq", "block": (4, 8), "act_order": True, "clip": "mse", "zero_point": "integer"},
    ],
    ids=str,
)
def test_the_folder_holds_what_the_report_says(chosen, options, text, tmp_path):
    calibration = (text,) if chosen.get("algorithm") == "gptq" else ()
    options = dataclasses.replace(options, **chosen, calibration=calibration)
    seen = []
    report = quantize_model(
        str(small.llama()), tmp_path / "q", options, progress=lambda *step: seen.append(step)
    )
    assert seen == [(0, 2, ""), (1, 2, "model.layers.0"), (2, 2, "model.layers.1")]
    assert not (tmp_path / "q.partial").exists()
    # streamed layer by layer, and the model as anybody loads it
    assert report.perplexity_before == pytest.approx(perplexity(small.llama(), text), rel=1e-5)
    assert report.perplexity_after == pytest.approx(perplexity(tmp_path / "q", text), rel=1e-5)
    assert report.evaluation_tokens == 10 * (LENGTH - 1)
    stored, original = tensors_of(tmp_path / "q"), tensors_of(small.llama())
    kept = [key for key in original if not key.endswith("_proj.weight")]
    assert all(torch.equal(stored[key], original[key]) for key in kept)
    own = {key: tensor for key, tensor in stored.items() if key not in kept}
    assert {key.rpartition(".")[2] for key in own} <= {"codes", "scales", "offsets"}
    weights = sum(original[key].numel() for key in original if key not in kept)
    assert report.bits_per_weight == pytest.approx(8 * sum(t.nbytes for t in own.values()) / weights)
    assert report.bytes_after == sum(tensor.nbytes for tensor in stored.values())
    assert report.bytes_before == sum(tensor.nbytes for tensor in original.values())
    assert (report.quantized_weights, report.kept_weights) == (
        weights,
        sum(original[k].numel() for k in kept),
    )
    assert len(report.layers) == 14
    for layer in report.layers:
        weight = original[f"{layer.name}.weight"]
        bits, block = options.bits, options.spec.block
        from modicum.ops.affine import Grid

        grid = Grid(stored[f"{layer.name}.scales"], stored.get(f"{layer.name}.offsets"))
        value = decode(unpack(stored[f"{layer.name}.codes"], bits, weight.shape[1]), grid, bits, block)
        assert layer.shape == tuple(weight.shape)
        assert layer.weight_error == pytest.approx(float((value - weight).norm() / weight.norm()), rel=1e-4)
        assert 0 < layer.output_error < 1
    written = json.loads((tmp_path / "q" / "quantization_report.json").read_text())
    assert written == json.loads(json.dumps(dataclasses.asdict(report)))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "q")("cat").input_ids == small.tokenizer()("cat").input_ids
    )
    assert (tmp_path / "q" / "generation_config.json").is_file()
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "q").iterdir()} == {0o644}


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """The small model with half of each matrix pruned by magnitude."""
    folder = tmp_path_factory.mktemp("sparse") / "model"
    shutil.copytree(small.llama(), folder)
    tensors = load_file(folder / "model.safetensors")
    for key, weight in tensors.items():
        if key.endswith("_proj.weight"):
            weight[weight.abs() < weight.abs().median()] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "chosen",
    [
        {"algorithm": "gptq", "bits": 4, "zero_point": "integer"},
        {"algorithm": "gptq", "bits": 2, "zero_point": "none", "act_order": True, "clip": "mse"},
        {"algorithm": "mse", "bits": 3, "zero_point": "integer"},
        {"algorithm": "rtn", "bits": 4, "zero_point": "none", "block": (8, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("residuals", [False, True])
def test_zeros_stay_zeros(chosen, residuals, sparse, options, text, tmp_path):
    calibration = (text,) if chosen["algorithm"] == "gptq" else ()
    options = dataclasses.replace(
        options, **chosen, calibration=calibration, keep_zeros=True, keep_residuals=residuals
    )
    plan = quantize_model(str(sparse), tmp_path / "q", options, dry_run=True)
    report = quantize_model(str(sparse), tmp_path / "q", options)
    assert plan.bits_per_weight == report.bits_per_weight
    original, stored = tensors_of(sparse), tensors_of(tmp_path / "q")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    own = [t for key, t in stored.items() if key.endswith(("codes", "scales", "offsets", "residuals"))]
    assert report.bits_per_weight == pytest.approx(8 * sum(t.nbytes for t in own) / report.quantized_weights)
    for layer in report.layers:
        weight, module = original[f"{layer.name}.weight"], model.get_submodule(layer.name)
        pruned, value = weight == 0, module.dequantized()
        assert not value[pruned].any()
        assert layer.sparsity == pytest.approx(0.5, abs=0.01)
        assert layer.zeros == layer.zeros_kept == int(pruned.sum())
        assert module.spec.residuals is residuals
        if residuals:
            assert torch.equal(module.residuals == -128, pruned)
            assert (module.residuals[~pruned].abs() > 64).float().mean() > 0.2
            if chosen["algorithm"] != "gptq":
                steps = (weight - value) / module.grid().scales.float().abs().max()
                back = torch.sign(module.residuals.float()) * (steps.abs() > 0.05)
                assert torch.equal(back[~pruned], (torch.sign(steps) * (steps.abs() > 0.05))[~pruned])
        else:
            assert module.residuals is None
    assert report.zeros == report.zeros_kept == sum(layer.zeros for layer in report.layers)


def test_gptq_without_a_mask_fills_zeros_and_the_report_says_so(sparse, options, text, tmp_path):
    report = quantize_model(
        str(sparse), tmp_path / "q", with_gptq(options, text, bits=4, zero_point="integer")
    )
    assert 0.8 * report.zeros < report.zeros_kept < report.zeros


def test_without_evaluation_matrices_are_rounded_one_by_one(options, tmp_path):
    streamed = quantize_model(str(small.llama()), tmp_path / "a", options)
    plain = quantize_model(
        str(small.llama()), tmp_path / "b", dataclasses.replace(options, evaluate=False, eval_text=None)
    )
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert plain.perplexity_after is None
    assert plain.layers[0].output_error is None
    assert plain.layers[3].weight_error == streamed.layers[3].weight_error
    weight = tensors_of(small.llama())["model.layers.1.mlp.up_proj.weight"]
    grid = fit_grid(weight, 3, (1, GROUP), offset_dtype=torch.bfloat16)
    assert torch.equal(a["model.layers.1.mlp.up_proj.codes"], pack(encode(weight, grid, 3, (1, GROUP)), 3))


def test_gptq_is_fitted_to_the_inputs_that_quantized_layers_give(options, text, tmp_path):
    """The second layer's codes follow from a plain forward of the model whose first layer is quantized."""
    options = with_gptq(options, text)
    quantize_model(str(small.llama()), tmp_path / "q", options)
    model = AutoModelForCausalLM.from_pretrained(small.llama()).eval()
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    stored = tensors_of(tmp_path / "q")
    for name, module in list(model.model.layers[0].named_modules()):
        if isinstance(module, torch.nn.Linear):
            value = quantized.model.layers[0].get_submodule(name).dequantized()
            module.weight = torch.nn.Parameter(value)
    ids = calibration_sequences([text], small.tokenizer(), 12, LENGTH).ids
    for name in ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj"):
        linear, hessian = model.model.layers[1].get_submodule(name), None
        hessian = Hessian(linear.in_features)
        handle = linear.register_forward_pre_hook(lambda _m, args, h=hessian: h.add(args[0]))
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        want = gptq(linear.weight, hessian.matrix(), 3, (1, GROUP), offset_dtype=torch.bfloat16)
        codes = unpack(stored[f"model.layers.1.{name}.codes"], 3, linear.in_features)
        assert (codes == want.codes).float().mean() > 0.98


def test_gptq_loses_less_of_the_outputs_than_rounding(options, text, tmp_path):
    rounded = quantize_model(str(small.llama()), tmp_path / "a", options)
    fitted = quantize_model(str(small.llama()), tmp_path / "b", with_gptq(options, text))
    pairs = list(zip(rounded.layers, fitted.layers, strict=True))
    assert sum(b.output_error < a.output_error for a, b in pairs) >= 10
    assert all(b.weight_error > 0.9 * a.weight_error for a, b in pairs)
    assert fitted.calibration_tokens == 12 * LENGTH
    assert rounded.calibration is None


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("streamed", [True, False])
def test_an_interrupted_run_goes_on_where_it_was(step, streamed, options, text, tmp_path):
    options = with_gptq(options, text)
    if not streamed:
        options = dataclasses.replace(
            options, algorithm="mse", calibration=(), evaluate=False, eval_text=None
        )
    model, output = str(small.llama()), tmp_path / "q"
    whole = quantize_model(model, tmp_path / "whole", options)
    with pytest.raises(Stop):
        quantize_model(model, output, options, progress=stop_at(step))
    assert not output.exists()
    with pytest.raises(ConfigError, match=r"q\.partial holds an unfinished run; go on with --resume"):
        quantize_model(model, output, options)
    other = dataclasses.replace(options, bits=4, damping=0.5)
    with pytest.raises(ConfigError, match=r"other options: bits was 3, is 4; damping was 0\.01, is 0\.5"):
        quantize_model(model, output, other, resume=True)
    done = []
    resumed = quantize_model(model, output, options, resume=True, progress=lambda *s: done.append(s[0]))
    assert done == (list(range(step, 3)) if streamed else list(range(15)))
    assert files_of(output) == files_of(tmp_path / "whole")
    assert resumed.perplexity_after == whole.perplexity_after
    assert not (tmp_path / "q.partial").exists()


def test_a_resumed_run_keeps_what_is_finished_and_wants_the_same_text(options, text, tmp_path):
    output, work = tmp_path / "q", Work(tmp_path / "q")
    plain = dataclasses.replace(options, evaluate=False, eval_text=None)
    with pytest.raises(Stop):
        quantize_model(str(small.llama()), output, plain, progress=stop_at(2))
    (about,) = work.about("matrix-00000")
    tensors = {key: tensor.clone() for key, tensor in work.tensors("matrix-00000").items()}
    work.save("matrix-00000", tensors, [about | {"seconds": 1234.5}])
    assert quantize_model(str(small.llama()), output, plain, resume=True).layers[0].seconds == 1234.5
    file = shutil.copyfile(text, tmp_path / "text.txt")
    fitted = with_gptq(options, file)
    with pytest.raises(Stop):
        quantize_model(str(small.llama()), output, fitted, overwrite=True, progress=stop_at(1))
    file.write_text("another text; " * 90)
    with pytest.raises(ConfigError, match=r"other options: calibration tokens was '\w+', is '\w+'\. Resume"):
        quantize_model(str(small.llama()), output, fitted, resume=True, overwrite=True)


def test_a_killed_process_leaves_no_output(options, text, tmp_path):
    options, output = with_gptq(options, text), tmp_path / "q"
    quantize_model(str(small.llama()), tmp_path / "whole", options)
    script = f"""
        import os, signal
        from pathlib import Path, PosixPath, WindowsPath
        from modicum.compress.quantize import quantize_model
        from modicum.compress.quantize_report import QuantizeOptions

        def kill(done, total, name):
            if done == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        quantize_model({str(small.llama())!r}, {str(output)!r}, {options!r}, progress=kill)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not output.exists()
    quantize_model(str(small.llama()), output, options, resume=True)
    assert files_of(output) == files_of(tmp_path / "whole")


def test_a_run_that_lost_its_streams_begins_again(options, text, tmp_path):
    options, output = with_gptq(options, text), tmp_path / "q"
    quantize_model(str(small.llama()), tmp_path / "whole", options)
    with pytest.raises(Stop):
        quantize_model(str(small.llama()), output, options, progress=stop_at(1))
    (tmp_path / "q.partial" / "streams.safetensors").unlink()
    quantize_model(str(small.llama()), output, options, resume=True)
    assert files_of(output) == files_of(tmp_path / "whole")


def test_a_damaged_work_folder_says_so(options, tmp_path):
    output = tmp_path / "q"
    with pytest.raises(Stop):
        quantize_model(str(small.llama()), output, options, progress=stop_at(2))
    (tmp_path / "q.partial" / "layer-00000.safetensors").write_bytes(b"\0\0")
    with pytest.raises(CorruptAdapterError, match=r"layer-00000.* cannot be read.*start anew"):
        quantize_model(str(small.llama()), output, options, resume=True)
    assert not output.exists()
    quantize_model(str(small.llama()), output, options, overwrite=True)


def test_overwriting_replaces_the_whole_folder(options, tmp_path):
    output = tmp_path / "q"
    output.mkdir()
    (output / "old.txt").write_text("old")
    with pytest.raises(ConfigError, match=r"q exists already; choose another name or pass --overwrite"):
        quantize_model(str(small.llama()), output, options)
    assert [file.name for file in output.iterdir()] == ["old.txt"]
    quantize_model(str(small.llama()), output, options, overwrite=True)
    assert (output / "config.json").is_file()
    assert not (output / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def test_the_model_itself_is_never_overwritten(options, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(small.llama(), model)
    before = tensors_of(model).keys()
    with pytest.raises(ConfigError, match="the output is the model itself"):
        quantize_model(str(model), tmp_path / "x" / ".." / "model", options, overwrite=True)
    assert tensors_of(model).keys() == before


def test_a_model_that_overflows_has_no_perplexity(options, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(small.llama())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1e30
        model.model.layers[0].mlp.down_proj.weight *= 1e30
    folder = saved(model, tmp_path / "model")
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.mlp\.down_proj: the Hessian .* NaN or infinite"
    ):
        quantize_model(str(folder), tmp_path / "a", with_gptq(options, text))
    report = quantize_model(str(folder), tmp_path / "b", options)
    written = json.loads(
        (tmp_path / "b" / "quantization_report.json").read_text(), parse_constant=pytest.fail
    )
    assert report.perplexity_before is None
    assert written["perplexity_after"] is None


def test_a_plan_writes_nothing_and_tells_the_sizes(options, tmp_path):
    plan = quantize_model(str(small.llama()), tmp_path / "q", options, dry_run=True)
    assert list(tmp_path.iterdir()) == []
    done = quantize_model(str(small.llama()), tmp_path / "q", options)
    for name in ("bits_per_weight", "bytes_before", "bytes_after", "quantized_weights", "kept_weights"):
        assert getattr(plan, name) == getattr(done, name)
    assert [(p.name, p.bytes) for p in plan.layers] == [(d.name, d.bytes) for d in done.layers]
    assert plan.dry_run
    assert plan.layers[0].weight_error is None


FAMILIES = {
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 48}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "qwen3": ("Qwen3Config", {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    ),
    "phi": ("PhiConfig", {"intermediate_size": 48}),
    "mistral": ("MistralConfig", {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 6}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_decoders(family, options, text, tmp_path):
    name, shape = FAMILIES[family]
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, name)(
        vocab_size=101, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2, **(usual | shape),
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    folder = saved(model, tmp_path / "model")
    # opt, gemma2 and bloom tie it
    head = not config.tie_word_embeddings
    report = quantize_model(str(folder), tmp_path / "q", with_gptq(options, text, head=head))
    assert report.perplexity_before == pytest.approx(perplexity(folder, text), rel=1e-4)
    assert report.perplexity_after == pytest.approx(perplexity(tmp_path / "q", text), rel=1e-4)
    assert report.perplexity_after != pytest.approx(report.perplexity_before, rel=1e-4)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    found = [name for name, module in loaded.named_modules() if isinstance(module, AffineLinear)]
    assert found == [layer.name for layer in report.layers]
    assert (loaded.get_output_embeddings() is loaded.get_submodule(found[-1])) == head


def test_a_sharded_bfloat16_checkpoint_with_tied_embeddings(options, text, tmp_path):
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(small.llama()).config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    small.tokenizer().save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    report = quantize_model(str(tmp_path / "model"), tmp_path / "q", with_gptq(options, text))
    assert report.perplexity_after == pytest.approx(perplexity(tmp_path / "q", text), rel=1e-5)
    stored = tensors_of(tmp_path / "q")
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "lm_head.weight" not in stored
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "chosen",
    [
        {"algorithm": "gptq"},
        {"algorithm": "gptq", "block": (1, 8), "evaluate": False, "eval_text": None},
        {"algorithm": "mse", "bits": 2, "zero_point": "none"},
        {"evaluate": False, "eval_text": None, "zero_point": "integer"},
    ],
    ids=str,
)
def test_the_head_too(chosen, options, text, tmp_path):
    calibration = (text,) if chosen.get("algorithm") == "gptq" else ()
    options, model = dataclasses.replace(options, **chosen, calibration=calibration), str(small.llama())
    without = quantize_model(model, tmp_path / "without", options)
    options = dataclasses.replace(options, head=True)
    plan = quantize_model(model, tmp_path / "q", options, dry_run=True)
    report = quantize_model(model, tmp_path / "q", options)
    head, original, stored = report.layers[-1], tensors_of(small.llama()), tensors_of(tmp_path / "q")
    assert [layer.name for layer in plan.layers] == [layer.name for layer in report.layers]
    assert (head.name, head.shape, len(report.layers)) == ("lm_head", (101, 32), 15)
    assert plan.bytes_after == report.bytes_after == sum(tensor.nbytes for tensor in stored.values())
    assert report.quantized_weights == without.quantized_weights + 101 * 32
    assert report.bits_per_weight == pytest.approx(without.bits_per_weight)
    assert "lm_head.weight" not in stored
    # nothing else of the model depends on it
    others = tensors_of(tmp_path / "without")
    assert all(torch.equal(stored[key], others[key]) for key in others if not key.startswith("lm_head"))
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"] == []
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert isinstance(loaded.lm_head, AffineLinear)
    value, weight = loaded.lm_head.dequantized(), original["lm_head.weight"]
    assert head.weight_error == pytest.approx(float((value - weight).norm() / weight.norm()), rel=1e-4)
    if options.evaluate:
        assert report.perplexity_before == without.perplexity_before
        assert report.perplexity_after == pytest.approx(perplexity(tmp_path / "q", text), rel=1e-5)
        assert report.perplexity_after != pytest.approx(without.perplexity_after, rel=1e-4)
    # where text runs, the error of the outputs is measured on it
    assert (head.output_error is not None) == (options.evaluate or options.algorithm == "gptq")


def test_the_head_is_fitted_to_what_the_final_norm_gives(options, text, tmp_path):
    quantize_model(str(small.llama()), tmp_path / "q", with_gptq(options, text, head=True))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    hessian = Hessian(32)
    loaded.lm_head.register_forward_pre_hook(lambda _m, args: hessian.add(args[0]))
    with torch.no_grad():
        loaded(input_ids=calibration_sequences([text], small.tokenizer(), 12, LENGTH).ids)
    weight = tensors_of(small.llama())["lm_head.weight"]
    want = gptq(weight, hessian.matrix(), 3, (1, GROUP), offset_dtype=torch.bfloat16)
    assert (loaded.lm_head.unpacked_codes() == want.codes).float().mean() > 0.98


@pytest.mark.parametrize("step", [2, 3])
def test_a_run_cut_before_or_behind_the_head_goes_on(step, options, text, tmp_path):
    options = with_gptq(options, text, head=True)
    whole = quantize_model(str(small.llama()), tmp_path / "whole", options)
    with pytest.raises(Stop):
        quantize_model(str(small.llama()), tmp_path / "q", options, progress=stop_at(step))
    with pytest.raises(ConfigError, match="head was True, is False"):
        quantize_model(
            str(small.llama()), tmp_path / "q", dataclasses.replace(options, head=False), resume=True
        )
    resumed = quantize_model(str(small.llama()), tmp_path / "q", options, resume=True)
    assert files_of(tmp_path / "q") == files_of(tmp_path / "whole")
    assert resumed.perplexity_after == whole.perplexity_after


def test_a_quantized_head_generates_is_saved_and_left_out_by_classifiers(options, tmp_path):
    quantize_model(str(small.llama()), tmp_path / "q", dataclasses.replace(options, bits=4, head=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).dequantize()
    assert type(dense.lm_head) is torch.nn.Linear
    ids = torch.arange(4, 16).view(1, 12)
    written = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(written, dense.generate(ids, max_new_tokens=8, do_sample=False))
    model.save_pretrained(tmp_path / "again")
    a, b = tensors_of(tmp_path / "q"), tensors_of(tmp_path / "again")
    assert all(torch.equal(a[key], b[key]) for key in a)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16).eval()
    assert half.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 16)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert isinstance(classifier.model.layers[0].mlp.up_proj, AffineLinear)
    with torch.no_grad():
        want = model.model(ids).last_hidden_state
        assert torch.equal(classifier.model(ids).last_hidden_state, want)


@pytest.mark.parametrize("fmt", formats())
def test_a_quantized_head_is_exported(fmt, options, tmp_path):
    if fmt in ("gguf", "onnx", "openvino"):
        pytest.importorskip(fmt, reason=f"{fmt} is not installed")
    model: Any = LlamaForCausalLM(LlamaConfig(**export_cases.SIZES))
    model.save_pretrained(tmp_path / "model")
    export_cases.tokenizer().save_pretrained(tmp_path / "model")
    chosen = dataclasses.replace(
        options, bits=4, group_size=32, zero_point="integer", head=True, evaluate=False, eval_text=None
    )
    quantize_model(str(tmp_path / "model"), tmp_path / "q", chosen)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    codes = export_model(loaded, export_cases.tokenizer(), tmp_path / "out", fmt)
    loaded.set_submodule("lm_head", dense_linear(loaded.lm_head, torch.float32))
    dense = export_model(loaded, export_cases.tokenizer(), tmp_path / "dense", fmt)
    assert codes.exact
    # codes take a byte per weight less than any dense type, at least
    saved_bytes = sum(dense.files.values()) - sum(codes.files.values())
    assert saved_bytes > export_cases.VOCABULARY * export_cases.SIZES["hidden_size"]


def test_a_tied_head_is_refused_with_a_way_out_that_works(options, text, tmp_path):
    config = AutoModelForCausalLM.from_pretrained(small.llama()).config
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    folder, chosen = saved(model, tmp_path / "tied"), dataclasses.replace(options, head=True)
    with pytest.raises(ConfigError, match=r"lm_head is tied to the embedding.*untie it.*save_pretrained"):
        quantize_model(str(folder), tmp_path / "q", chosen)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    untied = saved(model, tmp_path / "untied")
    report = quantize_model(str(untied), tmp_path / "q", chosen)
    assert report.layers[-1].name == "lm_head"
    assert report.perplexity_before == pytest.approx(perplexity(folder, text), rel=1e-5)
    assert report.perplexity_after == pytest.approx(perplexity(tmp_path / "q", text), rel=1e-5)


def test_models_without_a_vocabulary_to_predict_have_no_head(options, tmp_path):
    folder = saved(models.bert(), tmp_path / "model")
    chosen = dataclasses.replace(options, algorithm="mse", bits=8, eval_text=None, head=True)
    with pytest.raises(ConfigError, match="has no output head over a vocabulary; leave --head out"):
        quantize_model(str(folder), tmp_path / "q", chosen)


def test_unfinished_runs_that_cannot_go_on_do_not_say_so(tmp_path):
    (tmp_path / "q.partial").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(
        ConfigError, match="unfinished run; start anew with --overwrite, or delete it"
    ) as caught:
        import_quantized(tmp_path / "model", tmp_path / "q")
    assert "--resume" not in str(caught.value)


def test_large_models_are_written_in_shards(options, tmp_path):
    quantize_model(str(small.llama()), tmp_path / "q", options)
    tensors = tensors_of(tmp_path / "q")
    sharded = tmp_path / "sharded"
    shutil.copytree(tmp_path / "q", sharded)
    (sharded / "model.safetensors").unlink()
    write_shards(sharded, tensors, most=20_000)
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) <= 20_000  # noqa: SIM118
    a, b = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path / "q", sharded))
    ids = torch.arange(4, 30).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(a(ids).logits, b(ids).logits)


def test_encoders_go_matrix_by_matrix(options, tmp_path):
    folder = saved(models.bert(), tmp_path / "model")
    options = dataclasses.replace(options, algorithm="mse", bits=8, eval_text=None)
    report = quantize_model(str(folder), tmp_path / "q", options)
    assert report.perplexity_after is None
    assert "no perplexity" in report.notes[0]
    names = [layer.name for layer in report.layers]
    assert "bert.encoder.layer.1.output.dense" in names
    assert "classifier" not in names
    ids = models.tokens()
    a, b = (
        AutoModelForSequenceClassification.from_pretrained(path).eval() for path in (folder, tmp_path / "q")
    )
    with torch.no_grad():
        torch.testing.assert_close(a(ids).logits, b(ids).logits, rtol=0.1, atol=0.1)
    with pytest.raises(ConfigError, match=r"gptq needs a causal language model.*mse or rtn"):
        quantize_model(str(folder), tmp_path / "p", dataclasses.replace(options, algorithm="gptq"))


def test_the_layers_of_gpt2_are_refused(options, tmp_path):
    folder = saved(models.gpt2(), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"transposed Conv1D modules \(transformer\.h\.0\.attn\.c_attn"):
        quantize_model(str(folder), tmp_path / "q", options)


def test_joined_experts_are_refused_with_a_way_out(options, tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    folder = saved(transformers.MixtralForCausalLM(config), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"does not store .*experts.*without evaluation"):
        quantize_model(str(folder), tmp_path / "q", options)
    plain = dataclasses.replace(options, evaluate=False, eval_text=None)
    report = quantize_model(str(folder), tmp_path / "q", plain, overwrite=True)
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_excluded_layers_stay_as_they_are(options, tmp_path):
    chosen = dataclasses.replace(options, exclude=("down_proj", r".*layers\.0\.self_attn.*"))
    report = quantize_model(str(small.llama()), tmp_path / "q", chosen)
    names = {layer.name for layer in report.layers}
    assert len(names) == 14 - 2 - 4
    stored = tensors_of(tmp_path / "q")
    assert "model.layers.1.mlp.down_proj.weight" in stored
    assert "model.layers.0.self_attn.q_proj.weight" in stored
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    assert "model.layers.0.self_attn.q_proj" in model.config.quantization_config.modules_to_not_convert
    with pytest.raises(
        ConfigError, match=r"exclude: no linear layer matches 'dwn_proj'.*did you mean 'down_proj'"
    ):
        quantize_model(
            str(small.llama()), tmp_path / "p", dataclasses.replace(options, exclude=("dwn_proj",))
        )


def test_everything_wrong_is_said_at_once(options, text, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(small.llama(), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    wrong = dataclasses.replace(
        options, algorithm="gptq", bits=5, group_size=32, sequences=0, sequence_length=500, damping=-1.0,
        scale_dtype="float8", exclude=("nothing",), eval_text=tmp_path / "absent.txt",
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        quantize_model(str(broken), tmp_path / "taken", wrong)
    for part in (
        "bits = 5, must be one of 2, 3, 4, 8",
        "sequences = 0, must be at least 1",
        "damping = -1.0",
        "scale_dtype = 'float8'",
        "taken exists already",
        "exclude: no linear layer matches 'nothing'",
        "groups of 32 inputs do not divide model.layers.0.mlp.down_proj (48)",
        "sizes that divide all layers: 1, 2, 4, 8, 16",
        "sequence_length = 500, the model takes at most 128 tokens",
        "NaN or infinite weights in model.layers.0.self_attn.q_proj, model.layers.1.mlp.up_proj",
    ):
        assert part in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "short.txt").write_text("so it goes")
    texts = with_gptq(options, tmp_path / "short.txt", eval_text=tmp_path / "absent.txt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        quantize_model(str(small.llama()), tmp_path / "q", texts)
    for part in (
        "short.txt has 12 tokens, which is too short: one sequence takes 24",
        "absent.txt cannot be read",
    ):
        assert part in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_less_text_than_was_asked_for_is_noted(options, text, tmp_path):
    (tmp_path / "short.txt").write_text("a little text\n" * 6)
    chosen = with_gptq(options, tmp_path / "short.txt")
    report = quantize_model(str(small.llama()), tmp_path / "q", chosen)
    assert report.calibration_tokens == 3 * LENGTH
    assert report.notes == [
        "calibrated on 3 sequences of 24 tokens, all that the text holds; 12 were asked for"
    ]
    assert (
        quantize_model(str(small.llama()), tmp_path / "p", with_gptq(options, text), dry_run=True).notes == []
    )


def test_a_data_set_calibrates_too(options, tmp_path):
    """A folder stands for a data set on the hub, which `datasets` reads alike."""
    (tmp_path / "set").mkdir()
    small.write_jsonl(tmp_path / "set" / "train.jsonl", [{"text": f"a little text {n}"} for n in range(50)])
    name = f"hub:{tmp_path / 'set'}"
    report = quantize_model(str(small.llama()), tmp_path / "q", with_gptq(options, name))
    assert report.calibration == name
    assert report.options["calibration"] == [name]
    assert report.calibration_tokens == 12 * LENGTH


def test_a_tokenizer_of_another_model_is_refused(options, text, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small.llama(), folder)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, vocab_size=64)).save_pretrained(folder)
    with pytest.raises(ConfigError, match="the model knows 64: they do not belong together"):
        quantize_model(str(folder), tmp_path / "q", with_gptq(options, text))


def test_what_is_quantized_already_is_refused(options, tmp_path):
    quantize_model(str(small.llama()), tmp_path / "q", options)
    with pytest.raises(ConfigError, match=r"is quantized already \(modicum\).*both errors"):
        quantize_model(str(tmp_path / "q"), tmp_path / "p", options)
    with pytest.raises(ConfigError, match=r"bits = 7.*|quantized already.*bits = 7"):
        quantize_model(str(tmp_path / "q"), tmp_path / "p", dataclasses.replace(options, bits=7))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"algorithm": "gtpq"}, "did you mean 'gptq'"),
        ({"act_order": True}, "act_order is an option of gptq, not of rtn"),
        ({"calibration": (Path("x"),)}, "rtn needs no calibration text"),
        ({"zero_point": "integer", "offset_dtype": "bfloat16"}, "needs offset_dtype"),
        ({"block": (0, 4)}, "must be positive"),
        (
            {"block": (5, 4)},
            r"blocks of 5 outputs do not divide .*; sizes that divide all layers: 1, 2, 4, 8, 16",
        ),
        ({"evaluate": False}, "an evaluation text without evaluation"),
        ({"exclude": (".*",)}, "no linear layer is left"),
        ({"head": True, "exclude": ("lm_head",)}, "--head asks for lm_head, --exclude leaves it out"),
        (
            {"head": True, "block": (8, 4)},
            r"blocks of 8 outputs do not divide lm_head \(101\); .*or leave --head out",
        ),
        (
            {"keep_zeros": True, "keep_residuals": True},
            r"keep_zeros and keep_residuals: needs grids that hold 0, zero_point = 'integer' or 'none'",
        ),
        ({"keep_residuals": True, "algorithm": "int8"}, "keep_residuals: an option of gptq, mse and rtn"),
        ({"head": True, "algorithm": "nf4"}, "nf4 .* keeps the output head in full precision; gptq, mse and"),
        ({"head": True, "algorithm": "int8"}, "int8 .* keeps the output head in full precision"),
    ],
)
def test_options_that_contradict(chosen, said, options, tmp_path):
    with pytest.raises(ConfigError, match=said):
        quantize_model(str(small.llama()), tmp_path / "q", dataclasses.replace(options, **chosen))
    assert list(tmp_path.iterdir()) == []


def test_one_layer_is_in_memory_at_a_time():
    with Source(str(small.llama())) as source:
        stack = Stack(source)
        ids = torch.arange(4, 28).view(2, 12)
        (hidden,) = stack.enter(ids)
        assert all(parameter.is_meta for parameter in stack.model.parameters())
        want = AutoModelForCausalLM.from_pretrained(small.llama()).eval()
        with torch.no_grad():
            states = want(ids, output_hidden_states=True).hidden_states
        for index in range(2):
            torch.testing.assert_close(hidden, states[index], rtol=1e-5, atol=1e-5)
            with stack.layer(index) as layer:
                loaded = {id(p) for p in stack.model.parameters() if not p.is_meta}
                assert loaded == {id(parameter) for parameter in layer.parameters()}
                stack.advance(index, hidden)
        with torch.no_grad():
            loss = float(want(ids, labels=ids).loss)
        assert stack.loss(ids, hidden) == pytest.approx(loss, rel=1e-5)
        assert all(parameter.is_meta for parameter in stack.model.parameters())


def test_layer_names_are_found_in_causal_models_only():
    assert layer_names(models.llama()) == ["model.layers.0", "model.layers.1"]
    assert layer_names(models.gpt2()) == ["transformer.h.0", "transformer.h.1"]
    assert layer_names(models.bert()) == []


@pytest.mark.parametrize("algorithm", ["nf4", "int8"])
def test_formats_of_bitsandbytes(algorithm, options, text, tmp_path):
    pytest.importorskip("bitsandbytes")
    chosen = QuantizeOptions(
        algorithm=algorithm, sequence_length=LENGTH, eval_text=text, eval_sequences=10, exclude=("down_proj",)
    )
    report = quantize_model(str(small.llama()), tmp_path / "q", chosen)
    assert 0 < report.layers[0].weight_error < 0.25
    assert report.perplexity_before == pytest.approx(perplexity(small.llama(), text), rel=1e-5)
    stored = tensors_of(tmp_path / "q")
    assert report.bytes_after == sum(tensor.nbytes for tensor in stored.values())
    assert report.bits_per_weight > (4 if algorithm == "nf4" else 8)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "q").config.quantization_config is not None
    assert "model.layers.0.mlp.down_proj.weight" in stored
    with pytest.raises(ConfigError, match=f"{algorithm} has a layout of its own, without bits, group_size"):
        quantize_model(str(small.llama()), tmp_path / "p", dataclasses.replace(options, algorithm=algorithm))


def test_double_quantization_saves_what_it_should(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = export_cases.SIZES | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    export_cases.tokenizer().save_pretrained(tmp_path / "model")
    reports = {}
    for double in (True, False):
        options = QuantizeOptions(algorithm="nf4", double_quant=double, evaluate=False)
        reports[double] = quantize_model(str(tmp_path / "model"), tmp_path / str(double), options)
        assert reports[double].options == {"algorithm": "nf4", "double_quant": double, "exclude": []}
        written = json.loads((tmp_path / str(double) / "config.json").read_text())["quantization_config"]
        assert written["bnb_4bit_use_double_quant"] is double
    # a scale of 32 bits for 64 weights, against one of 8 and one of 32 for 256 of those and their table
    assert 0.2 < reports[False].bits_per_weight - reports[True].bits_per_weight < 0.375


@pytest.mark.parametrize("algorithm", ["nf4", "int8"])
def test_without_bitsandbytes_its_formats_name_the_extra(algorithm, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(
        MissingExtraError,
        match=rf"the algorithm {algorithm} needs bitsandbytes.*pip install 'modicum\[quant\]'",
    ):
        quantize_model(str(small.llama()), tmp_path / "q", QuantizeOptions(algorithm=algorithm))
    assert list(tmp_path.iterdir()) == []


def test_a_cut_run_of_bitsandbytes_leaves_no_output_and_starts_anew(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    options = QuantizeOptions(algorithm="nf4", evaluate=False)

    def full(*_: object):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        # the model is in the work folder by then
        patch.setattr("modicum.compress.bitsandbytes._layers", full)
        with pytest.raises(OSError, match="no space"):
            quantize_model(str(small.llama()), tmp_path / "q", options)
    assert [left.name for left in tmp_path.iterdir()] == ["q.partial"]
    with pytest.raises(ConfigError, match=r"q\.partial holds an unfinished run; start anew with --overwrite"):
        quantize_model(str(small.llama()), tmp_path / "q", options)
    quantize_model(str(small.llama()), tmp_path / "q", options, overwrite=True)
    assert [left.name for left in tmp_path.iterdir()] == ["q"]


@pytest.mark.shared_data
def test_the_embedded_model_on_stories(shared_data, tmp_path):
    import gzip

    for name, size in (("train", 400_000), ("valid", 60_000)):
        with gzip.open(shared_data / "tinystories" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
            (tmp_path / f"{name}.txt").write_text(file.read(size), encoding="utf-8")
    usual = {"bits": 3, "group_size": 64, "sequence_length": 128, "eval_text": tmp_path / "valid.txt",
             "eval_sequences": 32}  # fmt: skip
    lost = {}
    for algorithm, more in (
        ("rtn", {}),
        ("gptq", {"calibration": (tmp_path / "train.txt",), "sequences": 64}),
    ):
        options = QuantizeOptions(algorithm=algorithm, **usual, **more)
        report = quantize_model("embedded", tmp_path / algorithm, options)
        lost[algorithm] = report.perplexity_after - report.perplexity_before
    assert 0 < lost["gptq"] < 0.6 * lost["rtn"]
