"""Energy counters: a made-up powercap tree, read by the real reader."""

from __future__ import annotations

import pytest

from modicum.evaluate.energy import Energy, Rapl


def zone(root, place: str, name: str, value: int, limit: int = 1_000_000):
    folder = root / place
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    (folder / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder


def test_joules_are_those_of_all_packages_and_of_nothing_below_or_beside_them(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 200)
    others = [
        zone(tmp_path, "intel-rapl:0:0", "core", 5),
        zone(tmp_path, "intel-rapl:0:1", "dram", 5),
        zone(tmp_path, "intel-rapl:2", "psys", 5),
        # the same package through another interface
        zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5),
    ]
    rapl = Rapl(tmp_path)
    assert rapl.fault is None
    assert rapl.joules() == 0
    (first / "energy_uj").write_text("500100")
    (second / "energy_uj").write_text("250200")
    for other in others:
        (other / "energy_uj").write_text("900000")
    assert rapl.joules() == pytest.approx(0.75)
    assert rapl.joules() == pytest.approx(0.75)


def test_a_counter_that_starts_again_is_followed_every_time_it_is_looked_at(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000, limit=1_000_000)
    rapl = Rapl(tmp_path)
    (package / "energy_uj").write_text("100000")
    assert rapl.joules() == pytest.approx(0.2)
    (package / "energy_uj").write_text("50000")
    assert rapl.joules() == pytest.approx(0.2 + 0.95)


@pytest.mark.parametrize("file", ["energy_uj", "max_energy_range_uj"])
def test_one_unreadable_counter_makes_all_of_it_unknown(tmp_path, file):
    zone(tmp_path, "intel-rapl:0", "package-0", 100)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 900_000)
    rapl = Rapl(tmp_path)
    (second / "energy_uj").write_text("0")
    (second / file).unlink()
    assert rapl.joules() is None
    assert f"intel-rapl:1/{file}: No such file" in str(rapl.fault)
    # what comes back later does not fill the hole
    (second / file).write_text("1000000")
    assert rapl.joules() is None


def test_a_machine_without_counters_says_so(tmp_path):
    energy = Energy(tmp_path / "none")
    joules, source, note = energy.read([])
    assert (joules, source) == (None, None)
    assert note == f"processor: no RAPL package in {tmp_path / 'none'}"


def test_energy_without_a_gpu_is_the_processors(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    energy = Energy(tmp_path)
    (package / "energy_uj").write_text("300000")
    assert energy.read([]) == (pytest.approx(0.3), "rapl", None)
    # the energy of a GPU that is not there is not taken for 0
    joules, source, note = energy.read(["GPU-0"])
    assert (joules, source) == (pytest.approx(0.3), "rapl")
    assert note is not None
    assert note.startswith("GPU: ")
    energy.stop()


def test_the_processor_can_be_left_to_another_process(tmp_path):
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    assert Energy(tmp_path, processor=False).read([]) == (None, None, None)
