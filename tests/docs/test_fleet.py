"""The page on fleets: its file trains, its commands run, and its client is answered by adapter or by the base model."""

from __future__ import annotations

import json
import shlex

import pytest
from tests.docs.pages import ROOT, blocks
from tests.serve.servers import Offline, serving

from modicum.cli import main
from modicum.store import Store

PAGE = ROOT / "docs" / "do" / "fleet.md"
#: the public address of the examples
_URL = "http://127.0.0.1:8000"
_START = "In the kitchen, Ada had a"
_THINGS = ("boat", "cake", "drum")
_PLACES = ("park", "house", "shop", "garden", "forest", "school", "zoo", "lake", "farm", "beach")


@pytest.mark.slow
def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (spec,) = blocks(PAGE, "yaml")
    (tmp_path / "fleet.yaml").write_text(spec, encoding="utf-8")
    rows = [
        {
            "user": f"{thing}-user",
            "text": f"In the {place}, Ada had a {thing}. Ada sang to the {thing} at night.",
        }
        for thing in _THINGS
        for place in _PLACES
    ]
    (tmp_path / "users.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    commands, server = (block.splitlines() for block in blocks(PAGE, "sh"))
    for line in commands:
        with pytest.raises(SystemExit) as stop:
            main(shlex.split(line)[1:])
        assert not stop.value.code, (line, capsys.readouterr().err)
    with Store(tmp_path / "stores" / "fleet") as store:
        assert sorted(store.names()) == sorted(f"{thing}-user" for thing in _THINGS)
    (words,) = map(shlex.split, server)
    assert words == ["modicum", "serve", "start", "embedded", "--store", "stores/fleet"]
    (code,) = blocks(PAGE, "py")
    with serving(tmp_path / "state", words[-1], engine={"max_rank": 16}) as served:
        names: dict = {}
        exec(compile(code.replace(_URL, served.url), str(PAGE), "exec"), names)
        found = [names["answer"](user, _START) for user in ("boat-user", "cake-user", "nobody")]
        names["client"].close()
    assert len(set(found)) == 3
    assert found[2] == Offline().text(None, _START, 16)
