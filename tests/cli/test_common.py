"""Output, progress and overrides that the verbs share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from modicum.cli._common import (
    emit,
    jsonable,
    merged,
    parse_overrides,
    progress,
    read_recipe,
    table,
    yaml_value,
)
from modicum.errors import ConfigError


@dataclasses.dataclass
class _Point:
    x: int
    where: Path
    loss: float = float("nan")


def test_json_of_a_dataclass(capsys):
    emit({"points": (_Point(1, Path("a") / "b"),)}, True, str)
    assert capsys.readouterr().out == '{"points": [{"x": 1, "where": "a/b", "loss": null}]}\n'


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_json_has_no_infinity(value):
    assert jsonable([value, 1.5]) == [None, 1.5]


def test_a_table_keeps_whole_rows_in_a_pipe(capsys):
    emit(None, False, lambda _: [table("t", ["name", "n"], [["x" * 90, "1,234"], ["y" * 40, ""]]), "done"])
    out = capsys.readouterr().out
    assert "x" * 90 in out
    assert out.endswith("done\n")


def test_progress_without_a_terminal_is_lines(capsys):
    with progress("reading", 3, every=1e9) as advance:
        for index in range(3):
            advance(note=f"file {index}")
    assert capsys.readouterr().err == "reading 3/3 file 2\n"


def test_progress_without_a_total(capsys):
    with progress("reading", every=0.0) as advance:
        advance(2)
        advance()
    assert capsys.readouterr().err == "reading 2\nreading 3\n"


def test_overrides():
    pairs = [
        "train.lr=1e-3",
        "train.steps=10",
        "method.target_modules=[q_proj, v_proj]",
        "name=a=b",
        "seed=",
        "x=true",
    ]
    assert parse_overrides(pairs) == {
        "train": {"lr": 1e-3, "steps": 10},
        "method": {"target_modules": ["q_proj", "v_proj"]},
        "name": "a=b",
        "seed": None,
        "x": True,
    }


@pytest.mark.parametrize("pair", ["", "lr", "=3", "train.=3", ".lr=3"])
def test_a_bad_override_says_how(pair):
    with pytest.raises(ConfigError, match=r"write key=value"):
        parse_overrides([pair])


def test_overrides_that_contradict_each_other():
    with pytest.raises(ConfigError, match="goes below 'train'"):
        parse_overrides(["train=1", "train.lr=2"])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("-2.5E4", -2.5e4), ("1e", "1e"), ("0x10", 16), ("~", None)]
)
def test_yaml_values(text, value):
    assert yaml_value(text) == value


def test_a_value_that_is_no_yaml():
    with pytest.raises(ConfigError, match="as a YAML value"):
        yaml_value("[1, 2")


def test_merged_leaves_both_alone():
    recipe, overrides = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 9}, "d": {"e": 4}}
    assert merged(recipe, overrides) == {"a": {"b": 9, "c": 2}, "d": {"e": 4}}
    assert recipe == {"a": {"b": 1, "c": 2}, "d": 3}


def test_read_recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("train: {lr: 0.1}\n")
    assert read_recipe(file, ["train.lr=2"]) == {"train": {"lr": 2}}
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping of sections, it holds list"):
        read_recipe(file)
    file.write_text("a: [\n")
    with pytest.raises(ConfigError, match="no valid YAML"):
        read_recipe(file)
