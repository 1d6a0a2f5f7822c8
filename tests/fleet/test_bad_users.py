"""What is wrong with a user's rows is told of that user, and the others go on."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pytest
from pyarrow import parquet
from tests.fleet import fleets
from tests.fleet.test_job import contents, spec_in

import modicum.fleet.gather as gathering
from modicum.data.files import stream
from modicum.errors import ConfigError, DataError
from modicum.fleet.job import train_fleet
from modicum.fleet.ledger import Ledger
from modicum.store import Store

GOOD = [{"prompt": f"{n}+1=", "completion": "xx"} for n in range(6)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def of(user, rows):
    return [{"user": user, **row} for row in rows]


def outcome(folder):
    rows = parquet.read_table(folder / "users.parquet").to_pylist()
    return {row["user"]: (row["state"], row["fault"] or row["notes"]) for row in rows}


def test_every_kind_of_bad_user_in_one_table(tmp_path):
    rows = [
        *of("good", GOOD),
        *of("one", GOOD[:1]),
        *of("empty", [{"prompt": "", "completion": " "}] * 3),
        *of("half", [*GOOD[:3], {"prompt": "a", "completion": ""}, {"prompt": "a", "completion": 7}]),
        *of("long", [{"prompt": "a", "completion": "b" * 300}] * 3),
        *of("a b", GOOD),
        *of(None, GOOD[:1]),
        *of("", GOOD[:1]),
        *of(12, GOOD),
    ]
    source = write(tmp_path / "users.jsonl", rows)
    with source.open("a") as stream:
        stream.write("{broken\n")
    spec = spec_in(tmp_path, rows=source)
    report = train_fleet(spec).report
    found = outcome(tmp_path / "run")
    assert {user: state for user, (state, _) in found.items()} == {
        "good": "stored", "one": "faulty", "empty": "faulty", "half": "stored", "long": "stored", "a b": "faulty",
        "12": "stored",
    }  # fmt: skip
    assert "1 row that can be used" in found["one"][1]
    assert "no row that can be used" in found["empty"][1]
    assert "2 of 5 rows left out" in found["half"][1]
    assert "the completion is empty" in found["half"][1]
    assert "holds 7, must be a string" in found["half"][1]
    assert "3 rows are longer than 64 tokens and were cut" in found["long"][1]
    assert "take {slug}" in found["a b"][1].lower()
    assert report["unread"]["rows"] == 3
    assert "no JSON" in report["unread"]["first"][2]
    assert {name.partition("@")[0] for name in contents(spec.store.path)} == {"good", "half", "long", "12"}


def test_ids_in_several_files(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    write(folder / "a.jsonl", [*of("ada", GOOD), *of("bob", GOOD)])
    parquet.write_table(pa.Table.from_pylist(of("ada", GOOD) + of("eve", GOOD)), folder / "b.parquet")
    train_fleet(spec_in(tmp_path, rows=folder))
    found = outcome(tmp_path / "run")
    said = "the id is in a.jsonl and in b.parquet: one user or two? Set users.join_files if it is one"
    assert found["ada"] == ("faulty", said)
    assert found["bob"][0] == found["eve"][0] == "stored"
    train_fleet(spec_in(tmp_path, rows=folder, users={"join_files": True}), overwrite=True)
    table = parquet.read_table(tmp_path / "run" / "users.parquet").to_pylist()
    assert {row["user"]: row["rows_given"] for row in table} == {"ada": 12, "bob": 6, "eve": 6}


def test_a_file_for_each_user(tmp_path):
    folder = tmp_path / "people"
    (folder / "north").mkdir(parents=True)
    write(folder / "ada.jsonl", GOOD)
    write(folder / "north" / "bob.jsonl", GOOD)
    (folder / "eve.jsonl.gz").write_bytes(gzip.compress(b"x" * 200)[:20])
    (folder / "notes.docx").write_text("not looked at")
    (folder / "nobody.jsonl").write_text("")
    spec = spec_in(tmp_path, rows=folder, users={"column": None})
    train_fleet(spec)
    found = outcome(tmp_path / "run")
    assert {user: state for user, (state, _) in found.items()} == {
        "ada": "stored", "north/bob": "stored", "eve": "faulty", "nobody": "faulty",
    }  # fmt: skip
    assert "no row that can be used" in found["nobody"][1]
    assert "cannot be read" in found["eve"][1]


def test_texts_that_are_too_long_are_divided(tmp_path):
    rows = [*of("long", [{"text": "xy" * 100}] * 4), *of("short", [{"text": "xy" * 10}] * 4)]
    spec = spec_in(tmp_path, rows=write(tmp_path / "users.jsonl", rows), data={"format": "text"})
    train_fleet(spec)
    found = outcome(tmp_path / "run")
    assert {user: state for user, (state, _) in found.items()} == {"long": "stored", "short": "stored"}
    assert "longer than 64 tokens were divided: 4 rows became" in found["long"][1]
    assert found["short"][1] is None


def test_rows_longer_than_the_model_can_take_are_refused_at_once(tmp_path):
    spec = spec_in(tmp_path, (4,), data={"max_length": 100_000})
    with pytest.raises(ConfigError, match=r"data.max_length = 100000 is more than the \d+ positions of"):
        train_fleet(spec)
    assert contents(spec.store.path) == {}


def test_a_table_as_parquet(tmp_path):
    rows = [*of("ada", GOOD), *of("bob", GOOD[:1])]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "users.parquet")
    train_fleet(spec_in(tmp_path, rows=tmp_path / "users.parquet"))
    assert {user: state for user, (state, _) in outcome(tmp_path / "run").items()} == {
        "ada": "stored", "bob": "faulty",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_table_is_read_in_pieces(tmp_path, monkeypatch, kind):
    rows = [row for user in range(10) for row in of(f"u{user}", GOOD)]
    if kind == "jsonl":
        source = write(tmp_path / "users.jsonl", rows)
    else:
        source = tmp_path / "users.parquet"
        parquet.write_table(pa.Table.from_pylist(rows), source)
    pulled, when = [], []

    def counted(file):
        for one in stream(file):
            pulled.append(one)
            yield one

    add_rows = Ledger.add_rows

    def added(self, *given):
        when.append(len(pulled))
        add_rows(self, *given)

    monkeypatch.setattr(Ledger, "add_rows", added)
    monkeypatch.setattr(gathering, "stream", counted)
    monkeypatch.setattr(gathering, "_CHUNK", 12)
    spec = spec_in(tmp_path, rows=source)
    with Store(spec.store.path, create=True) as store, Ledger(tmp_path / "ledger") as ledger:
        assert gathering.gather(spec, ledger, store) == 10
        assert [one.rows for one in ledger.users()] == [6] * 10
    # two users in every twelve rows, which are written before the next ones are read
    assert when == [12, 12, 24, 24, 36, 36, 48, 48, 60, 60]


def test_two_users_cannot_share_a_name(tmp_path):
    rows = write(tmp_path / "users.jsonl", [*of("a b", GOOD), *of("a-b", GOOD), *of("c", GOOD)])
    train_fleet(spec_in(tmp_path, rows=rows, store={"name": "{slug}"}))
    found = outcome(tmp_path / "run")
    assert [found[user][0] for user in ("a b", "a-b", "c")] == ["faulty", "faulty", "stored"]


def test_labels_that_were_never_seen(tmp_path):
    from tests.small_checkpoints import _saved, bert
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(0)
    base = _saved(AutoModelForSequenceClassification.from_pretrained(bert(), num_labels=3), "bert-with-head")
    labelled = [{"sentence": "ab" * (n + 1), "label": n % 2} for n in range(8)]
    rows = [
        *of("good", labelled),
        *of("unknown", [*labelled, {"sentence": "x", "label": 7}]),
        # data.seed = 0 holds out the third and the fifth of five rows
        *of("new", [{"sentence": "ab" * (n + 1), "label": 2 if n in (2, 4) else 1} for n in range(5)]),
    ]
    spec = spec_in(
        tmp_path,
        rows=write(tmp_path / "users.jsonl", rows),
        model={"name_or_path": str(base), "task": "seq_cls", "num_labels": 3},
        users={"held_out": 0.4},
    )
    train_fleet(spec)
    table = parquet.read_table(tmp_path / "run" / "users.parquet").to_pylist()
    notes = {row["user"]: row["notes"] for row in table}
    assert notes["good"] is None
    assert "1 of 9 rows left out" in notes["unknown"]
    assert "label 7 is not in 0..2" in notes["unknown"]
    assert "labels that no training row has" in notes["new"]
    assert all(row["state"] in ("stored", "base") for row in table)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("users.jsonl", '{"usr": "a", "text": "b"}\n', "did you mean 'usr'"),
        ("users.xlsx", "", "unknown file type"),
        ("users.parquet", "no", "no readable Parquet"),
        ("users.jsonl", "", "holds no row of any user"),
    ],
)
def test_tables_without_users(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    spec = spec_in(tmp_path, rows=tmp_path / name)
    with pytest.raises(DataError, match=said):
        train_fleet(spec)
    # nothing was begun that a second attempt would trip over
    fleets.table(tmp_path / "right.jsonl", (4,))
    train_fleet(spec_in(tmp_path, rows=tmp_path / "right.jsonl"), overwrite=True)


def test_a_source_that_is_not_there(tmp_path):
    fleets.table(tmp_path / "users.jsonl", (4,))
    with pytest.raises(DataError, match=r"did you mean 'users\.jsonl'"):
        train_fleet(spec_in(tmp_path, rows=tmp_path / "user.jsonl"))
