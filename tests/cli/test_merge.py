"""`modicum merge`: measured on real tokens, refused when it would lose the adapter, a normal model folder."""

from __future__ import annotations

import re

import pytest
import torch
from tests import models_for_tests as models
from tests.cli.adapter_files import make_files, run, tokenizer, trained
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import modicum
from modicum.store.files import save_adapter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def words(files, output, adapter=None):
    return ["merge", "--model", files.base, "--adapter", adapter or files.record, "--output", output,
            "--text", files.text]  # fmt: skip


def test_a_merged_model_is_a_normal_model(files, tmp_path, capsys):
    out = tmp_path / "merged"
    tried = run(capsys, *words(files, out), "--dry-run", "--json")
    assert tried.code == 0, tried.out
    assert not out.exists()
    done = run(capsys, *words(files, out), "--json").json
    assert done["exact"]
    assert done["report"]["logit_error"] < 1e-5
    assert done["report"]["tokens"] == 12
    assert done["report"]["effect"] > 0.1
    assert done["report"] == tried.json["report"]
    assert "tokenizer.json" in done["files"]
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(merged(models.tokens()).logits, files.wanted, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out)("w1 w2").input_ids == [4, 5]
    again = run(capsys, *words(files, out))
    assert again.code == 1
    assert "exists already" in again.err


def test_a_smaller_type_is_measured_and_may_be_refused(files, tmp_path, capsys):
    done = run(capsys, *words(files, tmp_path / "good"), "--dtype", "bfloat16")
    assert done.code == 0, done.err
    assert "exact up to rounding for bfloat16" in done.out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "good").dtype == torch.bfloat16
    tiny = save_adapter(trained(models.llama(), size=1e-4), tmp_path / "tiny").path
    refused = run(capsys, *words(files, tmp_path / "bad", tiny), "--dtype", "bfloat16")
    assert refused.code == 1
    for text in ("of the adapter's effect", "--dtype float32", "--allow-inexact"):
        assert text in refused.err
    assert not (tmp_path / "bad").exists()
    forced = run(capsys, *words(files, tmp_path / "bad", tiny), "--dtype", "bfloat16", "--allow-inexact")
    assert forced.code == 0
    assert "INEXACT" in forced.out


def test_a_quantized_base_takes_what_fits_and_says_what_the_rest_costs(files, tmp_path, capsys):
    base = tmp_path / "q4"
    made = run(
        capsys,
        "quantize",
        files.base,
        "--output",
        base,
        "--group-size",
        16,
        "--algorithm",
        "rtn",
        "--no-eval",
    )
    assert made.code == 0, made.err
    adapters = {}
    for name, config in (
        ("qa", modicum.QALoraConfig(r=4, pool=16, init_weights=False)),
        ("xs", modicum.LoraXSConfig(r=4, alpha=6.0)),
    ):
        adapters[name] = save_adapter(
            trained(AutoModelForCausalLM.from_pretrained(base), config), tmp_path / name
        ).path

    def merge(name, *more):
        return run(capsys, "merge", "--model", base, "--adapter", adapters[name], "--output", tmp_path / "merged",
                   "--text", files.text, *more)  # fmt: skip

    exact = merge("qa", "--dry-run")
    assert exact.code == 0, exact.err
    for said in ("exact up to rounding for 4-bit affine", "error of the logits", "6 before, 7 after"):
        assert said in exact.out
    lost = {kind: re.search(rf"with {kind} offsets\W+([\d.]+)% of the update would be lost", exact.out) for kind in
            ("float16", "bfloat16", "integer")}  # fmt: skip
    assert float(lost["float16"][1]) < float(lost["bfloat16"][1]) < float(lost["integer"][1])
    refused = merge("xs")
    assert refused.code == 1
    for said in (
        "cannot take this adapter exactly",
        "--dtype bfloat16",
        "--allow-inexact",
        "Nothing was written",
    ):
        assert said in refused.err
    assert not (tmp_path / "merged").exists()
    forced = merge("xs", "--allow-inexact")
    assert forced.code == 0, forced.err
    assert "INEXACT for low-bit, quantized again" in forced.out
    assert float(re.search(r"lost by merging\W+([\d.]+)% of that", forced.out)[1]) > 1
    assert "would be lost" not in forced.out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.quantization_config.bits == 4


def test_a_lora_folder_of_peft_is_merged_too(files, tmp_path, capsys):
    done = run(capsys, *words(files, tmp_path / "merged", files.lora), "--json")
    assert done.code == 0, done.out
    assert done.json["report"]["logit_error"] < 1e-5


def test_a_classifier_keeps_its_head(tmp_path, capsys):
    models.bert().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "t.txt").write_text("w1 w5 w9\nw2 w2 w2 w2\n")
    model = trained(models.bert(), modicum.LoraXSConfig(r=4, task_type="SEQ_CLS"))
    path = save_adapter(model, tmp_path / "a").path
    done = run(capsys, "merge", "--model", tmp_path / "base", "--adapter", path, "--output", tmp_path / "m",
               "--text", tmp_path / "t.txt", "--json")  # fmt: skip
    assert done.code == 0, done.out
    assert done.json["report"]["tokens"] == 2  # rows, for a classifier
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        wanted = model(input_ids=models.tokens()).logits
        torch.testing.assert_close(merged(models.tokens()).logits, wanted, rtol=1e-4, atol=1e-4)


def test_faults_are_named(files, tmp_path, capsys):
    assert (
        "no dtype 'bfloat' (did you mean 'bfloat16'"
        in run(capsys, *words(files, tmp_path / "m"), "--dtype", "bfloat").err
    )
    (tmp_path / "empty.txt").write_text("\n")
    bad = [*words(files, tmp_path / "m")[:-1], tmp_path / "empty.txt"]
    assert "no text" in run(capsys, *bad).err
    assert (
        "no model" in run(capsys, "merge", "--model", tmp_path / "no", *words(files, tmp_path / "m")[3:]).err
    )
