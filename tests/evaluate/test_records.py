"""Records of an evaluation: written, read, continued and compared."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modicum.errors import DataError
from modicum.evaluate.records import Header, Item, Records, digest_of, faults_between

IDS = ("t-0", "t-1", "t-2")
HEADER = Header(
    protocol="llm-adapters",
    protocol_version="1",
    suite="commonsense",
    task="piqa",
    template="ab" * 16,
    model="embedded",
    adapter=None,
    base_fingerprint="cd" * 16,
    items=digest_of(IDS),
    decoding={"num_beams": 4, "max_new_tokens": 32},
    created_with="modicum 0",
    rows="0a" * 16,
)
ITEMS = [
    Item("t-0", 1.0, 2.5, 3, "solution1", "solution1", slices={"subject": "é"}),
    Item("t-1", 0.0, prediction="", reference="solution2", matched=False),
    Item("t-2", None, 1e-30, 1),
]


@pytest.fixture
def records():
    return Records(HEADER, list(ITEMS))


def test_what_is_written_is_read(records, tmp_path):
    path = tmp_path / "deep" / "piqa.parquet"
    records.write(path)
    assert Records.read(path) == records
    assert [file.name for file in path.parent.iterdir()] == ["piqa.parquet"]
    table = pq.read_table(path)
    assert table.column_names[:3] == ["task", "item", "correct"]
    assert table["task"].to_pylist() == ["piqa"] * 3
    assert table["loss"].to_pylist() == [2.5, None, 1e-30]
    assert b"llm-adapters" in table.schema.metadata[b"modicum"]


def test_empty_records_can_be_written(tmp_path):
    Records(HEADER).write(tmp_path / "a.parquet")
    assert len(Records.read(tmp_path / "a.parquet")) == 0


def test_a_failed_write_leaves_the_old_file(records, tmp_path):
    path = tmp_path / "a.parquet"
    records.write(path)
    broken = Records(HEADER, [Item("t-0", "no number")])
    with pytest.raises(pa.ArrowException):
        broken.write(path)
    assert Records.read(path) == records
    assert len(list(tmp_path.iterdir())) == 1


def test_columns_as_arrays(records):
    np.testing.assert_array_equal(records.column("correct"), [1, 0, np.nan])
    np.testing.assert_array_equal(records.column("tokens"), [3, np.nan, 1])
    np.testing.assert_array_equal(records.column("matched"), [1, 0, 1])
    assert records.column("item").tolist() == list(IDS)
    assert records.slice_of("subject") == ["é", None, None]


def test_an_item_is_recorded_once(records):
    with pytest.raises(DataError, match="twice: t-1"):
        records.append([Item("t-9"), Item("t-1")])
    assert "t-9" not in records
    with pytest.raises(DataError, match="twice: t-8"):
        records.append([Item("t-8"), Item("t-8")])


def test_complete_when_every_item_is_there():
    part = Records(HEADER, ITEMS[:2])
    assert not part.complete
    part.append(ITEMS[2:])
    assert part.complete


def test_the_digest_does_not_depend_on_the_order():
    assert digest_of(IDS) == digest_of(reversed(IDS)) != digest_of(IDS[:2])


def test_records_continue_under_the_same_conditions(records):
    more = replace(HEADER, items=digest_of([*IDS, "t-3"]), suite="another")
    continued = records.resumed(more, [*IDS, "t-3"])
    assert continued.items == records.items
    assert continued.header == more
    assert not continued.complete


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "lm-eval"},
        {"template": "ef" * 16},
        {"adapter": "other"},
        {"base_fingerprint": "0"},
        {"decoding": {}},
        {"rows": "0b" * 16},
    ],
)
def test_records_do_not_continue_under_others(records, change):
    with pytest.raises(DataError, match=f"{next(iter(change))} differs"):
        records.resumed(replace(HEADER, **change), IDS)


def test_records_do_not_continue_with_other_items(records):
    with pytest.raises(DataError, match=r"does not have.*: t-2"):
        records.resumed(HEADER, IDS[:2])


def test_comparable_whatever_the_model(records):
    other = Records(replace(HEADER, model="other", adapter="a"), [replace(one, correct=0.5) for one in ITEMS])
    assert faults_between(records, other) == []


@pytest.mark.parametrize(
    "change",
    [{"protocol": "lm-eval"}, {"protocol_version": "2"}, {"task": "boolq"}, {"template": "0"}, {"rows": "0"}],
)
def test_not_comparable_under_other_conditions(records, change):
    (fault,) = faults_between(records, Records(replace(HEADER, **change), list(ITEMS)))
    assert fault.startswith(f"{next(iter(change))} differs")


def test_records_from_before_there_was_a_digest_of_the_rows(records, tmp_path):
    path = tmp_path / "piqa.parquet"
    records.write(path)
    table = pq.read_table(path)
    values = json.loads(table.schema.metadata[b"modicum"])
    del values["rows"]
    pq.write_table(table.replace_schema_metadata({b"modicum": json.dumps(values)}), path)
    old = Records.read(path)
    assert old.header == replace(HEADER, rows="")
    # what is not known is no difference
    assert faults_between(old, records) == faults_between(records, old) == []
    assert old.resumed(HEADER, IDS).header == HEADER
    pq.write_table(table.replace_schema_metadata({b"modicum": json.dumps({**values, "row": ""})}), path)
    with pytest.raises(DataError, match=r"another version \(modicum 0\): header row$"):
        Records.read(path)


def test_not_comparable_with_other_items(records):
    (fault,) = faults_between(records, Records(HEADER, ITEMS[1:]))
    assert "1 only in the first, 0 only in the second (t-0)" in fault


def test_files_that_hold_no_records(records, tmp_path):
    with pytest.raises(DataError, match="no records"):
        Records.read(tmp_path / "none.parquet")
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="damaged"):
        Records.read(bad)
    pq.write_table(pa.table({"x": [1]}), bad)
    with pytest.raises(DataError, match="it has x"):
        Records.read(bad)
