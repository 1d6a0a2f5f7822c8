"""`modicum fleet` as people run it: killed in the middle, it goes on and ends with the same store."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
import yaml
from tests import small_checkpoints
from tests.fleet import fleets

from modicum.fleet.job import train_fleet
from modicum.fleet.spec import load_fleet
from modicum.store import Store

if TYPE_CHECKING:
    from pathlib import Path

USERS = (4, 5, 6, 7, 8, 9, 10, 12)


def fleet(folder: Path) -> Path:
    folder.mkdir()
    # the path of the rows is part of what a job is
    rows = fleets.table(folder.parent / "users.jsonl", USERS)
    values = {
        "model": {"name_or_path": str(small_checkpoints.llama())},
        "users": {"source": str(rows)},
        "data": {"max_length": 64},
        "method": {"name": "lora_xs", "r": 4},
        "train": {"epochs": 40, "batch_size": 2, "learning_rate": 1e-2, "cohort_size": 2},
        "store": {"path": str(folder / "store"), "alias": "production"},
        "output": str(folder / "run"),
    }
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*words: object) -> str:
    command = [sys.executable, "-m", "modicum", "fleet", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finished(folder: Path) -> int:
    """How many cohorts are on the disk."""
    path = folder / "run" / "fleet.sqlite"
    if not path.is_file():
        return 0
    db = sqlite3.connect(path)
    try:
        return db.execute("SELECT count(*) FROM cohorts").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        db.close()


def contents(folder: Path) -> dict[str, tuple]:
    with Store(folder / "store") as store:
        assert store.verify().ok
        return {str(v): (v.digest, v.metrics, v.tags, v.data_digest, v.aliases) for v in store.ls()}


@pytest.mark.slow
def test_killed_with_9_and_resumed_the_store_is_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_fleet(load_fleet(fleet(whole)))
    path = fleet(killed)
    command = [sys.executable, "-m", "modicum", "fleet", "train", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while process.poll() is None and finished(killed) == 0:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 0 < finished(killed) < len(USERS) / 2
    report = json.loads(run("train", path, "--resume", "--json"))
    assert report["users"]["all"] == len(USERS)
    assert contents(killed) == contents(whole) != {}
    assert {aliases for *_, aliases in contents(killed).values()} == {("production",)}
    measured = json.loads(run("eval", path, "--part", "held_out", "--json"))
    assert measured["users"] == report["users"]["stored"]
    assert measured["metrics"]["loss"]["after"] < measured["metrics"]["loss"]["before"]
    assert load_fleet(path).digest() == report["digest"]
