"""From draft to promoted and back: who did what is in the store's log, and nobody's change is undone."""

from __future__ import annotations

import stat

import pytest
from tests.serve.experiments.speaking import locked

from modicum.errors import ConfigError, ConflictError, NotStoredError
from modicum.serve.experiments import Experiments


def told(store, name="ada"):
    return [(entry.actor, entry.detail) for entry in store.log(name) if entry.action == "experiment"]


def test_a_life_from_draft_to_rolled_back_is_in_the_log(experiments, store, trial):
    one = trial()
    assert (one.state, one.before) == ("running", {"ada": 1})
    experiments.weigh("trial", {"new": 3}, "helper")
    assert [arm.weight for arm in experiments.get("trial").arms] == [1, 3]
    one = experiments.stop("trial", "chief", "enough")
    assert (one.state, one.reason, one.winner) == ("stopped", "enough", None)
    assert experiments.promote("trial", "boss", "new").state == "promoted"
    assert store.find("ada@production") == "ada@3"
    assert experiments.rollback("trial", "boss").state == "rolled back"
    assert store.find("ada@production") == "ada@1"
    said = told(store)
    assert [(actor, detail["did"]) for actor, detail in said] == [
        ("chief", "create"), ("chief", "start"), ("helper", "weigh"), ("chief", "stop"), ("boss", "promote"),
        ("boss", "rollback"),
    ]  # fmt: skip
    assert said[0][1]["arms"] == {"old": [1, 1.0], "new": [3, 1.0]}
    assert said[2][1]["weights"] == {"old": 1.0, "new": 3}
    moves = [(e.actor, e.action, e.version) for e in store.log("ada") if e.action in ("alias", "rollback")]
    assert moves[1:] == [("boss", "alias", 3), ("boss", "rollback", 1)]
    assert store.verify().faults == ()


def test_the_log_of_one_adapter_tells_nothing_of_another(experiments, store):
    arms = [
        {"label": "a", "version": "ada@1"},
        {"label": "b", "version": "bob@1"},
        {"label": "c", "version": "base"},
    ]
    experiments.create({"name": "both", "arms": arms}, "chief")
    assert told(store, "ada")[0][1]["arms"] == {"a": [1, 1.0]}
    assert told(store, "bob")[0][1]["arms"] == {"b": [1, 1.0]}
    # whoever is purged is out of the log, and the experiment can still be ended
    experiments.start("both", "chief")
    store.purge("bob")
    experiments.stop("both", "chief")
    assert "bob" not in str([entry.detail for entry in store.log()])
    assert [detail["did"] for _, detail in told(store, "ada")] == ["create", "start", "stop"]


def test_what_is_not_allowed_in_a_state_changes_nothing(experiments, store, trial):
    trial()
    with pytest.raises(ConflictError, match="'trial' is running; this can be done to one that is draft"):
        experiments.start("trial", "chief")
    with pytest.raises(ConflictError, match="stop it first"):
        experiments.promote("trial", "chief", "new")
    with pytest.raises(ConflictError, match="nothing of it was promoted"):
        experiments.rollback("trial", "chief")
    with pytest.raises(ConflictError, match="is running"):
        experiments.delete("trial", "chief")
    with pytest.raises(ConflictError, match="there is an experiment 'trial'"):
        trial()
    with pytest.raises(NotStoredError, match="did you mean 'trial'"):
        experiments.stop("trail", "chief")
    experiments.stop("trial", "chief")
    with pytest.raises(ConfigError, match="no arm of 'trial' has won; name"):
        experiments.promote("trial", "chief")
    with pytest.raises(ConfigError, match="no arm 'newer'"):
        experiments.promote("trial", "chief", "newer")
    assert store.find("ada@production") == "ada@1"
    assert experiments.get("trial").state == "stopped"
    experiments.delete("trial", "chief")
    assert experiments.get("trial") is None
    assert told(store)[-1][1]["did"] == "delete"


