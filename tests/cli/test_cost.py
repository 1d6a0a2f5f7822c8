"""`modicum cost`: the table, prices from a file and from options."""

from __future__ import annotations

import pytest
from tests.cli.adapter_files import run
from tests.evaluate.test_spending import put, put_run, used


@pytest.fixture
def results(tmp_path):
    put_run(tmp_path / "runs" / "a", 3600.0, 10**9)
    return tmp_path / "runs"


def test_what_a_run_took(results, capsys):
    done = run(capsys, "cost", results)
    assert done.code == 0
    line = next(line for line in done.out.splitlines() if "/a " in line)
    for cell in ("run", "1", "2", "3.52 KiB", "0.01 kWh", "954 MiB"):
        assert f" {cell} " in line, cell
    assert "cost" not in done.out


def test_prices_of_a_file_and_of_options(results, tmp_path, capsys):
    (tmp_path / "prices.yaml").write_text("cpu_hour: 1.0\ngb_month: 0.5\ncurrency: EUR\n")
    command = ("cost", results, "--prices", tmp_path / "prices.yaml", "--cpu-hour", "0.25", "--json")
    cost = run(capsys, *command).json["total"]["cost"]
    assert cost["parts"] == {"cpu": 0.5, "gpu": None, "energy": None, "storage": 0.5}
    assert (cost["amount"], cost["currency"]) == (1.0, "EUR")
    (tmp_path / "compared.yaml").write_text("name: x\nprices:\n  cpu_hour: 1.0\n  currency: EUR\n")
    assert " 2 EUR " in run(capsys, "cost", results, "--prices", tmp_path / "compared.yaml").out


def test_what_is_missing_is_said(results, capsys):
    unread = used(60.0, energy_joules=None, energy_source=None, energy_note="processor: no RAPL package")
    put(results / "suite", "resources.json", {"attempts": [], "total": unread})
    out = run(capsys, "cost", results, "--kwh", "0.3", "--currency", "EUR").out
    assert "≥ 0 EUR" in out
    assert "a part with a price was not measured (energy: processor: no RAPL package)" in out


def test_prices_without_a_currency_are_refused(results, capsys):
    done = run(capsys, "cost", results, "--kwh", "0.3")
    assert done.code == 1
    assert "set currency" in done.err
