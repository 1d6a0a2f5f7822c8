"""`modicum store`: every command on real stores, through the program's own entry."""

from __future__ import annotations

import json
import shlex
import stat

import pytest
import torch
from peft import PeftModel
from tests import models_for_tests as models
from tests.cli import adapter_files
from tests.cli.adapter_files import make_files
from tests.store.small_records import record
from tests.store.test_files import logits

from modicum.adapters.basis import Basis, BasisCache
from modicum.store import Store
from modicum.store.record import decode, encode


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODICUM_CACHE", str(folder / "cache"))
        return make_files(folder)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """`modicum store WORDS` on the store of this test; fails on another exit code than `code`."""
    monkeypatch.setenv("MODICUM_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MODICUM_ACTOR", "ann")
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words, code=0):
        shown = adapter_files.run(capsys, "store", *words)
        assert shown.code == code, (shown.out, shown.err)
        return shown

    return call


@pytest.fixture
def store(run, tmp_path):
    """ada with two versions, team/bob with one; made by the command line."""
    for seed in range(3):
        (tmp_path / f"{seed}.modicum").write_bytes(encode(record(seed)))
    run("init")
    run(
        "put", "ada", tmp_path / "0.modicum", "--metric", "acc=0.5", "--tag", "night", "--alias", "production"
    )
    run(
        "put",
        "ada",
        tmp_path / "1.modicum",
        "--parent",
        "ada@1",
        "--seed",
        3,
        "--note",
        "[b]bold[/b] \x1b[31mred",
    )
    run("put", "team/bob", tmp_path / "2.modicum", "--data-digest", "d1", "--actor", "eve")
    return tmp_path / "store"


def test_a_store_is_made_by_init_or_create(run, files, tmp_path):
    assert "modicum store init" in run("ls", code=1).err
    assert run("init", "--json").json == {"store": str(tmp_path / "store"), "versions": 0}
    assert run("init").out.strip() == str(tmp_path / "store")
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700
    other = tmp_path / "other"
    assert run("put", "ada", files.record, "--store", other, "--create", "--json").json["version"] == 1
    assert len(run("ls", "--store", other, "--json").json["versions"]) == 1
    assert len(run("ls", "--json").json["versions"]) == 0


def test_without_a_store_it_says_which_option(run, monkeypatch):
    monkeypatch.delenv("MODICUM_STORE")
    assert "--store" in run("ls", code=2).err


def test_listing(run, store):
    def names(*words):
        return [f"{v['name']}@{v['version']}" for v in run("ls", *words, "--json").json["versions"]]

    assert names() == ["ada@1", "ada@2", "team/bob@1"]
    assert names("team/*") == ["team/bob@1"]
    assert names("--newest") == ["ada@2", "team/bob@1"]
    assert names("--tag", "night", "--alias", "production", "--method", "lora_xs") == ["ada@1"]
    assert names("--metric", "acc>=0.4", "--metric", "acc <= 0.6") == ["ada@1"]
    assert names("--metric", "acc=0.4") == []
    assert names("--base", "5f" * 16, "--limit", 2) == ["ada@1", "ada@2"]
    assert names("--since", "1h") == ["ada@1", "ada@2", "team/bob@1"]
    assert names("--before", "2020-01-01") == []
    shown = run("ls").out
    for word in ("versions: 3", "team/bob@1", "production", "night", "acc 0.5"):
        assert word in shown
    assert "cannot read the time" in run("ls", "--since", "yesterday", code=1).err
    assert "cannot read the limit" in run("ls", "--metric", "acc~1", "--json", code=1).json["error"]