def test_a_promotion_does_not_undo_what_somebody_else_promoted(experiments, store, trial):
    trial()
    store.acting("rival").promote("ada@2")
    experiments.stop("trial", "chief")
    with pytest.raises(ConflictError, match="points at version 2, not at 1"):
        experiments.promote("trial", "chief", "new")
    assert (store.find("ada@production"), experiments.get("trial").state) == ("ada@2", "stopped")
    experiments.promote("trial", "chief", "new", expected=2)
    assert store.find("ada@production") == "ada@3"
    store.acting("rival").promote("ada@1")
    with pytest.raises(ConflictError, match="points at version 1, not at 3"):
        experiments.rollback("trial", "chief")
    assert (store.find("ada@production"), experiments.get("trial").state) == ("ada@1", "promoted")
    store.rollback("ada")
    experiments.rollback("trial", "chief")
    assert store.find("ada@production") == "ada@2"


def test_a_promotion_that_was_interrupted_goes_on(experiments, store, trial):
    trial()
    experiments.stop("trial", "chief")
    # killed between the store and the ledger
    store.acting("chief").promote("ada@3", expected=1)
    assert experiments.promote("trial", "chief", "new").state == "promoted"
    assert [e.version for e in store.log("ada") if e.action == "alias"] == [1, 3]
    with pytest.raises(ConflictError, match="is promoted"):
        experiments.promote("trial", "chief", "new")
    # and the same on the way back
    store.acting("chief").rollback("ada", expected=3)
    assert experiments.rollback("trial", "chief").state == "rolled back"
    assert store.find("ada@production") == "ada@1"


def test_where_nothing_was_in_production_nothing_is_afterwards(experiments, store, trial):
    store.unalias("ada", "production")
    assert trial().before == {"ada": None}
    experiments.stop("trial", "chief")
    experiments.promote("trial", "chief", "new")
    assert store.find("ada@production") == "ada@3"
    experiments.rollback("trial", "chief")
    assert store.find("ada@production") is None


def test_what_the_log_could_not_be_told_it_is_told_later(experiments, store, tmp_path, trial):
    trial()
    with locked(tmp_path / "store"):
        assert experiments.stop("trial", "chief", "now").state == "stopped"
    assert told(store)[-1][1]["did"] == "start"
    experiments._lifecycle._next_try = 0.0
    experiments.check()
    assert told(store)[-1] == ("chief", told(store)[-1][1])
    assert told(store)[-1][1]["did"] == "stop"
    # once is enough
    experiments.check()
    assert [detail["did"] for _, detail in told(store)] == ["create", "start", "stop"]


def test_a_name_is_an_adapter_s_only_with_its_own_versions(experiments, trial):
    arms = [{"label": "a", "version": "ada@1"}, {"label": "b", "version": "bob@1"}]
    with pytest.raises(ConfigError, match="'ada' is already the name of a model"):
        experiments.create({"name": "ada", "arms": arms}, "chief")
    with pytest.raises(ConfigError, match="'base' is already the name of a model"):
        experiments.create({"name": "base", "arms": arms}, "chief")
    assert trial(name="ada").state == "running"


def test_what_a_route_is_in_each_state(experiments, trial):
    one = trial()
    assert {experiments.route(one, f"u{i}").arm for i in range(40)} == {"old", "new"}
    nobody = experiments.route(one, None)
    assert (nobody.version, nobody.arm) == ("ada@1", None)
    one = experiments.stop("trial", "chief")
    assert {experiments.route(one, f"u{i}").version for i in range(40)} == {"ada@1"}
    one = experiments.promote("trial", "chief", "new")
    assert (experiments.route(one, "u1").version, experiments.route(one, "u1").arm) == ("ada@3", None)
    one = experiments.rollback("trial", "chief")
    assert experiments.route(one, "u1").version == "ada@1"
    # an experiment that has an adapter's name gives it back
    named = trial(name="ada")
    assert experiments.route(named, "u1").arm is not None
    assert experiments.route(experiments.stop("ada", "chief"), "u1") is None


def test_other_processes_see_what_was_changed(experiments, store, trial, tmp_path):
    with Experiments(tmp_path / "state", store, every=None) as other:
        trial()
        assert other.get("trial") is None
        other.check()
        assert other.get("trial").state == "running"
        assert other.route(other.get("trial"), "u1") == experiments.route(experiments.get("trial"), "u1")


def test_only_the_owner_may_read(experiments, tmp_path):
    for file in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_without_a_store_there_is_nothing_to_try(tmp_path):
    with (
        Experiments(tmp_path, None, every=None) as made,
        pytest.raises(ConfigError, match="no adapter store"),
    ):
        made.create({"name": "t", "arms": []}, "chief")
