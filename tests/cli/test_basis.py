"""`modicum basis`: built, shared, verified and cached from the command line; one JSON object with --json."""

from __future__ import annotations

import pytest
from tests import models_for_tests as models
from tests.cli.adapter_files import run

from modicum.adapters.basis import Basis, BasisCache


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    models.llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_basis_is_built_shown_verified_and_added(folder, tmp_path, capsys):
    file = tmp_path / "out" / "b.safetensors"
    words = ["basis", "build", folder, "--rank", "4", "--targets", "q_proj,v_proj", "--output", file]
    tried = run(capsys, *words, "--dry-run", "--json").json
    assert (tried["layers"], tried["basis"], tried["dry_run"]) == (4, "svd-top-fast-v1", True)
    assert not file.exists()
    assert BasisCache().info().entries == 0
    done = run(capsys, *words, "--json").json
    basis = Basis.load(file)
    assert done["fingerprint"] == basis.fingerprint()
    assert (done["layers"], done["rank"], done["columns"]) == (4, 4, 16)
    assert BasisCache().info().entries == 4
    shown = run(capsys, "basis", "show", file, "--json").json
    assert shown["fingerprint"] == done["fingerprint"]
    assert shown["bytes"] == file.stat().st_size
    verified = run(capsys, "basis", "verify", file, folder, "--json")
    assert verified.code == 0
    assert verified.json["ok"]
    assert all(report["same_weight"] for report in verified.json["reports"])
    assert run(capsys, "basis", "add", file, "--dry-run", "--json").json["kept"] is None
    assert BasisCache().get(done["fingerprint"]) is None
    run(capsys, "basis", "add", file, "--json")
    assert BasisCache().get(done["fingerprint"]) is not None


def test_tables_for_people(folder, tmp_path, capsys):
    file = tmp_path / "b.safetensors"
    built = run(capsys, "basis", "build", folder, "--rank", "4", "--mode", "exact", "--output", file)
    assert built.code == 0
    assert "svd-top-exact-v1" in built.out
    assert "belongs to this model" in run(capsys, "basis", "verify", file, folder).out
    assert "entries" in run(capsys, "basis", "cache", "info").out


def test_another_model_is_found_out(folder, tmp_path, capsys):
    file = tmp_path / "b.safetensors"
    run(capsys, "basis", "build", folder, "--rank", "4", "--output", file)
    models.llama(seed=5).save_pretrained(tmp_path / "other")
    verified = run(capsys, "basis", "verify", file, tmp_path / "other", "--json")
    assert verified.code == 1
    assert not verified.json["ok"]
    models.gpt2().save_pretrained(tmp_path / "gpt2")
    assert "another model" in run(capsys, "basis", "verify", file, tmp_path / "gpt2", "--json").json["error"]


def test_other_directions_imply_the_exact_mode(folder, capsys):
    built = run(
        capsys, "basis", "build", folder, "--rank", "4", "--directions", "bottom", "--dry-run", "--json"
    )
    assert built.json["basis"] == "svd-bottom-exact-v1"


def test_the_cache_is_emptied_on_request_only(folder, capsys):
    run(capsys, "basis", "build", folder, "--rank", "4", "--json")
    full = run(capsys, "basis", "cache", "info", "--json").json
    assert full["entries"] == 14
    assert run(capsys, "basis", "cache", "clear", "--dry-run", "--json").json == full
    assert run(capsys, "basis", "cache", "info", "--json").json == full
    assert run(capsys, "basis", "cache", "clear", "--json").json == full
    assert run(capsys, "basis", "cache", "info", "--json").json["entries"] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rank", "99"], "rank 99"),
        (["--targets", "q_prj"], "q_prj"),
        (["--kind", "svdd"], "svd"),
        (["--mode", "slow"], "fast, exact"),
    ],
)
def test_mistakes_are_named(folder, capsys, words, says):
    found = run(capsys, "basis", "build", folder, *words, "--json")
    assert found.code != 0
    assert says in found.json["error"]


def test_a_damaged_file_is_named(tmp_path, capsys):
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    assert (
        "modicum basis build"
        in run(capsys, "basis", "show", tmp_path / "b.safetensors", "--json").json["error"]
    )