def test_show(run, store, tmp_path):
    shown = run("show", "ada@latest", "--json").json
    assert (shown["version"], shown["parent"], shown["seed"], shown["actor"]) == (2, "ada@1", 3, "ann")
    assert (shown["values"], shown["config"], shown["basis"]) == (256, {"r": 8}, None)
    assert shown["recipe_digest"] is None
    (tmp_path / "run.modicum").write_bytes(encode(record(recipe_digest="blake2b:a1")))
    run("put", "carl", tmp_path / "run.modicum")
    assert run("show", "carl", "--json").json["recipe_digest"] == "blake2b:a1"
    assert "blake2b:a1" in run("show", "carl").out
    assert run("show", "team/bob", "--json").json["actor"] == "eve"
    text = run("show", "ada").out
    assert "[b]bold[/b]  [31mred" in text  # as it is, without what a terminal would obey
    assert "no version 9; its newest: 2, 1" in run("show", "ada@9", code=1).err
    assert run("show", "adda", "--json", code=1).json["kind"] == "NotStoredError"


def test_labels(run, store):
    assert run("tag", "ada@1", "best", "--json").json["tags"] == ["best", "night"]
    assert run("tag", "ada@production", "night", "--remove", "--json").json["tags"] == ["best"]
    assert run("measure", "ada@1", "f1=0.25", "acc=0.75", "--json").json["metrics"] == {
        "acc": 0.75,
        "f1": 0.25,
    }
    assert run("note", "ada@1", "good", "--json").json["note"] == "good"
    assert run("note", "ada@1", "--remove", "--json").json["note"] is None
    assert "--remove" in run("note", "ada@1", code=1).err
    assert "name=number" in run("measure", "ada@1", "f1", code=1).err
    assert "best" in run("tag", "ada@1", "best").out
    assert "f1" in run("measure", "ada@1", "f1=1").out


def test_aliases_move_and_go_back(run, store):
    assert run("promote", "ada@2", "--json").json == {"name": "ada", "alias": "production", "version": 2}
    assert run("rollback", "ada", "--json").json["version"] == 1
    assert "no earlier version" in run("rollback", "ada", code=1).err
    assert "points at version 1" in run("promote", "ada@2", "--expected", 7, code=1).err
    run("promote", "ada@2", "--expected", 1)
    assert "ada@2" in run("alias", "ada@production", "canary", "--expected", "none").out
    assert run("show", "ada@canary", "--json").json["aliases"] == ["canary", "production"]
    moved = {"name": "ada", "alias": "canary", "version": 1}
    assert run("alias", "ada@1", "canary", "--json").json == moved
    assert run("alias", "ada", "canary", "--remove", "--json").json == {**moved, "version": None}
    assert "no alias 'canary'" in run("show", "ada@canary", code=1).err
    assert "--expected" in run("promote", "ada@2", "--expected", "x", code=1).err


def test_the_log_and_its_head(run, store):
    run("promote", "ada@2", "--actor", "eve")
    found = run("log", "--json").json
    assert [(e["action"], e["actor"]) for e in found["entries"]] == [
        ("put", "ann"), ("alias", "ann"), ("put", "ann"), ("put", "eve"), ("alias", "eve"),
    ]  # fmt: skip
    assert [e["seq"] for e in run("log", "ada", "--limit", 2, "--json").json["entries"]] == [3, 5]
    assert [e["seq"] for e in run("log", "--after", 1, "--limit", 2, "--json").json["entries"]] == [2, 3]
    assert [e["seq"] for e in run("log", "--limit", 1, "--json").json["entries"]] == [5]
    assert f"head {found['head']}" in run("log").out
    assert run("verify", "--head", found["head"], "--json").json["ok"]
    other = found["head"][:-1] + ("0" if found["head"][-1] != "0" else "1")
    assert "not the one that was noted" in run("verify", "--head", other, code=1).out
    assert "ENTRIES:HASH" in run("verify", "--head", "x", code=1).err


def test_diff(run, store):
    found = run("diff", "ada@1", "ada", "--json").json
    assert (found["a"], found["b"], len(found["layers"])) == ("ada@1", "ada@2", 4)
    assert found["total"]["distance"] > 0
    shown = run("diff", "ada@1", "ada").out
    for word in ("differs", "metrics", "layers.1.self_attn.v_proj", "cosine", "[b]bold"):
        assert word in shown
    assert "equal to the last bit" in run("diff", "ada", "ada").out


