"""What `model` means: changes count at once, what is hidden does not exist, a store may be gone for a while."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sqlite3
import time

import pytest
from tests.store.small_records import record

from modicum.errors import NotStoredError, StoreError
from modicum.serve import names as module
from modicum.serve.experiments import Experiments
from modicum.serve.names import Choice, Names
from modicum.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", create=True, timeout=0.2) as made:
        made.put_many(
            [(name, record(seed)) for name in ("ada", "team/eve", "team/secret", "bob") for seed in range(3)]
        )
        made.promote("ada@1")
        made.alias("ada@2", "canary")
        yield made


@pytest.fixture
def experiments(tmp_path, store):
    with Experiments(tmp_path / "state", store, every=None) as made:
        yield made


@pytest.fixture
def names(store, experiments):
    made = Names(store, experiments)
    yield made
    made.close()


def everything(_):
    return True


def resolve(names, model, may=everything, user=None):
    return dataclasses.replace(asyncio.run(names.resolve(model, may, user)), entry=None)


def refused(names, model, may=everything):
    with pytest.raises(NotStoredError) as caught:
        resolve(names, model, may)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model", "version", "name"),
    [
        ("base", None, None),
        ("ada", "ada@1", "ada"),
        ("ada@3", "ada@3", "ada"),
        ("ada@canary", "ada@2", "ada"),
        ("ada@latest", "ada@3", "ada"),
        ("team/eve", "team/eve@3", "team/eve"),
    ],
)
def test_what_a_model_means(names, model, version, name):
    assert resolve(names, model) == Choice(version, name)


def test_a_promotion_and_a_rollback_count_from_the_next_request_on(names, store):
    for number in (2, 3, 1):
        store.promote(f"ada@{number}")
        assert resolve(names, "ada").version == f"ada@{number}"
    store.rollback("ada")
    assert resolve(names, "ada").version == "ada@3"
    store.remove("ada", 2) if store.find("ada@canary") is None else store.unalias("ada", "canary")
    assert "no model 'ada@canary'" in refused(names, "ada@canary")


def test_what_is_hidden_does_not_exist(names):
    def may(name):
        return name in {"ada", "team/eve"}

    for model in ("team/secret", "team/secrex", "bob", "bob@1", "bub@1", "base", "bob@production"):
        said = refused(names, model, may)
        assert said.partition(" (")[0] == f"no model {model!r}"
        assert "secret" not in said.replace(model, "")
        assert "bob" not in said.replace(model, "")
    assert "did you mean 'team/eve'" in refused(names, "team/eva", may)
    assert "did you mean 'team/secret'" in refused(names, "team/secrex")


def test_the_store_is_asked_the_same_way_for_what_is_hidden_and_what_is_not_there(names, store):
    """The look-up is of a name that nobody has, so that it takes no other time, and no name is touched."""
    asked = []
    find, listed = store.find_put, store.names
    store.find_put = lambda *wanted: asked.append(len(wanted)) or find(*wanted)
    store.names = lambda **options: asked.append(sorted(options)) or listed(**options)
    refused(names, "nobody", lambda name: name != "bob")
    missing, asked[:] = list(asked), []
    refused(names, "bob", lambda name: name != "bob")
    assert asked == missing


@pytest.mark.parametrize(
    "model", ["", "../x", "ada@", "ada@x y", "ada@3@4", "a" * 5000, "ada@99", "@", "\ud800"]
)
def test_what_is_no_name_is_not_there(names, model):
    assert refused(names, model).startswith("no model ")


def test_without_a_store_there_is_the_base_alone():
    names = Names(None)
    assert resolve(names, "base") == Choice(None, None)
    assert refused(names, "ada") == "no model 'ada'"
    assert asyncio.run(names.visible(["*"])) == []
    names.close()


def test_names_that_may_be_seen_are_listed_piece_by_piece(names):
    assert asyncio.run(names.visible(["team/*", "bob", "team/eve"])) == ["bob", "team/eve", "team/secret"]
    assert asyncio.run(names.visible(["*"], limit=2)) == ["ada", "bob"]
    assert asyncio.run(names.visible(["*"], limit=2, after="bob")) == ["team/eve", "team/secret"]
    assert asyncio.run(names.visible([])) == []


def test_a_store_that_is_gone_for_a_while(names, store, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PAUSE", 0.0)
    assert resolve(names, "ada").version == "ada@1"
    index = tmp_path / "store" / "index.sqlite"
    with contextlib.closing(sqlite3.connect(index, isolation_level=None)) as broken:
        broken.execute("ALTER TABLE names RENAME TO hidden")
        assert resolve(names, "ada").version == "ada@1"
        for model, may in (
            ("ada@3", everything),
            ("ada", lambda name: name != "ada"),
            ("nobody", everything),
        ):
            with pytest.raises(StoreError) as caught:
                resolve(names, model, may)
            assert str(caught.value) == "the adapter store does not answer; ask again in a moment"
        with monkeypatch.context() as patch:
            # what was answered too long ago counts no longer
            patch.setattr(module, "_AGE", 0.0)
            with pytest.raises(StoreError):
                resolve(names, "ada")
        broken.execute("ALTER TABLE hidden RENAME TO names")
    store.promote("ada@2")
    assert resolve(names, "ada").version == "ada@2"


def test_a_store_that_does_not_answer_is_left_alone_for_a_moment(names, store, monkeypatch):
    assert resolve(names, "ada").version == "ada@1"
    calls = []

    def fail(*wanted):
        calls.append(wanted)
        raise StoreError("busy")

    monkeypatch.setattr(store, "find_put", fail)
    for _ in range(5):
        assert resolve(names, "ada").version == "ada@1"
    assert len(calls) == 1


def test_a_long_list_does_not_make_the_store_look_gone(names, store, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    listed = store.names
    monkeypatch.setattr(store, "names", lambda *a, **o: time.sleep(0.2) or listed(*a, **o))
    with pytest.raises(StoreError, match="does not answer"):
        asyncio.run(names.visible(["*"]))
    assert resolve(names, "ada@3").version == "ada@3"


def test_only_so_many_answers_are_kept(store):
    names = Names(store, most=2)
    for model in ("ada", "bob", "team/eve"):
        resolve(names, model)
    assert len(names._last) == 2
    names.close()


def test_an_experiment_is_a_model(names, experiments):
    arms = [{"label": "old", "version": "ada@1"}, {"label": "new", "version": "team/eve@3"}]
    experiments.create({"name": "tone", "arms": arms}, "chief")
    assert resolve(names, "tone", user="u").arm is None
    experiments.start("tone", "chief")
    chosen = {resolve(names, "tone", user=f"u{number}") for number in range(40)}
    assert chosen == {
        Choice("ada@1", "ada", "tone", "old"),
        Choice("team/eve@3", "team/eve", "tone", "new"),
    }
    assert resolve(names, "tone") == Choice("ada@1", "ada", "tone")
    # whoever may not see all of it does not see it
    for hidden in ("tone", "ada", "team/eve"):
        assert refused(names, "tone", lambda name, hidden=hidden: name != hidden).startswith(
            "no model 'tone'"
        )


def test_an_experiment_takes_over_the_name_of_its_adapter_while_it_runs(names, experiments):
    arms = [{"label": "old", "version": "ada@1"}, {"label": "none", "version": "base"}]
    experiments.create({"name": "ada", "arms": arms}, "chief")
    assert resolve(names, "ada", user="u") == Choice("ada@1", "ada")
    experiments.start("ada", "chief")
    assert {resolve(names, "ada", user=f"u{number}").version for number in range(40)} == {"ada@1", None}
    assert resolve(names, "ada@3", user="u") == Choice("ada@3", "ada")
    # who may not see the base model gets what the name means otherwise
    assert resolve(names, "ada", lambda name: name != "base", "u") == Choice("ada@1", "ada")
    experiments.stop("ada", "chief")
    assert resolve(names, "ada", user="u") == Choice("ada@1", "ada")


def test_of_an_experiment_too_it_is_known_what_was_put(names, experiments, store):
    arms = [{"label": "old", "version": "ada@1"}, {"label": "new", "version": "team/eve@1"}]
    experiments.create({"name": "tone", "arms": arms}, "chief")
    put = asyncio.run(names.resolve("ada@1", everything)).entry
    assert asyncio.run(names.resolve("tone", everything)).entry == put
    # what was erased is not answered from memory
    store.unalias("ada", "production")
    store.unalias("ada", "canary")
    store.purge("ada", 1)
    assert refused(names, "tone") == "what the experiment 'tone' gives is no longer in the store"
