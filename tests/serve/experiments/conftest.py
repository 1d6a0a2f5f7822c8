"""A store with three versions of one adapter, and experiments beside it that end only when they are looked at."""

from __future__ import annotations

import random

import pytest
from tests.serve.experiments.speaking import Clock, Speaking
from tests.store.small_records import record

from modicum.serve.experiments import Experiments, tables
from modicum.store import Store


@pytest.fixture(autouse=True)
def _same_salt(monkeypatch):
    """The same users get the same arms every time: what holds with chance 0.95 holds or does not."""
    monkeypatch.setattr(tables, "token_bytes", random.Random(7).randbytes)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", create=True, actor="maker", timeout=0.2) as made:
        for seed in range(3):
            made.put("ada", record(seed))
        made.put("bob", record(7))
        made.promote("ada@1")
        yield made


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def experiments(tmp_path, store, clock):
    with Experiments(tmp_path / "state", store, every=None, clock=clock) as made:
        yield made


@pytest.fixture
def engine():
    return Speaking()


@pytest.fixture
def trial(experiments):
    """The experiment `trial`, running: version 1 against version 3, one to one."""

    def make(**about):
        body = {
            "name": "trial",
            "arms": [{"label": "old", "version": "ada@1"}, {"label": "new", "version": "ada@3"}],
            "window": 10.0,
            **about,
        }
        experiments.create(body, "chief")
        return experiments.start(body["name"], "chief")

    return make
