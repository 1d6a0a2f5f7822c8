"""Reordering changes places, nothing else, and puts first what matters most."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.adapter_files import tokenizer
from tests.models.test_families import decoder
from tests.models_for_tests import bert, llama, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from modicum.compress.calibration import bundled_sequences, calibration_sequences
from modicum.compress.reorder import ReorderOptions, _importance, reorder_model
from modicum.errors import ConfigError, DataError, InexactMergeError
from modicum.models.families import widths
from modicum.models.loading import load_base, load_tokenizer
from modicum.models.subnetwork import narrow

if TYPE_CHECKING:
    from pathlib import Path


def checkpoint(model: Any, folder: Path) -> Path:
    """A model with a tokenizer, and a text of words that it knows beside them."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    words = torch.randint(64, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return folder


def short(folder: Path, **options: Any) -> ReorderOptions:
    return ReorderOptions(calibration=(folder / "text.txt",), sequences=6, sequence_length=16, **options)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens()).logits


@pytest.mark.parametrize("importance", ["activations", "weights"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "gpt2", "phi", "opt", "gemma2", "bert"])
def test_logits_stay_and_importance_falls(kind: str, importance: str, tmp_path: Path) -> None:
    model = bert() if kind == "bert" else decoder(kind)
    folder = checkpoint(model, tmp_path / "model")
    report = reorder_model(str(folder), tmp_path / "out", short(folder, importance=importance))
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    moved = auto.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(moved), logits(model), rtol=1e-4, atol=2e-4)
    assert report.max_difference < 1e-3
    for width in report.widths:
        assert all(a >= b - 1e-6 for a, b in zip(width.after, width.before, strict=True)), width
    found = {w.name: w for w in widths(moved)}
    ids = calibration_sequences((folder / "text.txt",), load_tokenizer(str(folder)), 6, 16).ids
    for name, scores in _importance(moved, list(found.values()), ids, importance).items():
        assert (scores[:-1] >= scores[1:] * (1 - 1e-3)).all(), name
    mlps = [width for width in report.widths if width.kind == "mlp"]
    assert sum(w.after[1] - w.before[1] for w in mlps) > 0.01, "these models were in no order before"


def test_importance_is_what_a_unit_adds_to_the_residual_stream(tmp_path: Path) -> None:
    model = llama()
    ids = tokens(4, 9)
    heads, mlp = widths(model)[:2]
    found = _importance(model, [heads, mlp], ids, "activations")
    seen: dict[str, torch.Tensor] = {}
    for width in (heads, mlp):
        layer = model.get_submodule(width.inputs[0].layer)
        layer.register_forward_pre_hook(lambda _, x, name=width.name: seen.update({name: x[0]}))
    with torch.no_grad():
        model(ids)
        for width, unit in ((heads, 1), (mlp, 17)):
            rows = width.inputs[0].parts[0][1]
            part = slice(unit * rows, (unit + 1) * rows)
            weight = model.get_submodule(width.inputs[0].layer).weight
            added = seen[width.name][..., part] @ weight[:, part].T
            wanted = added.square().sum(-1).mean().sqrt()
            torch.testing.assert_close(found[width.name][unit], wanted, rtol=1e-4, atol=1e-6)


def test_prefixes_of_a_reordered_model_are_better(tmp_path: Path) -> None:
    reorder_model(
        "embedded", tmp_path / "out", ReorderOptions(kinds=("mlp",), sequences=16, sequence_length=64)
    )
    ids = bundled_sequences("test", load_tokenizer("embedded"), 8, 64).ids
    losses = []
    for source in ("embedded", str(tmp_path / "out")):
        model = load_base(source)
        narrow(model, {w.name: w.units // 2 for w in widths(model) if w.kind == "mlp"})
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[1] < losses[0] - 0.2, losses


def test_values_and_everything_beside_them_are_kept_bit_for_bit(tmp_path: Path) -> None:
    folder = checkpoint(llama(torch.bfloat16, tied=True), tmp_path / "model")
    reorder_model(str(folder), tmp_path / "out", short(folder))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == torch.bfloat16
        assert torch.equal(tensor.flatten().sort().values, after[key].flatten().sort().values), key
        moved = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        if not any(name in key for name in moved):
            assert torch.equal(tensor, after[key]), key
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out")]
    assert configs[0] == configs[1]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_one_kind_leaves_the_other_where_it_is(tmp_path: Path) -> None:
    folder = checkpoint(llama(), tmp_path / "model")
    report = reorder_model(str(folder), tmp_path / "out", short(folder, kinds=("mlp",)))
    assert {width.kind for width in report.widths} == {"mlp"}
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        key for key in before if ".mlp." in key
    }


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    wrong = ReorderOptions(kinds=("mpl",), importance="weigths", sequences=0)
    folder = checkpoint(llama(), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"'mlp'.*weights.*sequences = 0.*exists already"):
        reorder_model(str(folder), folder, wrong)
    with pytest.raises(ConfigError, match="the output is the model itself"):
        reorder_model(str(folder), folder, overwrite=True)
    with pytest.raises(DataError, match="cannot be read"):
        reorder_model(str(folder), tmp_path / "out", ReorderOptions(calibration=(tmp_path / "no.txt",)))
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "modicum"}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="reorder the original first"):
        reorder_model(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_permutation_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modicum.compress import reorder as module

    right = module._index

    def other_way_round_for_consumers(port: Any, order: torch.Tensor) -> torch.Tensor:
        return right(port, order.flip(0) if port.layer.endswith("down_proj") else order)

    monkeypatch.setattr(module, "_index", other_way_round_for_consumers)
    folder = checkpoint(decoder("phi3"), tmp_path / "model")
    with pytest.raises(InexactMergeError, match="order of summation"):
        reorder_model(str(folder), tmp_path / "out", short(folder, kinds=("mlp",)))
    assert not (tmp_path / "out").exists()
