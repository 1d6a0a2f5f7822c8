"""Resources of a stretch of a program, and what they cost."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import ConfigError
from modicum.evaluate.resources import (
    Prices,
    ResourceFile,
    Resources,
    cost,
    reset_peaks,
    together,
    total,
    total_cost,
)

MIB = 2**20


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_processor_time_is_the_time_computed_and_not_the_time_slept():
    with Resources() as used:
        began = time.process_time()
        time.sleep(0.3)
        burn(0.2)
        own = time.process_time() - began
    found = used.as_dict()
    assert found["seconds"] >= 0.5
    # the grain of the system's clock is 10 ms
    assert found["cpu_seconds"] == pytest.approx(own, abs=0.05)
    assert found == used.as_dict()


def test_children_count_while_they_run_and_after_they_ended():
    command = (
        "import time, sys\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\nsys.stdin.read()"
    )
    with Resources() as used:
        child = subprocess.Popen(
            [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        child.stdout.readline()
        running = used.as_dict()["cpu_seconds"]
        child.communicate()
    assert running >= 0.28
    assert used.as_dict()["cpu_seconds"] >= running - 0.02


@pytest.mark.skipif(not reset_peaks(), reason="this system does not let a peak be set back")
def test_the_peak_is_that_of_the_block_alone():
    before = torch.ones(64 * MIB, dtype=torch.uint8)
    del before
    with Resources() as small:
        pass
    with Resources() as large:
        within = torch.ones(64 * MIB, dtype=torch.uint8)
        del within
    assert small.as_dict()["peak_memory_scope"] == "run"
    assert large.as_dict()["peak_memory_bytes"] - small.as_dict()["peak_memory_bytes"] > 56 * MIB


@pytest.mark.skipif(not reset_peaks(), reason="this system does not let a peak be set back")
def test_a_block_in_a_block_leaves_the_outer_one_its_peak():
    with Resources() as outer:
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        del held
        with Resources() as inner:
            pass
    assert outer.as_dict()["peak_memory_bytes"] - inner.as_dict()["peak_memory_bytes"] > 56 * MIB


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_said_about_one(tmp_path):
    with Resources(powercap=tmp_path) as used:
        torch.ones(2) * 2
    found = used.as_dict()
    assert found["gpu_seconds"] is None
    assert found["peak_gpu_memory_bytes"] is None
    assert (found["energy_joules"], found["energy_source"]) == (None, None)
    assert found["energy_note"].startswith("processor: no RAPL package")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_its_time_memory_and_energy_count():
    with Resources() as used:
        held = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
        for _ in range(50):
            torch.ones(2048, 2048, device="cuda") @ torch.ones(2048, 2048, device="cuda")
        torch.cuda.synchronize()
        del held
        time.sleep(0.3)
    found = used.as_dict()
    assert found["gpu_seconds"] == found["seconds"]
    assert found["peak_gpu_memory_bytes"] >= 64 * MIB
    assert "nvml" in found["energy_source"]
    assert found["energy_joules"] > 0


def test_energy_of_a_block_is_read_from_the_counters(tmp_path):
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "name").write_text("package-0")
    (package / "energy_uj").write_text("1000000")
    with Resources(powercap=tmp_path) as used:
        (package / "energy_uj").write_text("3500000")
    (package / "energy_uj").write_text("9000000")
    assert used.as_dict()["energy_joules"] == pytest.approx(2.5)
    assert used.as_dict()["energy_source"] == "rapl"
    assert used.as_dict()["energy_note"] is None


amounts = st.floats(0, 1e9)
resources = st.fixed_dictionaries(
    {
        "seconds": amounts,
        "cpu_seconds": amounts,
        "gpu_seconds": st.none() | amounts,
        "peak_memory_bytes": st.integers(0, 2**40),
        "peak_memory_scope": st.just("run"),
        "peak_gpu_memory_bytes": st.none() | st.integers(0, 2**40),
        "energy_joules": amounts,
        "energy_source": st.just("rapl"),
        "energy_note": st.none(),
    }
)
prices = st.builds(
    Prices,
    cpu_hour=st.none() | st.floats(0, 100),
    gpu_hour=st.none() | st.floats(0, 100),
    gb_month=st.none() | st.floats(0, 100),
    kwh=st.none() | st.floats(0, 100),
    currency=st.just("EUR"),
)


def close(a: float, b: float) -> bool:
    return a == pytest.approx(b, rel=1e-9, abs=1e-9)


@given(resources, st.integers(0, 2**50), prices, st.floats(0, 100))
def test_cost_is_linear(used, stored, price, factor):
    scaled = {
        name: value * factor
        if name in {"seconds", "cpu_seconds", "gpu_seconds", "energy_joules"} and value is not None
        else value
        for name, value in used.items()
    }
    once = cost(used, stored, price)
    assert close(cost(scaled, stored, price, months=factor)["amount"], factor * once["amount"])
    assert close(once["amount"], sum(part or 0 for part in once["parts"].values()))


@given(st.lists(st.tuples(resources, st.integers(0, 2**50)), min_size=1, max_size=5), prices)
def test_cost_is_additive_over_runs(runs, price):
    apart = total_cost([cost(used, stored, price) for used, stored in runs])
    joined = cost(total([used for used, _ in runs]), sum(stored for _, stored in runs), price)
    assert close(apart["amount"], joined["amount"])
    for name, part in joined["parts"].items():
        assert (part is None) == (apart["parts"][name] is None)
        assert part is None or close(part, apart["parts"][name])


def one(**changes) -> dict:
    plain = {
        "seconds": 3600.0,
        "cpu_seconds": 7200.0,
        "gpu_seconds": None,
        "peak_memory_bytes": 10,
        "peak_memory_scope": "run",
        "peak_gpu_memory_bytes": None,
        "energy_joules": 3.6e6,
        "energy_source": "rapl",
        "energy_note": None,
    }
    return {**plain, **changes}


def test_cost_by_hand():
    price = Prices(cpu_hour=0.5, gpu_hour=2.0, gb_month=0.1, kwh=0.3, currency="EUR")
    found = cost(one(gpu_seconds=1800.0), 5 * 10**9, price, months=2)
    assert found["parts"] == {
        "cpu": pytest.approx(1.0),
        "gpu": pytest.approx(1.0),
        "energy": pytest.approx(0.3),
        "storage": pytest.approx(1.0),
    }
    assert found["amount"] == pytest.approx(3.3)
    assert found["currency"] == "EUR"
    assert found["missing"] == {}


def test_what_was_not_measured_is_not_free():
    price = Prices(cpu_hour=1.0, gpu_hour=1.0, kwh=1.0, gb_month=1.0, currency="EUR")
    unread = one(energy_joules=None, energy_source=None, energy_note="processor: no RAPL package in /x")
    found = cost(unread, None, price)
    assert found["parts"] == {"cpu": 2.0, "gpu": 0.0, "energy": None, "storage": None}
    assert found["missing"] == {"energy": "processor: no RAPL package in /x", "storage": "not measured"}
    assert set(cost(None, 1, price)["missing"]) == {"cpu", "gpu", "energy"}
    # without a price nobody asked
    assert cost(None, None, Prices(currency="EUR"))["missing"] == {}


def test_stretches_add_up_and_peaks_do_not():
    first = one(gpu_seconds=5.0, peak_memory_bytes=30, peak_gpu_memory_bytes=7, energy_source="rapl+nvml")
    found = total([first, one()])
    assert found["seconds"] == 7200.0
    assert found["cpu_seconds"] == 14400.0
    assert found["gpu_seconds"] == 5.0
    assert found["peak_memory_bytes"] == 30
    assert found["peak_gpu_memory_bytes"] == 7
    assert found["energy_joules"] == 7.2e6
    assert found["energy_source"] == "rapl+nvml"
    assert total([one()]) == one()


def test_energy_of_some_parts_is_not_the_energy_of_all():
    found = total([one(), one(energy_joules=None, energy_source=None, energy_note="no counter")])
    assert found["energy_joules"] is None
    assert found["energy_source"] is None
    assert found["energy_note"] == "known of 1 parts of 2; no counter"
    assert total([one(), one(peak_memory_scope="process")])["peak_memory_scope"] == "process"


def test_processes_side_by_side_share_the_clock_and_one_counts_the_processor():
    other = one(seconds=3500.0, energy_joules=None, energy_source=None, energy_note=None)
    found = together([one(), other])
    assert found["seconds"] == 3600.0
    assert found["cpu_seconds"] == 14400.0
    assert found["peak_memory_bytes"] == 20
    assert (found["energy_joules"], found["energy_source"]) == (3.6e6, "rapl")


def test_currencies_are_never_mixed():
    euro, dollar = (cost(one(), 1, Prices(cpu_hour=1.0, currency=name)) for name in ("EUR", "USD"))
    with pytest.raises(ConfigError, match="one currency, these costs have EUR, USD"):
        total_cost([euro, dollar])


def test_wrong_prices_are_told_all_at_once():
    with pytest.raises(ConfigError) as caught:
        Prices(cpu_hour=-1.0, kwh=float("nan"))
    assert "cpu_hour = -1.0" in str(caught.value)
    assert "kwh = nan" in str(caught.value)
    assert "set currency" in str(caught.value)
    with pytest.raises(ConfigError, match="'gpu_hours' \\(did you mean 'gpu_hour'"):
        Prices.of({"gpu_hours": 1.0, "currency": "EUR"})
    assert Prices.of({"kwh": 0.3, "currency": "EUR"}) == Prices(kwh=0.3, currency="EUR")


def test_a_file_holds_every_attempt_but_nothing_that_was_refused(tmp_path):
    path = tmp_path / "run" / "resources.json"
    with pytest.raises(ConfigError), ResourceFile(path):
        raise ConfigError("no such rows")
    assert not path.parent.exists()
    with pytest.raises(KeyError), ResourceFile(path):
        raise KeyError
    with ResourceFile(path) as used:
        pass
    written = json.loads(path.read_text())
    assert len(written["attempts"]) == 2
    assert written["total"] == total(written["attempts"]) == used.total()
    # what was cut off while it was written is no reason to stop
    path.write_text("{")
    with ResourceFile(path):
        pass
    assert len(json.loads(path.read_text())["attempts"]) == 1
