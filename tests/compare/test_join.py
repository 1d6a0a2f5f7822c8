"""Joining finished comparisons, and refusing those that were not made in the same way."""

from __future__ import annotations

import copy
import json

import pytest
from pyarrow import parquet
from tests.compare.small import numbers, reference

from modicum.cli import main
from modicum.compare.join import join
from modicum.errors import ConfigError
from modicum.train.artifacts import write_table


@pytest.fixture
def halves(tmp_path):
    """The reference in two folders: one with LoRA, one with LoRA-XS."""
    whole = json.loads((reference() / "comparison.json").read_text())
    rows = parquet.read_table(reference() / "runs.parquet").to_pylist()
    folders = []
    for method in ("lora", "lora_xs"):
        folder = tmp_path / method
        folder.mkdir()
        part = {**whole, "cells": [cell for cell in whole["cells"] if cell["method"] == method]}
        (folder / "comparison.json").write_text(json.dumps(part))
        write_table(folder / "runs.parquet", [row for row in rows if row["method"] == method])
        folders.append(folder)
    return folders


def edited(folder, change):
    file = folder / "comparison.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_halves_make_the_whole(halves, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--join", *map(str, halves), "--output", str(tmp_path / "all"), "--json"])
    assert ended.value.code == 0
    joined = json.loads(capsys.readouterr().out)
    whole = json.loads((reference() / "comparison.json").read_text())

    def key(cell):
        return cell["compression"], cell["label"]

    # judged against all the others, not only those of its half
    assert numbers(sorted(joined["cells"], key=key)) == numbers(sorted(whole["cells"], key=key))
    for cost, front in whole["pareto"].items():
        named = {key(joined["cells"][index]) for index in joined["pareto"][cost]}
        assert named == {key(whole["cells"][index]) for index in front}
    assert joined["sources"] == [str(folder) for folder in halves]
    assert joined["untrained"] == whole["untrained"]
    assert "differs between the joined" not in joined["conditions"]
    rows = parquet.read_table(tmp_path / "all" / "runs.parquet").to_pylist()
    assert len(rows) == 24
    assert {row["source"] for row in rows} == set(joined["sources"])
    assert "xs r=4" in (tmp_path / "all" / "report.md").read_text()


def test_times_of_other_machines_are_noted(halves, tmp_path):
    edited(halves[1], lambda values: values["conditions"].update(threads=7, processor="another"))
    joined = join(halves, tmp_path / "all")
    assert sorted(joined["conditions"]["differs between the joined"])[1] == "threads: 1 and 7"


def test_every_difference_is_named(halves, tmp_path):
    def change(values):
        values["metric"], values["seeds"], values["split"] = "perplexity", [0, 1, 2], "validation"
        values["conditions"]["model digest"] = "0" * 16
        values["conditions"]["protocol"] = "learning rate of each cell chosen on test rows"
        values["conditions"]["data"]["digests"]["train"] = "1" * 16
        values["conditions"]["data"]["options"]["prompt_template"] = "Q: {question}"
        values["conditions"]["steps"] = 99
        values["conditions"]["train"]["weight_decay"] = 0.5
        values["compressions"]["4bit"]["quantize"]["bits"] = 3

    edited(halves[1], change)
    with pytest.raises(ConfigError) as caught:
        join(halves, tmp_path / "all")
    said = str(caught.value)
    for words in (
        "metric: 'loss' and 'perplexity'", "seeds: [0, 1] and [0, 1, 2]", "split: 'test' and 'validation'",
        "model digest", "chosen on test rows'", "data.digests.train",
        "data.options.prompt_template: None and 'Q: {question}'",
        "steps: 3 and 99", "train.weight_decay: 0.0 and 0.5", "the compression 4bit: quantize.bits: 4 and 3",
    ):  # fmt: skip
        assert words in said, words
    assert "digests.test" not in said
    assert not (tmp_path / "all").exists()


def test_what_cannot_be_joined_at_all(halves, tmp_path):
    def unfinished(values):
        values["cells"][0]["state"] = "missing"
        values["cells"].append(copy.deepcopy(values["cells"][1]) | {"label": "xs r=4", "compression": "none"})

    edited(halves[0], unfinished)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        join([*halves, tmp_path / "empty", tmp_path / "emty"], halves[0])
    said = str(caught.value)
    assert "not finished, --resume it first: none/lora r=1" in said
    assert f"the cell none/xs r=4 is in {halves[0]} and in {halves[1]}" in said
    assert f"{tmp_path / 'empty'} holds no comparison" in said
    assert "is one of the comparisons" in said
    with pytest.raises(ConfigError, match="at least two"):
        join(halves[1:], tmp_path / "all")
    with pytest.raises(ConfigError, match=r"there are some inside: .*lora"):
        join([tmp_path, halves[1]], tmp_path / "all")
