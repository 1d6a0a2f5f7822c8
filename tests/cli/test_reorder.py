"""`modicum reorder`: a table for people, one object for programs."""

from __future__ import annotations

from tests import models_for_tests as models
from tests.cli.adapter_files import run, tokenizer


def test_reorder_writes_a_model_and_says_what_the_first_units_hold(tmp_path, capsys):
    base = tmp_path / "base"
    models.llama().save_pretrained(base)
    tokenizer().save_pretrained(base)
    short = ["--sequences", "4", "--sequence-length", "16"]
    done = run(capsys, "reorder", base, "--output", tmp_path / "out", "--kind", "mlp", *short, "--json")
    assert done.code == 0, done.err
    assert [width["name"] for width in done.json["widths"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    shown = run(capsys, "reorder", base, "--output", tmp_path / "two", *short)
    assert shown.code == 0, shown.err
    assert "heads" in shown.out
    assert "50%" in shown.out
    wrong = run(capsys, "reorder", base, "--output", tmp_path / "two", "--kind", "head")
    assert wrong.code == 1
    assert "did you mean 'heads'" in wrong.err
    assert "exists already" in wrong.err
