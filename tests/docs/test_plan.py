"""The section on planning a fleet: its commands run on the fleet of the page, and its numbers are the code's."""

from __future__ import annotations

import shlex

import pytest
import yaml
from tests import small_checkpoints
from tests.cli.adapter_files import run
from tests.docs.pages import ROOT, blocks
from tests.fleet import fleets

from modicum.fleet import sample

PAGE = ROOT / "docs" / "do" / "fleet.md"


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (spec,) = blocks(PAGE, "yaml")
    # another model and few users, so that it takes seconds
    values = {**yaml.safe_load(spec), "model": {"name_or_path": str(small_checkpoints.llama())}}
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(values))
    fleets.table(tmp_path / "users.jsonl", (6, 9, 12, 8))
    (block,) = (block for block in blocks(PAGE, "bash") if block.startswith("modicum plan"))
    assert run(capsys, "fleet", "train", "fleet.yaml").code == 0
    found = []
    for line in block.splitlines():
        words = shlex.split(line)[1:]
        if "--measure" in words:
            words[words.index("--measure") + 1] = "0.2"
        threads = [] if "--threads" not in words else ["--threads", "1"]
        done = run(capsys, *words, *threads, "--json")
        assert done.code == 0, done.out
        found.append(done.json)
    million, here, unseen = found
    assert (million["users"], million["machines"]) == (10**6, 8)
    assert million["failures"]["mtbf_hours"] == 1000
    assert here["fits"]
    assert here["cost"]["currency"] == "EUR"
    assert (unseen["users"], unseen["rows_per_user"], unseen["tokens_per_row"]) == (50_000, 12, 40)


def test_the_numbers_are_those_of_the_code():
    assert f"{sample._SAMPLE:,} of them are read at most" in PAGE.read_text(encoding="utf-8")