def test_verify_gc_backup_stats(run, store, tmp_path):
    found = run("verify", "--json").json
    assert (found["ok"], found["versions"], found["missing_bases"]) == (True, 3, [])
    assert "Nothing is wrong" in run("verify", "--no-records").out
    counts = run("stats", "--top", 1, "--json").json
    assert (counts["names"], counts["versions"], len(counts["largest"])) == (2, 3, 1)
    assert {"segments", "index", "log"} <= counts["disk"].keys()
    assert "team/bob" in run("stats").out
    assert run("backup", tmp_path / "copy", "--json").json["bytes"] > 0
    assert len(run("ls", "--store", tmp_path / "copy", "--json").json["versions"]) == 3
    run("remove", "ada@2")
    assert run("gc", "--dead", 0, "--json").json["segments"] == 1
    segment = max((store / "segments").iterdir())
    data = segment.read_bytes()
    segment.write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
    assert "WRONG" in run("verify", code=1).out
    assert run("verify", "--json", code=1).json["faults"]


def test_removing_and_erasing(run, store, monkeypatch):
    assert "which version of ada" in run("remove", "ada", code=1).err
    assert "production" in run("remove", "ada@1", code=1).err
    assert run("remove", "ada@latest", "--json").json == {"removed": ["ada@2"]}
    assert "--yes" in run("purge", "team/bob", code=1).err
    assert run("purge", "team/bob@1", "--yes", "--json").json["versions"] == 1
    shown = run("purge", "ada", "--yes").out
    assert "ada with all its versions" in shown
    assert run("ls", "--json").json["versions"] == []
    assert "erased" in run("log").out


def test_put_and_get_in_every_form(run, files, tmp_path):
    run("init")
    for source in (files.record, files.peft, files.lora):
        run("put", "ada", source)
    assert [v["method"] for v in run("ls", "--json").json["versions"]] == ["lora_xs", "lora_xs", "peft:LORA"]
    written = run("get", "ada@1", "-o", tmp_path / "out").out
    assert "out.modicum" in written
    assert (tmp_path / "out.modicum").read_bytes() == files.record.read_bytes()
    assert "exists already" in run("get", "ada@1", "-o", tmp_path / "out", code=1).err
    run("get", "ada@2", "-o", tmp_path / "out", "--overwrite")
    run("get", "ada@1", "-o", tmp_path / "folder", "--format", "peft")
    loaded = PeftModel.from_pretrained(models.llama(), str(tmp_path / "folder")).eval()
    torch.testing.assert_close(logits(loaded), files.wanted)
    assert "--model" in run("get", "ada@1", "-o", tmp_path / "lora", "--format", "lora", code=1).err
    run("get", "ada@1", "-o", tmp_path / "lora", "--format", "lora", "--model", files.base)
    loaded = PeftModel.from_pretrained(models.llama(), str(tmp_path / "lora")).eval()
    torch.testing.assert_close(logits(loaded), files.wanted, rtol=1e-4, atol=1e-4)
    assert "did you mean 'lora'" in run("get", "ada", "-o", tmp_path / "x", "--format", "lor", code=1).err
    assert "is no record" in run("put", "ada", files.text, code=1).err
    for dtype in ("float16", "int8"):
        assert run("put", "ada", files.lora, "--dtype", dtype, "--json").json["dtype"] == dtype
    assert run("diff", "ada@3", "ada", "--json").json["total"]["relative"] < 0.02
    with Store(tmp_path / "store") as store:
        assert store.get("ada@1") == decode(files.record.read_bytes())


