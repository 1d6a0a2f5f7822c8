"""`modicum inspect`: what a file holds, and whether it is undamaged, without loading a model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tests import models_for_tests as models
from tests.cli.adapter_files import make_files, run, trained

import modicum
from modicum.adapters.basis import Basis, BasisSpec, layer_factors
from modicum.adapters.elastic import SubNetwork, Switch
from modicum.store.files import save_adapter


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return make_files(tmp_path_factory.mktemp("files"))


def test_a_record(files, capsys):
    found = run(capsys, "inspect", files.record, "--json").json
    assert found["kind"] == "compact record"
    assert found["state"] == "ok"
    assert (found["method"], found["ranks"], found["values"], found["tensors"]) == ("lora_xs", [4], 224, 14)
    assert found["bytes"] == files.record.stat().st_size
    assert found["value_bytes"] == 448
    assert found["value_bytes"] + found["head_bytes"] + found["container_bytes"] == found["bytes"]
    assert found["dtypes"] == ["bfloat16"]
    assert (found["metadata"], found["recipe_digest"]) == ({"who": "me"}, "abc")
    assert found["options"]["alpha"] == 6.0
    assert len(found["base_fingerprint"]) == 32
    assert found["basis_fingerprint"]
    shown = run(capsys, "inspect", files.record)
    assert shown.code == 0
    for words in ("lora_xs", "224 in 14 tensors", "container", "metadata who"):
        assert words in shown.out


def test_a_peft_folder_of_ours_and_of_peft(files, capsys):
    ours = run(capsys, "inspect", files.peft, "--json").json
    assert (ours["kind"], ours["method"], ours["state"]) == ("PEFT folder", "lora_xs", "ok")
    assert (ours["ranks"], ours["values"], ours["value_bytes"]) == ([4], 224, 896)
    lora = run(capsys, "inspect", files.lora, "--json").json
    assert (lora["method"], lora["ranks"], lora["values"]) == ("peft:LORA", [2], 2 * 2 * (32 + 32))
    assert lora["bytes"] == lora["value_bytes"] + lora["head_bytes"] + lora["container_bytes"]


def test_heads_are_counted_apart(tmp_path, capsys):
    model = trained(models.bert(), modicum.LoraXSConfig(r=4, task_type="SEQ_CLS"))
    path = save_adapter(model, tmp_path / "a").path
    model.save_pretrained(tmp_path / "folder")
    for place in (path, tmp_path / "folder"):
        found = run(capsys, "inspect", place, "--json").json
        assert (found["values"], found["head_values"]) == (13 * 16, 3 * 32 + 3)
        assert found["head_bytes"] >= 4 * 99
        assert found["task_type"] == "SEQ_CLS"


def test_a_basis_file(tmp_path, capsys):
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    basis = Basis({"a.q": layer_factors(weight, 4, BasisSpec())}, BasisSpec(), {"a.q": "0" * 32})
    basis.save(tmp_path / "b.safetensors")
    found = run(capsys, "inspect", tmp_path / "b.safetensors", "--json").json
    assert (found["kind"], found["state"], found["ranks"]) == ("basis", "ok", [4])
    assert found["basis_fingerprint"] == basis.fingerprint()
    assert found["base_fingerprint"] == basis.base_fingerprint
    data = bytearray((tmp_path / "b.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "b.safetensors").write_bytes(data)
    assert "checksum" in run(capsys, "inspect", tmp_path / "b.safetensors", "--json").json["state"]


def test_damage_is_told_and_ends_with_an_error(files, tmp_path, capsys):
    damaged = bytearray(files.record.read_bytes())
    damaged[-3] ^= 4
    (tmp_path / "a.modicum").write_bytes(damaged)
    shown = run(capsys, "inspect", tmp_path / "a.modicum", "--json")
    assert shown.code == 1
    assert "check sum" in shown.json["state"]
    assert shown.json["method"] == "lora_xs"
    (tmp_path / "a.modicum").write_bytes(damaged[:90])
    assert "cut short" in run(capsys, "inspect", tmp_path / "a.modicum", "--json").json["state"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [("nan", "NaN"), ("cut", "damaged"), ("gone", "missing"), ("config", "cannot be read")],
)
def test_damaged_folders(files, damage, words, tmp_path, capsys):
    state = load_file(files.peft / "adapter_model.safetensors")
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    config.write_bytes((files.peft / "adapter_config.json").read_bytes())
    if damage == "nan":
        next(iter(state.values()))[0, 0] = float("nan")
    if damage != "gone":
        save_file(state, weights)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5])
    if damage == "config":
        config.write_text("{")
    shown = run(capsys, "inspect", tmp_path, "--json")
    assert shown.code == 1
    assert words in shown.json["state"]


def test_nothing_there_and_something_else(tmp_path, capsys):
    assert "nothing at" in run(capsys, "inspect", tmp_path / "absent").err
    assert "no adapter folder" in run(capsys, "inspect", tmp_path).err
    (tmp_path / "x.txt").write_text("hello")
    shown = run(capsys, "inspect", tmp_path / "x.txt", "--json")
    assert shown.code == 1
    assert "no modicum record" in shown.json["error"]


def test_it_imports_no_torch(files):
    import subprocess
    import sys

    code = (
        "import sys\nfrom modicum.cli import main\n"
        f"try: main(['inspect', {str(files.record)!r}, '--json'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    assert json.loads(first)["state"] == "ok"
    assert second == "[]"


def test_a_folder_of_a_run_is_looked_into(files, tmp_path, capsys):
    model = get_peft_model(models.llama(), modicum.LoraXSConfig(r=2))
    model.save_pretrained(tmp_path / "adapter")
    assert run(capsys, "inspect", tmp_path, "--json").json["ranks"] == [2]


def test_a_model_folder(files, capsys):
    found = run(capsys, "inspect", files.base, "--json").json
    assert (found["kind"], found["state"], found["model_class"]) == ("model folder", "ok", "LlamaForCausalLM")
    assert found["parameters"] == sum(p.numel() for p in models.llama().parameters())
    assert len(found["fingerprint"]) == 32
    short = run(capsys, "inspect", files.base).out
    for words in ("zeros in linear layers", f"{found['parameters']:,}", found["fingerprint"]):
        assert words in short
    assert "down_proj" not in short
    assert "model.layers.1.mlp.down_proj.weight" in run(capsys, "inspect", files.base, "--layers").out


def test_a_damaged_model_folder(files, tmp_path, capsys):
    shutil.copytree(files.base, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shown = run(capsys, "inspect", tmp_path / "model", "--json")
    assert shown.code == 1
    assert "damaged" in shown.json["state"]


def test_the_embedded_model(capsys):
    assert run(capsys, "inspect", "embedded", "--json").json["state"] == "ok"


def test_an_elastic_adapter(tmp_path, capsys):
    model = get_peft_model(models.llama(), modicum.LoraXSConfig(r=4))
    Switch(model).activate(SubNetwork(ranks={"model.layers.0.self_attn.q_proj": 2}, choices={"early": 2}))
    model.save_pretrained(tmp_path)
    shown = run(capsys, "inspect", tmp_path, "--layers").out
    for words in ("2 (1 layers), 4 (13 layers)", "early: 2", "212", "2 of 4", "4 of 16"):
        assert words in shown, words
    assert "2 of 4" not in run(capsys, "inspect", tmp_path).out
    active = run(capsys, "inspect", tmp_path, "--json").json["sub_network"]
    assert f"their fingerprint │ {active['fingerprint']}" in " ".join(shown.split())
