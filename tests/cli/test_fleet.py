"""`modicum fleet`: from a table of users to adapters, numbers and a report."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from tests import small_checkpoints
from tests.cli.adapter_files import run
from tests.fleet import fleets


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fleets.table(tmp_path / "users.jsonl", (6, 9, 1, 7))
    values = {
        "model": {"name_or_path": str(small_checkpoints.llama())},
        "users": {"source": "users.jsonl", "test": 0.2},
        "data": {"max_length": 64},
        "method": {"name": "lora_xs", "r": 4},
        "train": {"epochs": 3, "learning_rate": 2e-2},
        "store": {"path": "store"},
    }
    path = tmp_path / "night.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_train_report_and_eval(file, tmp_path, capsys):
    done = run(capsys, "fleet", "train", file, "--set", "train.epochs=4")
    assert done.code == 0, done.err
    assert "adapter in the store" in done.out
    assert re.search(r"4/4 users, [\d,]+ adapters/h, \d+:\d\d:\d\d left\)", done.err)
    assert "runs/night: report.html" in done.out
    # where nobody is at fault, users come after their last step
    fleets.table(tmp_path / "two.jsonl", (6, 9))
    two = run(capsys, "fleet", "train", file, "--set", "users.source=two.jsonl", "--output", "runs/two")
    assert "2/2 users" in two.err
    again = run(capsys, "fleet", "report", tmp_path / "runs" / "night", "--json")
    assert json.loads(again.out)["users"]["stored"] == 3
    found = run(capsys, "fleet", "eval", file, "--set", "train.epochs=4", "--output", "eval.parquet")
    assert found.code == 0, found.err
    assert "3 users, test rows, means" in found.out
    assert "1 users have no adapter" in found.out
    assert (tmp_path / "eval.parquet").is_file()


def test_what_is_wrong_is_said_in_one_line_each(file, tmp_path, capsys):
    done = run(capsys, "fleet", "train", file, "--set", "method.name=vera", "--set", "users.test=0.9")
    assert done.code == 1
    assert "no cohorts of 'vera'" in done.err
    assert "leave nothing to train on" in done.err
    assert run(capsys, "fleet", "train", file, "--resume", "--overwrite").code == 1
    done = run(capsys, "fleet", "report", tmp_path)
    assert done.code == 1
    assert "holds no finished fleet" in done.err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "store").exists()
