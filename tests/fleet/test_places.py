"""Cohorts as tasks of other processes: the same outcomes and the same store as in this one, however often."""

from __future__ import annotations

import pytest
from tests.fleet import fleets
from tests.fleet.test_job import contents, spec_in

from modicum.compare.run import PRELOAD
from modicum.errors import ModicumError, StoreError
from modicum.fleet.gather import gather
from modicum.fleet.ledger import Ledger
from modicum.fleet.places import Elsewhere, Here, finished
from modicum.fleet.spec import make_fleet
from modicum.jobs.processes import Processes
from modicum.store import Store


def cohorts(spec, folder, store):
    """Three cohorts of two users, with their rows."""
    with Ledger(folder) as ledger:
        gather(spec, ledger, store)
        users = [(one, ledger.rows_of(one)) for one in ledger.users()]
    return [(at // 2, users[at : at + 2]) for at in range(0, len(users), 2)]


def test_tasks_leave_what_this_process_leaves(tmp_path):
    found, stores = {}, {}
    rows = fleets.table(tmp_path / "users.jsonl", (6, 9, 1, 14, 4))
    for where in ("here", "elsewhere"):
        spec = spec_in(
            tmp_path, rows=rows, store={"path": str(tmp_path / where)}, train={"tokens_per_pass": 512}
        )
        with Store(spec.store.path, create=True) as store:
            wanted = cohorts(spec, tmp_path / f"{where}-job", store)
            if where == "here":
                told = []
                place = Here(spec, store, told.append)
                sized, about = place.prepare(None)
                found[where] = dict(place.finish(wanted, sized.tokens))
                assert sum(told) > 0
            else:
                with Processes(2, 1, PRELOAD) as pool:
                    place = Elsewhere(spec, store, pool)
                    assert place.prepare(None) == (sized, about)
                    found[where] = dict(place.finish(wanted, sized.tokens))
        stores[where] = contents(spec.store.path)
    assert found["elsewhere"] == found["here"]
    assert len(found["here"]) == 3
    assert {name: one[0] for name, one in stores["elsewhere"].items()} == {
        name: one[0] for name, one in stores["here"].items()
    }
    assert len(stores["here"]) == 4


def test_a_cohort_that_is_finished_again_changes_nothing(tmp_path):
    spec = spec_in(tmp_path, (6, 9), store={"alias": "production"})
    with Store(spec.store.path, create=True) as store:
        ((_, members),) = cohorts(spec, tmp_path / "job", store)
        first = finished(spec.to_yaml(), members, 512)
        before = contents(spec.store.path)
        assert len(before) == 2
        assert finished(spec.to_yaml(), members, 512) == first
        assert contents(spec.store.path) == before
        # nobody else's version is in the way of a task that is done again
        store.put("u0", store.get("u1"))
        assert [one.detail["version"] for one in finished(spec.to_yaml(), members, 512)] == ["u0@3", "u1@1"]


def test_memory_is_shared_by_those_who_take_it(tmp_path):
    from modicum.fleet.base import load_fleet_base
    from modicum.fleet.places import _measured

    spec = spec_in(tmp_path, (4,))
    spec = make_fleet({**spec.model_dump(exclude_unset=True), "train": {"epochs": 1}})
    base = load_fleet_base(spec)
    # so little that neither limit of its own is reached
    tiny = 1e-4
    whole, half = _measured(spec, base, tiny), _measured(spec, base, tiny / 2)
    assert half.users == pytest.approx(whole.users / 2, rel=0.1, abs=1)
    assert half.users < whole.users < 256


def test_a_store_that_only_looks_like_the_one_meant_is_told(tmp_path):
    """As on a machine whose folder of the same name is another one."""
    spec = spec_in(tmp_path, (6, 9))
    with Store(spec.store.path, create=True), Store(tmp_path / "mine", create=True) as mine:
        wanted = cohorts(spec, tmp_path / "job", mine)
        with Processes(1, 1, PRELOAD) as pool, pytest.raises(StoreError, match="put into another store"):
            list(Elsewhere(spec, mine, pool).finish(wanted, 512))


def test_what_fails_elsewhere_says_what_it_was(tmp_path):
    spec = spec_in(tmp_path, (6, 9))
    with Store(tmp_path / "mine", create=True) as mine:
        wanted = cohorts(spec, tmp_path / "job", mine)
        with Processes(1, 1, PRELOAD) as pool:
            # the folder of the store is nowhere: a machine makes none of its own
            with pytest.raises(ModicumError, match=r"^cohort 0: "):
                list(Elsewhere(spec, mine, pool).finish(wanted, 512))
            missing = spec_in(tmp_path, (6, 9), model={"name_or_path": str(tmp_path / "nothing")})
            with pytest.raises(ModicumError, match=r"^the base model: "):
                Elsewhere(missing, mine, pool).prepare(None)
    assert not (tmp_path / "store").exists()
