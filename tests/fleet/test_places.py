"""Cohorts as tasks of other processes: the same outcomes and the same store as in this one, however often."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from tests.fleet import fleets
from tests.fleet.test_job import contents, spec_in

from modicum.compare.run import PRELOAD
from modicum.errors import ConfigError, ModicumError, StoreError
from modicum.fleet import sizing
from modicum.fleet.gather import gather
from modicum.fleet.ledger import Ledger
from modicum.fleet.places import Elsewhere, Here, finished, prepared
from modicum.fleet.spec import make_fleet
from modicum.jobs.processes import Processes
from modicum.store import Store


def cohorts(spec, folder, store):
    """Three cohorts of two users, with their rows."""
    with Ledger(folder) as ledger:
        gather(spec, ledger, store)
        users = [(one, ledger.rows_of(one)) for one in ledger.users()]
    return [(at // 2, users[at : at + 2]) for at in range(0, len(users), 2)]


def told_by(place, wanted, tokens):
    """What a place told of cohorts, but the seconds."""
    return {number: (one.outcomes, one.tokens) for number, one in place.finish(wanted, tokens)}


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
                found[where] = told_by(place, wanted, sized.tokens)
                assert sum(told) > 0
            else:
                with Processes(2, 1, PRELOAD) as pool:
                    place = Elsewhere(spec, store, pool)
                    # two of them share the memory
                    assert place.prepare(None) == (replace(sized, share=0.5), about)
                    found[where] = told_by(place, wanted, sized.tokens)
        stores[where] = contents(spec.store.path)
    assert found["elsewhere"] == found["here"]
    assert len(found["here"]) == 3
    assert all(tokens > 0 for _, tokens in found["here"].values())
    assert {name: one[0] for name, one in stores["elsewhere"].items()} == {
        name: one[0] for name, one in stores["here"].items()
    }
    assert len(stores["here"]) == 4


def test_a_cohort_that_is_finished_again_changes_nothing(tmp_path):
    spec = spec_in(tmp_path, (6, 9), store={"alias": "production"})
    with Store(spec.store.path, create=True) as store:
        ((_, members),) = cohorts(spec, tmp_path / "job", store)
        began = time.perf_counter()
        first = finished(spec.to_yaml(), members, 512)
        assert 0 < first.seconds < time.perf_counter() - began
        before = contents(spec.store.path)
        assert len(before) == 2
        again = finished(spec.to_yaml(), members, 512)
        assert again == replace(first, seconds=again.seconds)
        assert contents(spec.store.path) == before
        # nobody else's version is in the way of a task that is done again
        store.put("u0", store.get("u1"))
        assert [one.detail["version"] for one in finished(spec.to_yaml(), members, 512).outcomes] == [
            "u0@3",
            "u1@1",
        ]


def test_memory_is_shared_by_those_who_take_it(tmp_path, monkeypatch):
    # so little that neither limit of its own is reached
    monkeypatch.setattr(sizing, "free_bytes", lambda _: 4 << 20)
    spec = spec_in(tmp_path, (4,))
    spec = make_fleet({**spec.model_dump(exclude_unset=True), "train": {"epochs": 1}})
    (whole, _), (half, _) = (prepared(spec.to_yaml(), None, share) for share in (1.0, 0.5))
    assert half.users == whole.users // 2
    assert 10 < half.users < whole.users < 256
    assert spec.data.max_length <= half.tokens <= whole.tokens // 2 + 1 < 4096
    assert (whole.share, half.share) == (1.0, 0.5)


def test_a_job_does_not_go_on_with_more_workers_than_its_sizes_have_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(sizing, "free_bytes", lambda _: 4 << 20)
    spec = spec_in(tmp_path, (4,))
    spec = make_fleet({**spec.model_dump(exclude_unset=True), "train": {"epochs": 1}})
    known, about = prepared(spec.to_yaml(), None, 0.5)
    # as many as before, or fewer
    assert prepared(spec.to_yaml(), known, 0.5) == prepared(spec.to_yaml(), known, 1.0) == (known, about)
    with pytest.raises(ConfigError, match=rf"cohorts of {known.users} users.* may take 25% of the memory"):
        prepared(spec.to_yaml(), known, 0.25)
    # what fits nevertheless may be shared
    small = replace(known, tokens=1, users=1)
    assert prepared(spec.to_yaml(), small, 0.25)[0] == small
    # what the specification says is its own affair
    own = make_fleet(
        {**spec.model_dump(exclude_unset=True), "train": {"tokens_per_pass": 9000, "cohort_size": 900}}
    )
    known, _ = prepared(own.to_yaml(), None, 0.5)
    assert (known.tokens, known.users) == (9000, 900)
    assert prepared(own.to_yaml(), known, 0.25)[0] == known


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
