"""`modicum gate`: the table, the files, and the exit code."""

from __future__ import annotations

import json

import pytest
from tests.cli.adapter_files import run
from tests.evaluate.record_files import records


@pytest.fixture
def gates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records([1.0] * 90 + [0.0] * 10).write(tmp_path / "a.parquet")

    def write(*lines):
        (tmp_path / "gates.yaml").write_text("gates:\n" + "".join(f"  - {line}\n" for line in lines))
        return tmp_path / "gates.yaml"

    return write


def test_all_gates_pass(gates, tmp_path, capsys):
    file = gates("metric: {records: a.parquet, at_least: 90 %}", "size: {path: a.parquet, at_most: 60 KB}")
    done = run(capsys, "gate", file, "--junit", "ci/gates.xml", "--json-report", "ci/gates.json")
    assert done.code == 0
    assert "all 2 gates passed." in done.out
    assert "at most 60,000 bytes" in done.out
    assert 'failures="0" errors="0"' in (tmp_path / "ci" / "gates.xml").read_text()
    assert json.loads((tmp_path / "ci" / "gates.json").read_text())["passed"]


def test_one_gate_fails_and_one_cannot_be_measured(gates, tmp_path, capsys):
    sizes = [f"size: {{path: {path}, at_most: 60 KB}}" for path in ("gone", "a.parquet")]
    file = gates("metric: {records: a.parquet, at_least: 91 %}", *sizes)
    done = run(capsys, "gate", file, "--junit", "gates.xml")
    assert done.code == 1
    assert "2 of 3 gates failed." in done.out
    assert "nothing at gone" in done.out
    assert 'failures="1" errors="1"' in (tmp_path / "gates.xml").read_text()
    found = run(capsys, "gate", file, "--json")
    assert found.code == 1
    assert [verdict["passed"] for verdict in found.json["verdicts"]] == [False, False, True]


def test_a_wrong_file_writes_nothing(gates, tmp_path, capsys):
    file = gates("sizes: {path: a.parquet, at_most: 60 KB}")
    done = run(capsys, "gate", file, "--junit", "gates.xml")
    assert done.code == 1
    assert "gate 1 sizes: no such option (did you mean 'size'?)" in done.err
    assert not (tmp_path / "gates.xml").exists()
