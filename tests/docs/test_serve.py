"""The page on serving: its commands run, and its client is answered."""

from __future__ import annotations

import shlex

import pytest
from peft import get_peft_model
from tests.docs.pages import ROOT, blocks
from tests.serve.servers import serving

from modicum import LoraXSConfig
from modicum.cli import main
from modicum.models.embedded import path
from modicum.models.loading import load_base
from modicum.serve.keys import Keys
from modicum.store import Store

PAGE = ROOT / "docs" / "do" / "serve.md"
#: the public address of the examples
_URL = "http://127.0.0.1:8000"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two trained adapters; the server that the page starts is one on a free port."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODICUM_STATE", str(tmp_path / "state"))
    for seed, name in enumerate(("ada", "bob")):
        config = LoraXSConfig(r=4, target_modules=["q_proj"], seed=seed)
        get_peft_model(load_base(str(path())), config).save_pretrained(tmp_path / "runs" / name)
    return tmp_path


def test_the_page(place, monkeypatch, capsys):
    for line in "".join(blocks(PAGE, "bash")).splitlines():
        words = shlex.split(line)
        if words[0] == "export":
            monkeypatch.setenv("MODICUM_STORE", str(place / "adapters"))
        elif words[:3] == ["modicum", "serve", "embedded"]:
            capsys.readouterr()
            with serving(place / "state", place / "adapters") as served:
                for code in blocks(PAGE, "py"):
                    exec(compile(code.replace(_URL, served.url), str(PAGE), "exec"), {})
            said = "\n" + capsys.readouterr().out
            assert all(f"\n{model} " in said for model in ("base", "ada", "bob"))
        else:
            with pytest.raises(SystemExit) as stop:
                main(words[1:])
            assert not stop.value.code, (line, capsys.readouterr().err)
    with Store(place / "adapters") as store:
        assert sorted(store.names()) == ["ada", "bob"]
    with Keys(place / "state") as keys:
        assert [(key.name, bool(key.revoked)) for key in keys.list()] == [
            ("ada-team", True),
            ("root", False),
            ("web", False),
        ]
