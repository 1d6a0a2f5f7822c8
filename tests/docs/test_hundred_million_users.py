"""The page on a hundred million users: its commands move a bucket, its words are those of the results."""

from __future__ import annotations

import json
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


def found(name: str = "") -> list[dict]:
    file = ROOT / "benchmarks" / "fleet" / "results" / f"fleet_simulation{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))["found"]


def test_words_are_those_of_the_results():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    runs = found()
    # every user ends in the store exactly once
    assert all(run["stored_once"] == run["cohorts"] for run in runs)
    assert "less than half a percent" in text
    many = [run for run in runs if run["machines"] > 100]
    assert many
    assert all(run["wasted"] < 0.005 for run in many)
    assert all(run["down"] > run["wasted"] for run in many if run["mtbf_hours"] == 10)
    # hours grow with users, and with failures by little
    assert all(run["hours"] < 1.1 * runs[at // 4 * 4]["hours"] for at, run in enumerate(runs))
    shards = found("_store")
    assert "less than a hundredth" in text
    assert all(one["busy"] < 0.01 and one["put_seconds"]["p99"] < 1 for one in shards)
    assert "a hundred commits" in text
    assert shards[-1]["spread"]["commits_per_cohort"] == 100
    # a million users each, a size that was measured, of about 20 KB
    load = json.loads((ROOT / "benchmarks/store/results/load-1000000-10240.json").read_text(encoding="utf-8"))
    assert load["store"]["records"] >= shards[-1]["users"] / shards[-1]["shards"] == 10**6
    assert 20e3 < shards[-1]["bytes"] / shards[-1]["users"] < 24e3
    # the step benchmark encloses the fleet, and everything else is close
    enclosing = [value / real for what, value, real in found("_checked") if "step benchmark" in what]
    assert len(enclosing) == 2
    assert min(enclosing) < 1 < max(enclosing)
    assert all(abs(value / real - 1) < 0.06 for what, value, real in found("_checked") if "step" not in what)
