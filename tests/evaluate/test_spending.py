"""What folders of results took: runs, sweeps, evaluations and bases, each counted once."""

from __future__ import annotations

import json

import pytest

from modicum.errors import DataError
from modicum.evaluate.resources import Prices
from modicum.evaluate.spending import spending


def used(seconds: float, **changes) -> dict:
    return {
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "gpu_seconds": None,
        "peak_memory_bytes": int(seconds),
        "peak_memory_scope": "run",
        "peak_gpu_memory_bytes": None,
        "energy_joules": 10 * seconds,
        "energy_source": "rapl",
        "energy_note": None,
        **changes,
    }


def put(folder, name: str, value: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def put_run(folder, seconds: float, stored: int, base: str = "embedded") -> None:
    put(
        folder,
        "report.json",
        {
            "kind": "run",
            "resources": used(seconds),
            "stored_bytes": {"weights": 1, "total": stored},
            "recipe": {"model": {"name_or_path": base}},
        },
    )


@pytest.fixture
def results(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"x" * 5000)
    root = tmp_path / "runs"
    put_run(root / "a", 100.0, 10, str(base))
    put_run(root / "b", 200.0, 20, str(base / ".." / "base"))
    for seed in (0, 1):
        put_run(root / "swept" / "lr=0.1" / f"seed={seed}", 1000.0, 3)
    put(root / "swept", "summary.json", {"kind": "sweep", "resources": used(2100.0)})
    put(root / "evaluated", "summary.json", {"suite": "s"})
    put(root / "evaluated", "resources.json", {"attempts": [], "total": used(50.0)})
    put(root / "broken" / "checkpoints", "resources-0.json", {"attempts": [], "total": used(7.0)})
    put(root / "broken" / "checkpoints", "resources-1.json", {"attempts": [], "total": used(8.0)})
    put(root / "a" / "later", "resources.json", {"attempts": [], "total": used(5.0)})
    return root


def test_every_thing_counts_once(results):
    found = spending([results, results / "a", results / "swept"])
    entries = {
        (entry["folder"].removeprefix(str(results)), entry["kind"]): entry for entry in found["entries"]
    }
    base = str(results.parent / "base")
    assert set(entries) == {
        ("/a", "run"),
        ("/a/later", "evaluation"),
        ("/b", "run"),
        ("/swept", "sweep"),
        ("/evaluated", "evaluation"),
        ("/broken", "unfinished run"),
        (base, "base"),
    }
    assert entries["/swept", "sweep"]["stored_bytes"] == 6
    assert entries[base, "base"]["stored_bytes"] == 5000
    assert entries["/broken", "unfinished run"]["resources"]["seconds"] == 8.0
    assert found["total"]["resources"]["seconds"] == 100 + 200 + 2100 + 50 + 8 + 5
    assert found["total"]["resources"]["peak_memory_bytes"] == 2100
    records = sum(
        (results / place / name).stat().st_size
        for place, name in (
            ("evaluated", "summary.json"),
            ("evaluated", "resources.json"),
            ("a/later", "resources.json"),
        )
    )
    assert found["total"]["stored_bytes"] == 10 + 20 + 6 + 5000 + records
    assert found["total"]["cost"] is None


def test_the_total_costs_what_the_entries_cost(results):
    price = Prices(cpu_hour=3600.0, kwh=3.6e6, gb_month=1e9, currency="EUR")
    found = spending([results], price, months=2.0)
    cost = found["total"]["cost"]
    seconds = found["total"]["resources"]["seconds"]
    stored = found["total"]["stored_bytes"]
    # the cores of the unfinished run worked at the same time
    cores = 2 * (seconds - 8 + 15)
    assert cost["parts"]["cpu"] == pytest.approx(cores)
    assert cost["parts"]["energy"] == pytest.approx(10 * (seconds - 8 + 15))
    assert cost["parts"]["storage"] == pytest.approx(2 * stored)
    assert cost["amount"] == pytest.approx(sum(entry["cost"]["amount"] for entry in found["entries"]))
    # no adapter is stored of a run that is not finished
    assert cost["missing"] == {"storage": "not measured"}


def test_a_sweep_that_is_not_finished_stands_as_its_runs(results):
    (results / "swept" / "summary.json").unlink()
    kinds = [entry["kind"] for entry in spending([results / "swept"])["entries"]]
    assert kinds == ["run", "run"]


def test_a_folder_without_results_is_named(results, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=f"evaluation in {tmp_path}/none, {tmp_path}/gone: they are known"):
        spending([results, tmp_path / "none", tmp_path / "gone"])
