"""`modicum bench`: which models are compared, with which baseline, and what is said about it."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tests import models_for_tests as models
from tests.cli.adapter_files import make_files, run, trained

import modicum
from modicum.evaluate.arms import Arm, choose, load
from modicum.quant.affine import AffineLinear
from modicum.quant.huggingface import AffineConfig, quantize_linears

SHORT = ("--prompt", 4, "--generate", 2, "--repeats", 3, "--warm-up", 0, "--threads", 1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def edited(folder, **values):
    """Write `values` into the config.json of `folder`."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def test_a_model_against_a_baseline(files, tmp_path, capsys):
    models.gpt2().save_pretrained(tmp_path / "other")
    words = ["bench", tmp_path / "other", "--baseline", files.base, *SHORT]
    found = run(capsys, *words, "--output", tmp_path / "out" / "times.json", "--json").json
    assert found["baseline"] == str(files.base)
    assert [model["name"] for model in found["models"]] == [str(files.base), str(tmp_path / "other")]
    assert {model["dtype"] for model in found["models"]} == {"bfloat16"}
    assert found["machine"]["threads"] == 1
    assert found["models"][0]["weight_bytes"] > 2 * sum(p.numel() for p in models.llama().parameters())
    assert json.loads((tmp_path / "out" / "times.json").read_text()) == found
    shown = run(capsys, *words)
    assert shown.code == 0
    for part in (
        "prefill ms",
        "decode ms/token",
        "batch 1",
        "1 threads",
        f"against the baseline {files.base}",
    ):
        assert part in shown.out, part


def test_an_extracted_model_is_compared_with_its_base(files, tmp_path, capsys):
    models.llama(seed=1).save_pretrained(tmp_path / "small")
    edited(tmp_path / "small", modicum={"sub_network": {"widths": {}}, "base_model": str(files.base)})
    found = run(capsys, "bench", tmp_path / "small", *SHORT, "--json").json
    assert found["baseline"] == str(files.base)
    assert found["models"][1]["kind"] == "dense sub-network"
    *_, reason = found["sentences"]
    assert f"{files.base} is the baseline because {tmp_path / 'small'} was made from it" in reason
    # named twice in different ways, it is one model
    same = files.folder / "." / "base"
    arms, baseline, _ = choose([str(same), str(tmp_path / "small")], [], None, random=False)
    assert ([arm.name for arm in arms], baseline) == ([str(same), str(tmp_path / "small")], str(same))


def test_a_quantized_model_is_compared_with_its_original(files, tmp_path, capsys):
    low = tmp_path / "low"
    options = ["--bits", 4, "--group-size", 16, "--algorithm", "rtn", "--no-eval"]
    assert run(capsys, "quantize", files.base, "--output", low, *options).code == 0
    found = run(capsys, "bench", low, *SHORT, "--json").json
    assert found["baseline"] == str(files.base)
    base, quantized = found["models"]
    assert quantized["kind"] == "quantized (modicum)"
    assert quantized["weight_bytes"] < base["weight_bytes"]


def test_unmerged_adapters(files, capsys):
    found = run(
        capsys, "bench", files.base, "--adapter", files.record, "--adapter", files.lora, *SHORT, "--json"
    ).json
    kinds = {model["name"]: model["kind"] for model in found["models"]}
    unmerged = "dense with an adapter that is not merged"
    assert kinds == {str(files.base): "dense", str(files.record): unmerged, str(files.lora): unmerged}
    assert found["baseline"] == str(files.base)
    assert "stands for the merged model" in found["sentences"][-1]
    words = ["bench", files.base, "--adapter", files.record, "--baseline", files.record, *SHORT]
    against = run(capsys, *words, "--json").json
    assert against["baseline"] == str(files.record)
    assert "carries an adapter that is not merged" in against["sentences"][-1]


def test_an_adapter_folder_that_names_its_base(files, tmp_path, capsys):
    model = trained(models.llama(), modicum.LoraXSConfig(r=2))
    model.peft_config["default"].base_model_name_or_path = str(files.base)
    model.save_pretrained(tmp_path / "adapter")
    found = run(capsys, "bench", tmp_path, *SHORT, "--json").json
    assert [m["name"] for m in found["models"]] == [str(files.base), str(tmp_path)]
    assert "not merged" in found["models"][1]["kind"]
    told = run(capsys, "bench", files.peft, *SHORT).err
    assert f"`modicum bench MODEL --adapter {files.peft}`" in told


