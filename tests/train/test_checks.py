"""What speaks against a recipe is said before its first stage begins, and leaves no folder behind."""

from __future__ import annotations

import pytest
from tests.small_checkpoints import recipe_values, write_jsonl

from modicum.errors import ConfigError, DataError, ModicumError
from modicum.train.checks import check_recipe
from modicum.train.pipeline import run_recipe
from modicum.train.recipe import make_recipe

SPACE = {"groups": [{"width": "mlp", "choices": [1.0, 0.5]}, {"rank": ["q_proj"], "choices": [4, 2]}]}
BAD_SPACE = {"groups": [{"rank": ["q_prj"], "choices": [4]}, {"width": "heads", "choices": [3]}]}


@pytest.fixture
def values(tmp_path):
    """A recipe with every stage, whose first one takes longest; each test breaks something that comes later."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{a}+{b}={a + b}\n" for a in range(20) for b in range(20)))
    short = {"calibration": str(text), "sequences": 2, "sequence_length": 24}
    found = recipe_values(tmp_path)
    rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(40)]
    for split, part in {"train": rows[:24], "validation": rows[24:32], "test": rows[32:]}.items():
        found["data"][split] = str(write_jsonl(tmp_path / f"{split}.jsonl", part))
    found["method"] = {"name": "elastic_lora", "r": 4}
    found |= {"sparsify": {**short, "evaluate": False}, "reorder": short, "elastic": {"space": SPACE}}
    return found | {"search": {"strategy": "heuristic", "max_rows": 4}, "extract": {}}


def fails(values, words, kind=ModicumError):
    recipe = make_recipe(values)
    with pytest.raises(kind, match=words) as error:
        run_recipe(recipe)
    assert not recipe.folder.exists()
    return str(error.value)


def test_a_space_that_does_not_fit(values):
    values["elastic"] = {"space": BAD_SPACE}
    fails(values, "'q_prj' .did you mean 'q_proj'.*3 query heads", ConfigError)


@pytest.mark.parametrize("ranks_alone", [True, False], ids=["ranks", "widths"])
def test_budgets_that_shapes_tell(ranks_alone, values):
    if ranks_alone:
        values["elastic"] = {"space": {"groups": SPACE["groups"][1:]}}
        del values["extract"]
    values["search"]["budgets"] = {
        "parameters": 0.1,
        "macs": 0.2,
        "bytes": 0.3,
        "memory": 0.4,
        "decode_time": 0.01,
    }
    said = fails(values, "no sub-network keeps the budgets", ConfigError)
    for name in ("parameters = 0.1", "macs = 0.2", "bytes = 0.3", "memory = 0.4"):
        assert f"budgets.{name}, the smallest sub-network takes" in said, name
    assert "decode_time" not in said


def test_bytes_of_a_low_bit_base_are_left_to_the_search(values):
    values["search"]["budgets"] = {"bytes": 0.1}
    with pytest.raises(ConfigError, match=r"budgets\.bytes = 0\.1"):
        check_recipe(make_recipe(values), {})
    values["quantize"] = {"group_size": 16, "evaluate": False}
    check_recipe(make_recipe(values), {})
    values["search"]["budgets"] |= {"parameters": 0.1}
    with pytest.raises(ConfigError, match=r"budgets\.parameters = 0\.1[^y]*$"):
        check_recipe(make_recipe(values), {})


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_that_must_not_be_searched_on(split, values):
    values["search"]["rows"] = values["data"][split]
    fails(values, f"are {split}(ing)? rows", DataError)


@pytest.mark.parametrize("stage", ["sparsify", "reorder", "quantize"])
def test_text_that_is_too_short_for_any_stage(stage, values, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("1+1=2")
    values.setdefault(stage, {"group_size": 16, "evaluate": False})
    values[stage] |= {"calibration": str(few), "sequence_length": 24}
    fails(values, r"few\.txt has 7 tokens, which is too short: one sequence takes 24")


def test_all_kinds_at_once(values, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("1+1=2")
    values["reorder"] |= {"calibration": str(few)}
    values["quantize"] = {"group_size": 7, "evaluate": False, "sequence_length": 500}
    values["elastic"] = {"space": BAD_SPACE}
    values["search"]["rows"] = str(write_jsonl(tmp_path / "no.jsonl", [{"question": "?"}]))
    said = fails(values, "cannot run to its end", ConfigError)
    for words in (
        "7 tokens, which is too short",
        "7",
        "at most 128 tokens",
        "q_prj",
        "3 query heads",
        "no.jsonl",
    ):
        assert words in said, words


def test_a_stage_that_is_finished_is_not_planned_again(values, tmp_path):
    recipe, folders = make_recipe(values), {"sparsify": "sparse"}
    check_recipe(recipe, folders)
    (tmp_path / "text.txt").unlink()
    with pytest.raises(DataError, match=r"text\.txt cannot be read"):
        check_recipe(recipe, {"reorder": "reordered"})
    with pytest.raises(ConfigError, match=r"cannot sparsify .*text\.txt cannot be read"):
        check_recipe(recipe, folders)
    (recipe.folder / "sparse").mkdir(parents=True)
    check_recipe(recipe, folders)
    with pytest.raises(ConfigError, match=r"text\.txt cannot be read"):
        check_recipe(recipe, folders, overwrite=True)
