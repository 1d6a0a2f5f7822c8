"""The page on the store: its commands run, one after the other, and do what the page says."""

from __future__ import annotations

import shlex

import pytest
from peft import get_peft_model
from tests.docs.pages import ROOT, blocks

from modicum import LoraXSConfig
from modicum.cli import main
from modicum.models.embedded import path
from modicum.models.loading import load_base
from modicum.store import Store

PAGE = ROOT / "docs" / "do" / "store.md"


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("ada", "ada-2")):
        config = LoraXSConfig(r=4, target_modules=["q_proj"], seed=seed)
        get_peft_model(load_base(str(path())), config).save_pretrained(tmp_path / "runs" / name)
    for line in "".join(blocks(PAGE, "bash")).splitlines():
        words = shlex.split(line)
        if words[0] == "export":
            monkeypatch.setenv("MODICUM_STORE", str(tmp_path / "adapters"))
            continue
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        shown = capsys.readouterr()
        assert not stop.value.code, (line, shown.err)
    with Store(tmp_path / "adapters") as store:
        assert store.show("ada@production").version == 1
        assert [v.name for v in store.ls() if v.name.startswith("team/")] == ["team/ada-2"]
    for copy in ("other", "third", "copy"):
        with Store(tmp_path / copy) as store:
            assert store.show("ada@1").tags == ("night",)
            assert store.verify().ok
