"""The page on a hundred million users: its commands move a bucket, its words are those of the results."""

from __future__ import annotations

import shlex

from tests.cli.adapter_files import run
from tests.docs.pages import ROOT, blocks
from tests.serve.servers import adapter

from modicum.fleet.gather import name_of
from modicum.store import Store

PAGE = ROOT / "docs" / "understand" / "hundred-million-users.md"


def contents(folder):
    with Store(folder) as store:
        return {str(one): (one.digest, one.aliases) for one in store.ls()}


def test_the_commands_move_a_bucket(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks(PAGE, "bash")
    # as many users as it takes for some to be in the bucket of the page
    users = [name_of(str(n), "{digest}") for n in range(2000)]
    moving = [name for name in users if name.startswith("a7")]
    staying = [name for name in users if name.startswith("a8")]
    assert len(moving) >= 3
    (tmp_path / "shards").mkdir()
    with Store("shards/07", create=True) as store:
        for n, name in enumerate([*moving, *staying]):
            store.put(name, adapter(n % 3), alias="production")
    before = contents("shards/07")
    # twice, as after an interruption in the middle
    for line in commands.splitlines() * 2:
        words = shlex.split(line)[1:]
        done = run(capsys, *words, *(["--overwrite"] if "export" in words else []))
        assert done.code == 0, done.err
    assert contents("shards/12") == {name: one for name, one in before.items() if name.startswith("a7")}
    assert contents("shards/07") == before


def test_cohorts_are_as_large_as_the_page_says():
    from modicum.fleet import sizing

    assert sizing._MOST_USERS["cpu"] == 256
    assert "A cohort is 256 users" in PAGE.read_text(encoding="utf-8")
