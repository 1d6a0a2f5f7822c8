"""`modicum ab`: what it prints, as a table and as JSON."""

from __future__ import annotations

import pytest
from tests.cli.adapter_files import run
from tests.evaluate.record_files import records


@pytest.fixture
def folders(tmp_path):
    kinds = [{"subject": "art" if i < 30 else "law"} for i in range(60)]
    outcomes = {"first": [1.0] * 60, "second": [0.0] * 12 + [1.0] * 48, "third": [0.0] * 11 + [1.0] * 49}
    for name, correct in outcomes.items():
        records(correct, [2.0 - c for c in correct], slices=kinds).write(tmp_path / name / "x.parquet")
        records(correct[:20], [1.0] * 20, task="y").write(tmp_path / name / "y.parquet")
    return tmp_path


def test_a_table(folders, capsys):
    shown = run(capsys, "ab", folders / "first", folders / "second", "--slice", "subject")
    assert shown.code == 0
    parts = [
        "correct: first against second, intervals at 95%", "correct by task", "correct by slice", "subject = law",
        "McNemar", "100.0 %", "p corrected for 2 comparisons", "24 : 0", "points",
    ]  # fmt: skip
    for part in parts:
        assert part in shown.out, part
    assert (
        "first is better than second with 80 items (first 100.0 %, second 70.0 %, +30.0 points [" in shown.out
    )
    # only one row: nothing to correct for
    assert "corrected for 1" not in shown.out


def test_losses(folders, capsys):
    for metric, part in (("loss", "nats"), ("perplexity", "× ")):
        out = run(capsys, "ab", folders / "first", folders / "second", "--metric", metric, "--alpha", 0.1).out
        assert part in out
        assert "intervals at 90%" in out
        assert "permutation" in out


def test_json(folders, capsys):
    found = run(capsys, "ab", *(folders / name for name in ("first", "second", "third")), "--json").json
    assert found["metric"] == "correct"
    assert [row["better"] for row in found["overall"]] == ["first", "first", None]
    assert len(found["tasks"]) == 6
    assert "you would need about" in found["overall"][2]["sentence"]
    # infinite odds are no JSON
    assert found["overall"][0]["effect"]["odds"] is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["first"], "name the records of two or more"),
        (["first", "none.parquet"], "no records"),
        (["first", "second/x.parquet"], "only first has the tasks y"),
        (["first", "second", "--slice", "topic"], "no slice 'topic'; the items have subject"),
        (["first", "second", "--metric", "corect"], "did you mean 'correct'"),
    ],
)
def test_bad_input(folders, words, told, capsys):
    done = run(
        capsys,
        "ab",
        *(word if "-" in word or not (folders / word).exists() else folders / word for word in words),
    )
    assert done.code == 1
    assert told in done.err
