"""What the entry of a cell says of energy and money, and what trackers are told of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.compare.small import comparison_values, write

from modicum.compare.result import Run, _used
from modicum.compare.run import run_comparison
from modicum.compare.spec import load_comparison

PRICES = {"cpu_hour": 0.5, "kwh": 0.25, "gb_month": 2.0, "currency": "EUR"}


def run(seed, joules, workers=1):
    """A finished run that took half an hour of one core, and so many joules; None where nothing told them."""
    used = {
        "cpu_seconds": 1800.0,
        "gpu_seconds": None,
        "peak_memory_bytes": 100 + seed,
        "peak_gpu_memory_bytes": None,
        "energy_joules": joules,
        "energy_source": None if joules is None else "rapl",
        "energy_note": "only root may read it" if joules is None else None,
    }
    report = {"resources": used, "timing": {"train_seconds": 2.0 + seed}}
    return Run(1e-3, seed, Path(), report, None, workers)


@pytest.fixture
def spec(tmp_path):
    return load_comparison(write(tmp_path, comparison_values(tmp_path, prices=PRICES)))


def test_energy_and_money_where_all_runs_were_measured(spec):
    found = _used([run(0, 3.6e6), run(1, 7.2e6)], 500_000_000, spec)
    assert (found["energy_joules"], found["energy_source"]) == (5.4e6, "rapl")
    assert found["cost"]["parts"] == {"cpu": 0.25, "gpu": None, "energy": 0.375, "storage": 1.0}
    assert (found["cost"]["amount"], found["cost"]["currency"]) == (1.625, "EUR")
    assert found["cost"]["missing"] == {}
    assert (found["train_seconds"]["value"], found["peak_memory_bytes"]) == (2.5, 101)


def test_no_mean_of_the_runs_that_happened_to_be_measured(spec):
    found = _used([run(0, 3.6e6), run(1, None)], 500_000_000, spec)
    assert (found["energy_joules"], found["energy_source"]) == (None, None)
    assert found["cost"]["amount"] == 1.25
    assert found["cost"]["missing"] == {"energy": "only root may read it"}


def test_runs_that_shared_the_machine_have_no_energy(spec):
    found = _used([run(0, 3.6e6, workers=2), run(1, 7.2e6, workers=2)], 500_000_000, spec)
    assert found["energy_joules"] is None
    assert "several runs shared the machine" in found["cost"]["missing"]["energy"]


def test_no_money_without_prices(tmp_path):
    spec = load_comparison(write(tmp_path, comparison_values(tmp_path)))
    assert _used([run(0, 3.6e6)], 500_000_000, spec)["cost"] is None


def test_trackers_get_every_run_and_the_means_of_the_cell(tmp_path):
    pytest.importorskip("trackio")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trackio.sqlite_storage import SQLiteStorage

    methods = {"lora": {"r": 1, "lora_alpha": 4, "learning_rate": [2e-2]}}
    values = comparison_values(tmp_path, methods=methods, compressions={"none": {}})
    values["recipe"]["train"]["report_to"] = ["trackio", "tensorboard"]
    found = run_comparison(load_comparison(write(tmp_path, values))).comparison
    (cell,) = found["cells"]
    sweep = tmp_path / "out" / "cells" / "none" / "lora"
    report = json.loads((sweep / "lr=0.02" / "seed=1" / "report.json").read_text())
    for folder, name, value in (
        (sweep, "test/loss", cell["metrics"]["loss"]["value"]),
        (sweep, "test/loss/high", cell["metrics"]["loss"]["high"]),
        (sweep / "lr=0.02" / "seed=1", "validation/loss", report["metrics"]["validation"]["loss"]),
    ):
        (tensor,) = EventAccumulator(str(folder / "logs")).Reload().Tensors(name)
        assert tensor.tensor_proto.double_val[0] == pytest.approx(value), name
        assert SQLiteStorage.get_logs("modicum", str(folder))[-1][name] == pytest.approx(value), name
