"""`modicum search`: the front as a table, every point as JSON, and what cannot be asked for."""

from __future__ import annotations

import json

import pytest
from tests.cli.adapter_files import run
from tests.train.test_elastic import recipe

from modicum.train.run import tune

#: four sub-networks whose sizes differ
SPACE = {"groups": [{"width": "mlp", "choices": [1.0, 0.75, 0.5, 0.25], "share": "model"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = recipe(tmp_path_factory.mktemp("search") / "run", elastic__space=SPACE, train__max_steps=1)
    return tune(made).folder


def words(folder, *more):
    return ["search", folder, "--max-rows", 4, "--prompt", 8, "--strategy", "random", "--trials", 4, *more]


def test_the_front_is_printed(folder, tmp_path, capsys):
    shown = run(capsys, *words(folder, "--budget", "parameters=0.95", "--output", tmp_path / "s"))
    assert shown.code == 0, shown.err
    found = json.loads((tmp_path / "s/search.json").read_text())
    assert len(found["points"]) == 3, "the whole model exceeds the budget"
    _, _, front = shown.out.partition("Pareto front")
    lines = [line.strip("│ ").split("│") for line in front.splitlines() if line.startswith("│")]
    wanted = []
    for point in found["front"]:
        loss, parameters = (point["values"][name] for name in ("loss", "parameters"))
        share = parameters / found["whole"]["parameters"]
        wanted.append([str(point["number"]), f"{loss:.5g}", f"{parameters:.5g} ({share:.3f})"])
    assert [[cell.strip() for cell in line] for line in lines] == wanted
    best = found["best"]
    assert f"trial {best['number']}: loss {best['values']['loss']:.5g}" in shown.out
    assert "3 of 4 sub-networks (random)" in shown.out


def test_json_has_every_point(folder, tmp_path, capsys):
    asked = ["--output", tmp_path / "s", "--objective", "loss", "--objective", "macs", "--json"]
    shown = run(capsys, *words(folder, *asked))  # fmt: skip
    assert shown.code == 0, shown.err
    kept = json.loads((tmp_path / "s/search.json").read_text())
    assert shown.json["objectives"] == {"loss": False, "macs": False}
    for name in ("points", "front", "best", "whole", "space_size", "strategy"):
        assert shown.json[name] == kept[name], name
    assert len(shown.json["points"]) == 4
    numbers = [point["number"] for point in shown.json["points"]]
    assert {point["number"] for point in shown.json["front"]} <= set(numbers)


def test_what_cannot_be_asked_for_is_listed_and_leaves_nothing(folder, tmp_path, capsys):
    asked = [
        "--objective",
        "los",
        "--budget",
        "paramters=0.8",
        "--budget",
        "macs=0",
        "--output",
        tmp_path / "s",
    ]
    shown = run(capsys, *words(folder, *asked))
    assert shown.code == 1
    assert shown.err.count("error:") == 1
    for part in ("'los' (did you mean 'loss'", "'paramters' (did you mean 'parameters'", "budgets.macs = 0"):
        assert part in shown.err, part
    shown = run(capsys, *words(folder, "--strategy", "hil", "--output", tmp_path / "s", "--json"))
    assert shown.code == 1
    assert "strategy: Input should be 'heuristic', 'hill'" in shown.json["error"]
    both = run(capsys, *words(folder, "--resume", "--overwrite"))
    assert "give one of them" in both.err
    assert list(tmp_path.iterdir()) == []
