"""A fleet's YAML is checked as a whole, with lines and the nearest right names."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from tests.fleet import fleets

from modicum.errors import ConfigError
from modicum.fleet.spec import load_fleet, make_fleet

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "model": {"name_or_path": "embedded"},
    "users": {"source": "users.jsonl"},
    "store": {"path": "store"},
}


def changed(section: str, **values):
    made = copy.deepcopy(VALUES)
    made[section] = {**made.get(section, {}), **values}
    return made


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "fleet").glob("*.yaml")), ids=lambda path: path.stem
)
def test_fleets_that_ship_are_valid(path):
    assert load_fleet(path).metric == "loss"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (changed("users", colum="id"), "did you mean 'column'"),
        (changed("users", held_out=0.6, test=0.5), "nothing to train on"),
        (changed("data", train="x"), "data.train has no meaning for users"),
        (changed("method", name="lora_sx"), "did you mean 'lora_xs'"),
        (changed("method", name="qa_lora"), "no cohorts of 'qa_lora'"),
        (changed("method", dropout=0.1), "who shares a batch"),
        (changed("method", name="lora", use_dora=True), "plain LoRA"),
        (changed("method", rank=4), "has no option 'rank'"),
        (changed("train", metric="accurracy"), "no metric 'accurracy'"),
        (changed("train", min_steps=9, max_steps=8), "min_steps is above"),
        (changed("train", epochs=0), "epochs"),
        (changed("store", name="all"), "gives every user one name"),
        (changed("store", name="{usr}"), "did you mean 'user'"),
        (changed("store", name="{user"), "cannot be read"),
        (changed("store", dtype="float8"), "store.dtype"),
        (changed("model", task="regression"), "not regression"),
        (changed("model", task="seq_cls"), "model.num_labels"),
        ({**VALUES, "ranks": {10: 4}}, "adapters of lora_xs share one rank"),
        ({"model": {}}, "users is missing"),
    ],
)
def test_faults_are_named(values, said):
    with pytest.raises(ConfigError, match=said.replace("{", r"\{").replace("}", r"\}")):
        make_fleet(values)


def test_all_faults_come_at_once_with_their_lines(tmp_path):
    file = tmp_path / "fleet.yaml"
    file.write_text(
        "model:\n  name_or_path: embedded\nusers:\n  source: x\n  test: 0.9\nstore:\n  path: s\n  name: x\n"
    )
    with pytest.raises(ConfigError) as error:
        load_fleet(file)
    lines = str(error.value).splitlines()
    assert [line.split(":")[1] for line in lines] == ["5", "8"]


def test_no_early_stopping_without_rows_to_judge_by():
    values = changed("users", held_out=0.0) | {"train": {"early_stopping_patience": 2}}
    with pytest.raises(ConfigError, match="needs held-out rows"):
        make_fleet(values)


def test_overrides_and_defaults(tmp_path):
    file = tmp_path / "night.yaml"
    file.write_text("model: {name_or_path: embedded}\nusers: {source: x}\nstore: {path: s}\n")
    spec = load_fleet(file, ["train.epochs=5", "method.r=8"])
    assert spec.train.epochs == 5
    assert spec.learning_rate == pytest.approx(8e-3)
    assert spec.folder == Path("runs/night")
    with pytest.raises(ConfigError, match="cannot read the override"):
        load_fleet(file, ["train.epochs"])


def test_the_digest_changes_with_what_changes_numbers_alone():
    spec = fleets.spec()
    assert spec.digest() == fleets.spec(output="elsewhere", train={"cohort_size": 3}).digest()
    assert spec.digest() == fleets.spec(store={"alias": "production"}).digest()
    assert spec.digest() != fleets.spec(train={"seed": 1}).digest()
    assert spec.digest() != fleets.spec(store={"dtype": "bfloat16"}).digest()


def test_ranks_by_rows():
    spec = fleets.spec("lora", ranks={5: 2, 50: 16})
    assert [spec.rank_of(rows) for rows in (1, 5, 49, 50, 500)] == [4, 2, 2, 16, 16]
    assert spec.all_ranks == [2, 4, 16]