def test_shapes_without_weights(files, tmp_path, capsys):
    models.llama().config.save_pretrained(tmp_path / "shape")
    words = ["bench", tmp_path / "shape", "--baseline", files.base, "--random", *SHORT]
    assert '"architectures": ["LlamaForCausalLM"]' in run(capsys, *words).err
    edited(tmp_path / "shape", architectures=["LlamaForCausalLM"])
    for place in (tmp_path / "shape", files.base / "config.json"):
        refused = run(capsys, "bench", place, "--baseline", files.base, *SHORT)
        assert refused.code == 1
        assert "configuration without weights; --random" in refused.err
        found = run(capsys, "bench", place, "--baseline", files.base, "--random", *SHORT, "--json").json
        sizes = [model["weight_bytes"] for model in found["models"]]
        assert sizes[0] == sizes[1]


def test_random_models_have_the_class_and_the_layers_of_their_configuration(tmp_path):
    models.bert().config.save_pretrained(tmp_path / "bert")
    edited(tmp_path / "bert", architectures=["BertForSequenceClassification"])
    made = load(Arm("b", str(tmp_path / "bert"), random=True), "bfloat16", "cpu")
    assert type(made).__name__ == "BertForSequenceClassification"
    assert made.dtype == torch.bfloat16
    low = models.llama()
    quantize_linears(low, AffineConfig(bits=4, group_size=16))
    low.config.quantization_config = AffineConfig.of(low)
    low.config.save_pretrained(tmp_path / "low")
    edited(tmp_path / "low", architectures=["LlamaForCausalLM"])
    made = load(Arm("q", str(tmp_path / "low"), random=True), "bfloat16", "cpu")
    assert isinstance(made.model.layers[0].mlp.up_proj, AffineLinear)
    assert made.model.layers[0].mlp.up_proj.spec.block == (1, 16)
    edited(tmp_path / "low", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(modicum.errors.ConfigError, match="quantized by 'gptq'"):
        load(Arm("q", str(tmp_path / "low"), random=True), "bfloat16", "cpu")


def test_encoders(files, tmp_path, capsys):
    models.bert(num_labels=5).save_pretrained(tmp_path / "bert")
    found = run(capsys, "bench", tmp_path / "bert", "--baseline", files.base, *SHORT, "--json").json
    assert found["models"][1]["decode"] is None
    assert "prefill only" in " ".join(found["notes"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{base}"], "no baseline can be derived"),
        (["{base}", "--baseline", "{base}"], "at least two models"),
        (["{base}", "{lora}x", "--baseline", "{base}"], "no model"),
        (["{record}"], "name an adapter with --adapter"),
        (["{base}", "--adapter", "{record}", "--prompt", "64"], "sequences of up to 64 tokens, not 66"),
        (["{base}", "--adapter", "{record}", "--dtype", "bfloat"], "did you mean 'bfloat16'"),
        (["{base}", "--adapter", "{record}", "--device", "tpu"], "no device 'tpu' here"),
        (["{base}", "--adapter", "{record}", "--repeats", "1", "--batch", "0"], "batch = 0, must be at least 1; rep"),
    ],
)  # fmt: skip
def test_bad_input(files, words, told, tmp_path, capsys):
    named = {"base": files.base, "lora": files.lora, "record": files.record}
    out = tmp_path / "times.json"
    done = run(capsys, "bench", *SHORT, *(word.format(**named) for word in words), "--output", out)
    assert done.code == 1
    assert told in done.err
    assert not out.exists()


def test_models_from_different_bases_need_a_baseline(files, tmp_path, capsys):
    for name in ("a", "b"):
        models.llama().save_pretrained(tmp_path / name)
        models.llama().save_pretrained(tmp_path / f"{name}-base")
        edited(tmp_path / name, modicum={"sub_network": {}, "base_model": str(tmp_path / f"{name}-base")})
    told = run(capsys, "bench", tmp_path / "a", tmp_path / "b", *SHORT).err
    assert "were made from different ones" in told
    assert "a-base" in told
    assert "b-base" in told


def test_more_threads_than_cores_are_noted(files, capsys):
    threads = len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() + 1
    words = ["bench", files.base, "--adapter", files.record, *SHORT, "--threads", threads]
    assert f"note: {threads} threads on" in run(capsys, *words).out
