"""Rows from every format, and messages that say what is wrong with a file."""

from __future__ import annotations

import gzip
import json
import lzma

import pytest

from modicum.data.files import has_split, load_rows
from modicum.data.options import DataOptions
from modicum.data.prepare import load_splits
from modicum.errors import DataError

ROWS = [{"text": "one\nline", "label": 1}, {"text": "zwei, ü", "label": 0}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path, kind):
    if kind == "csv":
        path.write_text('text,label\n"one\nline",1\n"zwei, ü",0\n', encoding="utf-8")
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    elif kind == "jsonl.xz":
        path.write_bytes(lzma.compress(LINES.encode()))
    else:
        path.write_text(LINES)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.xz", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    rows = load_rows(str(write(tmp_path / f"rows.{kind}", kind)))
    assert [{**row, "label": int(row["label"])} for row in rows.rows] == ROWS
    assert rows.columns == ["text", "label"]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    assert load_rows(str(tmp_path / "a.txt")).rows == [{"text": "first\n\nsecond\n"}]


def test_folders_keep_splits_by_name(tmp_path):
    write(tmp_path / "train.jsonl", "jsonl")
    write(tmp_path / "dev.jsonl.gz", "jsonl.gz")
    assert has_split(str(tmp_path), "validation")
    assert not has_split(str(tmp_path), "test")
    with pytest.raises(DataError, match="holds no test rows: expected a file named test"):
        load_rows(str(tmp_path), "test")
    found = load_splits(DataOptions(train=str(tmp_path)))
    assert set(found) == {"train", "validation"}


def test_folders_without_split_names_are_read_whole(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, "jsonl")
    rows = load_rows(str(tmp_path))
    assert [place[0] for place in rows.places] == ["a.jsonl"] * 2 + ["b.jsonl"] * 2


def test_bundled_tasks_bring_all_their_splits():
    found = load_splits(DataOptions(train="bundled:notes", max_rows=5, max_eval_rows=3))
    assert {name: len(rows) for name, rows in found.items()} == {"train": 5, "validation": 3, "test": 3}
    with pytest.raises(DataError, match="did you mean 'notes'"):
        load_rows("bundled:note")


def test_unreadable_rows_are_listed_with_file_and_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"a": 1}\n{"a": \n\n[1]\n')
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    message = str(caught.value)
    assert message.startswith("2 unreadable rows: ")
    assert "bad.jsonl:2: no JSON" in message
    assert "bad.jsonl:4: a JSON list, must be an object" in message


def test_short_and_long_rows_of_a_csv_are_listed(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("a,b\n1\n1,2,3\n1,2\n")
    with pytest.raises(DataError) as caught:
        load_rows(str(path))
    assert "bad.csv:2: 1 cells, the header names 2" in str(caught.value)
    assert "bad.csv:3: 3 cells, the header names 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.txt", b" \n", "holds no rows"),
        ("a.jsonl.gz", b"no gzip", "damaged or not what its name says"),
        ("a.jsonl.xz", lzma.compress(b"{}")[:-5], "damaged or not what its name says"),
        ("a.jsonl", b"\xff\xfe", "damaged or not what its name says"),
        ("a.parquet", b"PAR1", "no readable Parquet"),
        ("a.jsnl", b"{}", r"unknown file type '.jsnl' \(did you mean '.jsonl'"),
        ("a", b"{}", "unknown file type ''"),
    ],
)
def test_broken_files(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        load_rows(str(tmp_path / name))


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "train.jsonl", "jsonl")
    with pytest.raises(DataError, match=r"did you mean 'train.jsonl'"):
        load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        load_rows(str(tmp_path / "nowhere" / "train.jsonl"))


def test_samples_are_drawn_by_seed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(50)))
    rows = load_rows(str(path))
    first, again, other = (rows.sample(10, seed).rows for seed in (0, 0, 1))
    assert first == again != other
    assert [row["n"] for row in first] == sorted(row["n"] for row in first)


def test_a_share_of_the_training_rows_can_be_set_aside(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(50)))
    found = load_splits(DataOptions(train=str(path), validation_fraction=0.2))
    held, kept = ({row["n"] for row in found[name].rows} for name in ("validation", "train"))
    assert len(held) == 10
    assert held | kept == set(range(50))
    assert not held & kept
    with pytest.raises(DataError, match="leaves one side empty"):
        load_splits(DataOptions(train=str(path), validation_fraction=0.001))
