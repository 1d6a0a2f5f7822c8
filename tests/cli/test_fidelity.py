"""`modicum fidelity`: models from folders, the base they name, and what is refused."""

from __future__ import annotations

import json

import pytest
from tests import models_for_tests as models
from tests.cli.adapter_files import make_files, run, tokenizer

SHORT = ("--sequence-length", 6, "--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    made = make_files(tmp_path_factory.mktemp("fidelity"))
    made.text.write_text("w1 w5 w9 w2 w7 w3 w3 w8 w20 w40 w11 w60 " * 20)
    return made


def test_a_quantized_model_is_compared_with_what_it_was_made_from(files, tmp_path, capsys):
    low = tmp_path / "low"
    options = ["--bits", 4, "--group-size", 16, "--algorithm", "rtn", "--no-eval"]
    assert run(capsys, "quantize", files.base, "--output", low, *options).code == 0
    words = ["fidelity", low, "--text", files.text, *SHORT]
    found = run(capsys, *words, "--output", tmp_path / "out" / "fidelity.json", "--json").json
    assert (found["model"], found["base"], found["text"]) == (str(low), str(files.base), str(files.text))
    assert found["kl"]["low"] < found["kl"]["value"] < found["kl"]["high"]
    assert found["tokens"] == 5 * found["sequences"]
    assert json.loads((tmp_path / "out" / "fidelity.json").read_text()) == found
    shown = run(capsys, *words, "--layers")
    assert shown.code == 0
    parts = [
        "KL divergence",
        "same likeliest token",
        "bits per weight",
        "worst",
        "model.layers.1.mlp.up_proj",
    ]
    for part in parts:
        assert part in shown.out, part


def test_adapters(files, capsys):
    words = ["fidelity", files.base, "--base", files.base, "--text", files.text, *SHORT, "--json"]
    assert run(capsys, *words).json["kl"]["value"] == 0
    kinds = [run(capsys, *words, "--adapter", adapter).json for adapter in (files.record, files.peft)]
    assert kinds[0]["kl"]["value"] == pytest.approx(kinds[1]["kl"]["value"], rel=1e-3)
    assert kinds[0]["kl"]["value"] > 0
    # the base of an adapter is the model that it is put on
    words = ["fidelity", files.base, "--adapter", files.record, "--text", files.text, *SHORT, "--json"]
    alone = run(capsys, *words).json
    assert (alone["base"], alone["kl"]["value"]) == (str(files.base), kinds[0]["kl"]["value"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{base}"], "nothing says what {base} was made from: name it with --base"),
        (["{base}", "--base", "{base}x"], "no model"),
        (["{base}", "--base", "{base}", "--text", "{base}x"], "cannot be read"),
        (["{base}", "--base", "{base}", "--dtype", "bfloat"], "did you mean 'bfloat16'"),
        (["{base}", "--base", "{base}", "--device", "tpu"], "no device 'tpu' here"),
        (["{base}", "--base", "{base}", "--sequence-length", "65"], "sequences of up to 64 tokens, not 65"),
        (["{other}", "--base", "{base}"], "have other tokenizers"),
    ],
)
def test_bad_input(files, tmp_path, words, told, capsys):
    named = {"base": files.base, "other": tmp_path / "other"}
    models.llama().save_pretrained(named["other"])
    words_of = tokenizer()
    words_of.add_tokens(["more"])
    words_of.save_pretrained(named["other"])
    text = [] if "--text" in words else ["--text", files.text]
    length = [] if "--sequence-length" in words else ["--sequence-length", 6]
    done = run(capsys, "fidelity", *(word.format(**named) for word in words), *text, *length)
    assert done.code == 1
    assert told.format(**named) in done.err