def test_a_missing_basis_says_which_command_makes_it(run, capsys, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("init")
    run("put", "ada", files.peft)
    state = run("show", "ada", "--json").json["basis"]
    assert state["stored"] is None
    assert "NOT IN THIS STORE" in run("show", "ada").out
    assert "NOT IN THIS STORE" in run("get", "ada", "-o", tmp_path / "a").out
    (missing,) = run("verify", "--json").json["missing_bases"]
    assert missing["command"] == state["command"]
    assert "modicum basis build" in run("verify").out
    assert "modicum basis build" in run("get", "ada", "-o", tmp_path / "b", "--format", "basis", code=1).err
    # what it says is what makes it
    for command in state["command"].replace("MODEL", str(files.base)).split(" && "):
        shown = adapter_files.run(capsys, *shlex.split(command)[1:])
        assert shown.code == 0, shown.err
    stored = run("show", "ada", "--json").json["basis"]["stored"]
    assert stored.startswith("basis/svd-top-fast")
    assert run("verify", "--json").json["missing_bases"] == []
    # once, however often it is put
    again = run("put-basis", next(tmp_path.glob("*.safetensors")), "--json").json
    assert f"{again['name']}@{again['version']}" == stored
    run("get", "ada", "-o", tmp_path / "b", "--format", "basis")
    run("get", stored, "-o", tmp_path / "c")
    assert Basis.load(tmp_path / "b").fingerprint() == Basis.load(tmp_path / "c").fingerprint()
    before = BasisCache().info().entries
    assert adapter_files.run(capsys, "basis", "add", tmp_path / "b").code == 0
    assert BasisCache().info().entries == before + 1


def test_many_at_once(run, files, tmp_path):
    root = tmp_path / "root"
    for user in range(3):
        (root / f"u{user}").mkdir(parents=True)
        (root / f"u{user}" / "a.modicum").write_bytes(encode(record(user)))
    (root / "u1" / "a.modicum").write_bytes(b"\x8aMODICUMno")
    assert "1 of 3 are faulty" in run("put-many", root, "--strict", "--create", code=1).err
    put = run("put-many", root, "--template", "{parent}", "--tag", "x", "--json", code=1)
    assert put.err.splitlines()[-1] == "adapters 3/3"
    found = put.json
    assert found["stored"] == ["u0@1", "u2@1"]
    assert found["faults"][0]["path"].endswith("u1/a.modicum")
    shown = run("put-many", root, "--template", "{parent}", code=1)
    assert "0 stored, 2 known, 1 faulty" in shown.out
    assert "cut short" in shown.out
    assert run("put-many", files.peft, files.lora, "--json").json["stored"] == ["peft@1", "lora@1"]


def test_archives_and_places(run, store, tmp_path):
    assert run("export", tmp_path / "a", "ada", "--json").json["versions"] == 2
    assert "exists already" in run("export", tmp_path / "a", "ada", code=1).err
    run("export", tmp_path / "a", "--tag", "night", "--overwrite")
    other = tmp_path / "other"
    found = run("import", tmp_path / "a", "--store", other, "--create", "--json").json
    assert (found["stored"], found["known"]) == (1, 0)
    assert "put-many" in run("import", tmp_path, code=1).err
    run("measure", "ada@1", "acc=0.1", "--store", other)
    assert run("sync", tmp_path / "place", "--json").json["sent"] == 3
    assert "known" in run("sync", tmp_path / "place", "--pull", "--store", other).out
    assert len(run("ls", "--store", other, "--json").json["versions"]) == 3
    assert run("sync", tmp_path / "place", "--json").json["sent"] == 0
    assert "another store" in run("sync", tmp_path / "place", "--store", other, code=1).err
    text = json.dumps(run("log", "ada", "--store", other, "--json").json)
    assert "put by ann" in text


def test_help_of_every_command(run):
    listed = run("--help").out
    for verb in (
        "init", "put", "put-many", "put-basis", "get", "ls", "show", "log", "diff", "stats", "tag", "note", "measure",
        "alias", "promote", "rollback", "verify", "gc", "backup", "remove", "purge", "export", "import", "sync",
    ):  # fmt: skip
        assert f" {verb} " in listed
        assert "--json" in run(verb, "--help").out
