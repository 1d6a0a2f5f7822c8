"""`modicum sparsify`: plan, run, resume, table and JSON, errors that leave nothing behind."""

from __future__ import annotations

import json

import pytest
import torch
from tests import small_checkpoints as small
from tests.cli.adapter_files import run
from transformers import AutoModelForCausalLM


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("so it goes, on and on; " * 30, encoding="utf-8")
    return file


def words(text, output, *more):
    return [
        "sparsify",
        small.llama(),
        "--output",
        output,
        "--sequence-length",
        24,
        "--eval-text",
        text,
        *more,
    ]


def test_a_plan_then_the_model(text, tmp_path, capsys):
    out = tmp_path / "s"
    chosen = ["--calibration", text, "--sequences", 9, "--sparsity", 0.25, "--ratio", "up_proj=0.75",
              "--ratio", "q_proj,k_proj=0", "--exclude", "down_proj"]  # fmt: skip
    plan = run(capsys, *words(text, out, *chosen, "--dry-run", "--json"))
    assert plan.code == 0, plan.out
    assert not out.exists()
    assert plan.json["dry_run"]
    assert len(plan.json["layers"]) == 12
    done = run(capsys, *words(text, out, *chosen, "--json"))
    assert done.code == 0, done.out
    assert "sparsify 2/2 model.layers.1" in done.err
    assert done.json["sparsity"] == plan.json["sparsity"]
    assert done.json["options"]["ratios"] == {"up_proj": 0.75, "q_proj,k_proj": 0}
    assert done.json == json.loads((out / "sparsity_report.json").read_text())
    layer = AutoModelForCausalLM.from_pretrained(out).model.layers[1]
    shares = {"mlp.up_proj": 0.75, "mlp.gate_proj": 0.25, "mlp.down_proj": 0, "self_attn.k_proj": 0}
    for name, share in shares.items():
        assert (layer.get_submodule(name).weight == 0).float().mean() == share


def test_the_table(text, tmp_path, capsys):
    shown = run(capsys, *words(text, tmp_path / "s", "--algorithm", "magnitude", "--pattern", "2:4"))
    assert shown.code == 0, shown.err
    for part in ("sparsity", "0.5000", "perplexity", "->", "seconds", "model.layers.1.mlp.down_proj"):
        assert part in shown.out
    again = run(capsys, *words(text, tmp_path / "s", "--algorithm", "magnitude"))
    assert again.code == 1
    assert "exists already; choose another name or pass --overwrite" in again.err
    plan = run(capsys, *words(text, tmp_path / "p", "--algorithm", "magnitude", "--dry-run"))
    assert "(nothing written)" in plan.out


def test_an_unfinished_run_is_resumed(text, tmp_path, capsys):
    (tmp_path / "s.partial").mkdir()
    refused = run(capsys, *words(text, tmp_path / "s", "--algorithm", "magnitude"))
    assert refused.code == 1
    assert "go on with --resume" in refused.err
    done = run(capsys, *words(text, tmp_path / "s", "--algorithm", "magnitude", "--per", "row", "--resume"))
    assert done.code == 0, done.err
    weight = AutoModelForCausalLM.from_pretrained(tmp_path / "s").model.layers[0].mlp.up_proj.weight
    assert torch.equal((weight == 0).sum(1), torch.full((48,), 16))


def test_without_evaluation_no_text_is_needed(tmp_path, capsys):
    done = run(
        capsys, "sparsify", small.bert(), "--output", tmp_path / "s", "--algorithm", "magnitude", "--no-eval", "--json"
    )  # fmt: skip
    assert done.code == 0, done.out
    assert done.json["perplexity_after"] is None
    assert done.json["sparsity"] == 0.5


def test_errors_are_one_message_and_leave_nothing(text, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    refused = run(capsys, *words(text, tmp_path / "s", "--sparsity", 1.5, "--algorithm", "wonda"))
    assert refused.code == 1
    assert refused.err.count("error:") == 1
    for part in ("sparsity = 1.5", "did you mean 'wanda'"):
        assert part in refused.err
    wrong = run(capsys, *words(text, tmp_path / "s", "--ratio", "down_proj"))
    assert "ratio = 'down_proj'; write PATTERN=SHARE" in wrong.err
    pattern = run(capsys, *words(text, tmp_path / "s", "--pattern", "4:2"))
    assert "pattern = '4:2'; write N:M" in pattern.err
    assert sorted(tmp_path.iterdir()) == before
