"""The bundled tasks: reproducible, small, splits apart, and what the metadata says."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from modicum.data import bundled
from modicum.data.options import DataOptions
from modicum.data.prepare import load_splits
from modicum.errors import DataError

ROOT = Path(__file__).parents[2]


def read(name, split):
    return [json.loads(line) for line in bundled.path(name, split).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def generator(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return runpy.run_path(str(ROOT / "scripts/make_bundled_task.py"))


def test_the_script_writes_the_same_bytes(generator, tmp_path):
    generator["write"](tmp_path)
    for split in bundled.SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == bundled.path("notes", split).read_bytes()


@pytest.mark.parametrize("name", bundled.names())
def test_rows_are_as_described(name):
    task = bundled.task(name)
    for split, count in task.rows.items():
        rows = read(name, split)
        assert len(rows) == count
        for row in rows:
            assert set(row) == {task.prompt, task.completion}
            assert len(row[task.completion].split(task.separator)) == len(task.parts)


def test_texts_are_prompts_with_their_completions():
    texts = bundled.texts("notes", "test")
    assert texts == [row["prompt"] + row["completion"] for row in read("notes", "test")]


@pytest.mark.parametrize("name", bundled.names())
def test_no_prompt_occurs_twice(name):
    prompts = [row["prompt"] for split in bundled.SPLITS for row in read(name, split)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", bundled.names())
def test_the_task_is_small(name):
    assert sum(file.stat().st_size for file in bundled.path(name, "train").parent.iterdir()) < 400_000


def test_splits_hold_out_templates_and_things(generator):
    templates, splits = generator["TEMPLATES"], generator["TEMPLATE_SPLITS"]
    for kind in templates.values():
        assert len(set(kind)) == len(kind)
        assert sum(len(kind[part]) for part in splits.values()) == len(kind)
    things = {split: set(generator["things_of"](split)) for split in bundled.SPLITS}
    assert not things["train"] & things["test"]
    assert not things["train"] & things["validation"]
    assert not things["validation"] & things["test"]
    seen = {row["completion"].split(";")[2].split()[-1] for row in read("notes", "train")}
    assert seen == things["train"]


def test_the_card_says_what_the_files_are(generator):
    card = (bundled.path("notes", "train").parents[1] / "README.md").read_text(encoding="utf-8")
    for split, count in bundled.task("notes").rows.items():
        assert f"| `notes/{split}.jsonl` | {count:,} |" in card
    assert f"Templates (12 for each kind) and things ({len(generator['THINGS'])})" in card
    assert {len(kind) for kind in generator["TEMPLATES"].values()} == {12}
    example = next(row for row in read("notes", "test") if row["completion"] == " move; five; carts; Friday")
    assert json.dumps(example["prompt"]) in card


def test_unknown_names_are_refused_with_advice():
    with pytest.raises(DataError, match="did you mean 'notes'"):
        bundled.path("note", "train")
    with pytest.raises(DataError, match="did you mean 'validation'"):
        bundled.path("notes", "valid")


def test_the_metadata_needs_no_torch():
    code = "import sys; from modicum.data import bundled; bundled.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_named_split_stands_for_itself_alone():
    splits = load_splits(DataOptions(train="bundled:notes/train"))
    assert list(splits) == ["train"]
    assert set(load_splits(DataOptions(train="bundled:notes"))) == {"train", "validation", "test"}
