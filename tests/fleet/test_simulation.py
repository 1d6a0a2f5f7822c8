"""The simulation of a fleet on many machines: its laws, its caches, and that its results are up to date."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
from tests.docs.pages import ROOT

from modicum.fleet.schedule import makespan, with_failures

FOLDER = ROOT / "benchmarks" / "fleet"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts beside the benchmarks, importable."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def cluster(scripts):
    import cluster

    return cluster


@pytest.fixture(scope="module")
def caches(scripts):
    import caches

    return caches


@pytest.fixture(scope="module")
def simulate(scripts):
    import simulate

    return simulate


def busy(found) -> float:
    return found.useful + found.wasted + found.idle + found.putting + found.down


STORMS = {
    "calm": {},
    "failures": {"mtbf": 300.0, "repair": 30.0},
    "noise": {"noise": (0.8, 1.0, 1.3), "slow_share": 0.2, "slow_factor": 3.0},
    "killed while putting": {"mtbf": 200.0, "repair": 1.0, "put": 40.0, "shards": 7},
    "a shard lost": {"losses": 2, "backup": 300.0, "restore": 500.0, "shards": 5, "put": 2.0},
    "everything": {
        "mtbf": 400.0, "repair": 60.0, "noise": (0.9, 1.2), "slow_share": 0.3, "slow_factor": 2.0, "losses": 3,
        "backup": 200.0, "restore": 300.0, "shards": 4, "put": 5.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("storm", STORMS)
@pytest.mark.parametrize("seed", range(3))
def test_everybody_is_in_the_store_once_and_no_second_is_lost(cluster, storm, seed):
    wanted = cluster.Cluster(cohorts=400, machines=9, seconds=50.0, **STORMS[storm])
    found = cluster.simulate(wanted, seed)
    assert found.stored == [1] * 400
    assert busy(found) == pytest.approx(9 * found.seconds)
    # nobody computes more than everything at once
    assert found.seconds >= 400 * 50 * 0.8 / 9
    again = cluster.simulate(wanted, seed)
    assert (again.seconds, again.attempts, again.waits) == (found.seconds, found.attempts, found.waits)
    assert len(found.commits) == len(found.waits) >= 400


@pytest.mark.parametrize(("cohorts", "machines"), [(1, 1), (7, 3), (37, 5), (5, 9), (64, 64)])
def test_without_failures_it_is_the_closed_form(cluster, cohorts, machines):
    found = cluster.simulate(cluster.Cluster(cohorts, machines, seconds=10.0))
    assert found.seconds == math.ceil(cohorts / machines) * 10 == makespan([10.0] * cohorts, machines)
    assert found.useful == cohorts * 10
    assert found.attempts == cohorts
    assert found.wasted == found.down == 0
    assert found.idle == machines * found.seconds - cohorts * 10


def test_a_shard_takes_one_put_at_a_time(cluster):
    one = cluster.simulate(cluster.Cluster(3, 3, seconds=10.0, put=4.0))
    assert one.waits == [4.0, 8.0, 12.0]
    assert one.seconds == 22
    many = cluster.simulate(cluster.Cluster(3, 3, seconds=10.0, put=4.0, shards=3))
    assert many.waits == [4.0] * 3
    assert many.seconds == 14


def test_a_put_that_a_lost_shard_interrupts_is_asked_for_again(cluster):
    # the shard is lost in the first put, of seconds 1 to 101
    found = cluster.simulate(cluster.Cluster(10, 1, seconds=1.0, put=100.0, losses=1))
    assert found.seconds == 10 * 101 + 100
    assert found.waits == [200.0] + 9 * [100.0]
    assert found.stored == [1] * 10


def test_more_failures_are_never_less_work(cluster):
    rates = (math.inf, 5000.0, 500.0, 100.0)
    work = []
    for mtbf in rates:
        runs = [
            cluster.simulate(cluster.Cluster(600, 10, 50.0, mtbf=mtbf, repair=5.0), seed) for seed in range(5)
        ]
        work.append([sum(run.attempts for run in runs), sum(run.useful + run.wasted for run in runs)])
        assert all(run.useful == pytest.approx(600 * 50) for run in runs)
    assert work[0] == [5 * 600, pytest.approx(5 * 600 * 50)]
    assert sorted(work) == work
    assert work[-1][0] > 1.4 * work[0][0]


@pytest.mark.parametrize("mtbf", [20.0, 100.0, 1000.0])
def test_failures_are_those_of_the_plan(cluster, mtbf):
    found = cluster.simulate(cluster.Cluster(20_000, 20, 10.0, mtbf=mtbf, repair=3.0))
    time, again = with_failures(10.0, mtbf, 3.0)
    # attempts of a cohort are geometric; four standard deviations
    far = 4 * math.sqrt(20_000 * again * (1 + again))
    assert found.attempts - 20_000 == pytest.approx(20_000 * again, abs=far)
    # machines also fail while they are at nothing else, which is at the end only
    assert 20 * found.seconds == pytest.approx(20_000 * time, rel=0.05)


def test_killed_between_put_and_mark_is_put_twice_and_kept_once(cluster):
    wanted = cluster.Cluster(300, 10, 20.0, put=1.0, mtbf=60.0, repair=1.0)
    found = cluster.simulate(wanted)
    assert found.known > 0
    assert found.stored == [1] * 300
    assert len(found.commits) == 300 + found.known


def test_backups_bound_what_a_lost_shard_takes(cluster):
    def relearnt(backup: float) -> int:
        return sum(
            cluster.simulate(cluster.Cluster(500, 5, 10.0, losses=1, backup=backup), seed).relearnt
            for seed in range(8)
        )

    often, seldom, never = relearnt(20.0), relearnt(300.0), relearnt(math.inf)
    # in 20 seconds five machines finish ten cohorts
    assert 0 < often <= 8 * 10
    assert often < seldom < never
    waits = cluster.simulate(cluster.Cluster(500, 5, 10.0, losses=1, backup=20.0, restore=400.0))
    quick = cluster.simulate(cluster.Cluster(500, 5, 10.0, losses=1, backup=20.0))
    assert waits.seconds > quick.seconds
    assert waits.stored == quick.stored == [1] * 500


def test_ches_approximation_is_what_a_pool_does(caches):
    wanted = caches.hit_rate(20_000, 500, 1.0)
    rng = np.random.default_rng(0)
    edges = np.cumsum(1 / np.arange(1, 20_001))
    pool, hits = dict.fromkeys(range(500)), 0
    for at, one in enumerate(np.searchsorted(edges, rng.random(60_000) * edges[-1]).tolist()):
        hits += at >= 10_000 and one in pool
        pool.pop(one, None)
        pool[one] = None
        if len(pool) > 500:
            del pool[next(iter(pool))]
    assert wanted == pytest.approx(hits / 50_000, abs=0.01)
    assert caches.hit_rate(100, 100, 1.0) == 1.0
    # where everybody asks as often, a pool has what fits into it
    assert caches.hit_rate(1000, 100, 0.0) == pytest.approx(0.1)
    assert (
        caches.hit_rate(10**8, 512, 1.0)
        < caches.hit_rate(10**6, 512, 1.0)
        < caches.hit_rate(10**6, 5120, 1.0)
    )


def test_many_users_are_summed_as_if_one_by_one(caches, monkeypatch):
    grouped = [caches.hit_rate(400_000, 5000, 0.8), caches.wanted_by(400_000, 0.9, 1.0)]
    rank, weight = caches.ranks(400_000)
    assert weight.sum() == 400_000
    assert len(rank) < 110_000
    monkeypatch.setattr(caches, "_ONE_BY_ONE", 400_000)
    assert grouped == pytest.approx(
        [caches.hit_rate(400_000, 5000, 0.8), caches.wanted_by(400_000, 0.9, 1.0)], rel=2e-3
    )


def test_a_small_simulation_from_end_to_end(simulate, capsys):
    given = simulate.options(["--users", "30000", "2000000", "--mtbf-hours", "inf", "5", "--data", "absent"])
    known = simulate.facts()
    found = simulate.tables(known, given)
    assert set(found) == {
        "fleet_simulation", "fleet_simulation_store", "fleet_simulation_serving", "fleet_simulation_rhythm",
        "fleet_simulation_checked",
    }  # fmt: skip
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text)["fleet_simulation"]["assumed"]["mtbf_hours"] == [None, 5.0]
    for run in found["fleet_simulation"]["found"]:
        assert run["stored_once"] == run["cohorts"] == math.ceil(run["users"] / known.users)
        assert run["putting"] + run["wasted"] + run["idle"] + run["down"] < 1
    calm, stormy = found["fleet_simulation"]["found"][2:]
    assert calm["shards"] == 2
    assert calm["hours"] == pytest.approx(24, rel=0.1)
    assert stormy["cohorts_again"] > calm["cohorts_again"]
    assert stormy["wasted_without_cohorts"] > 0.5
    for name, values in found.items():
        shown = values["table"]
        assert shown["rows"], name
        assert {len(row) for row in shown["rows"]} == {len(shown["columns"])}, name


def test_the_simulation_is_held_against_what_was_measured(simulate):
    rows = simulate.checked(simulate.facts(), simulate.options(["--data", "absent"]))
    off = {what: found / real - 1 for what, found, real in rows}
    assert len(off) == 3
    assert all(abs(one) < 0.06 for one in off.values()), off


def test_the_committed_results_are_of_what_is_measured_now(simulate):
    known = json.loads(json.dumps(simulate.asdict(simulate.facts())))
    for name in ("", "_store", "_serving", "_rhythm", "_checked"):
        file = FOLDER / "results" / f"fleet_simulation{name}.json"
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["measured"] == known, f"run: {found['command']}"
