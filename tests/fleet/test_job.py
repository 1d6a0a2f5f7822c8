"""From a table of users to adapters in the store: what is there at the end, whatever happened on the way."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from tests import small_checkpoints
from tests.fleet import fleets

from modicum.data.encoded import Collator
from modicum.data.files import Rows
from modicum.errors import ConfigError, DataError
from modicum.fleet import job, worker
from modicum.fleet.evaluate import evaluate_fleet
from modicum.fleet.gather import name_of
from modicum.fleet.job import Progress, train_fleet
from modicum.fleet.ledger import FILE
from modicum.fleet.rows import prepare_user
from modicum.models.loading import load_base, load_tokenizer
from modicum.store import Store
from modicum.store.files import load_adapter, read_adapter
from modicum.store.record import SUFFIX
from modicum.store.state import state_from
from modicum.train.recipe import make_recipe
from modicum.train.run import tune


class StopError(Exception):
    """A crash."""


def spec_in(folder: Path, counts=fleets.UNEVEN, rows: Path | None = None, **sections):
    source = rows or fleets.table(folder / "users.jsonl", counts)
    merged = {
        "users": {"source": str(source), "held_out": 0.3},
        "train": {"epochs": 4, "learning_rate": 2e-2, "cohort_size": 2},
        "store": {"path": str(folder / "store"), "dtype": "float32"},
        "output": str(folder / "run"),
    }
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values} if isinstance(values, dict) else values
    return fleets.spec(**merged)


def contents(path: str | Path) -> dict[str, tuple]:
    """Everything a store says about its versions but when they came."""
    with Store(path) as store:
        return {
            str(v): (v.digest, v.metrics, v.tags, v.seed, v.data_digest, v.parent, v.aliases)
            for v in store.ls()
        }


def said_by(model: Path) -> str:
    """What the base model goes on with, always choosing the likeliest character."""
    base, tokenizer = load_base(str(model)), load_tokenizer(str(model))
    ids = [1]
    while len(ids) < 50:
        # no special token, which no text has
        ids.append(int(base(torch.tensor([ids])).logits[0, -1, 5:].argmax()) + 5)
    return tokenizer.decode(ids[1:])


def states(folder: Path) -> dict[str, str]:
    return {row["user"]: row["state"] for row in parquet.read_table(folder / "users.parquet").to_pylist()}


def test_a_job_leaves_adapters_and_reports(tmp_path):
    spec = spec_in(tmp_path, (6, 9, 1, 14), store={"alias": "production", "tags": ["night"]})
    seen = []
    result = train_fleet(spec, tell=seen.append)
    assert {entry.name for entry in result.folder.iterdir()} == {
        "fleet.yaml", FILE, "report.json", "report.md", "report.html", "users.parquet",
    }  # fmt: skip
    assert json.loads((result.folder / "report.json").read_text()) == result.report
    assert states(result.folder) == {"u0": "stored", "u1": "stored", "u2": "faulty", "u3": "stored"}
    assert result.report["users"] == {"all": 4, "stored": 3, "base": 0, "diverged": 0, "faulty": 1}
    assert result.report["faults"] == [
        {"user": "u2", "rows": 1, "what": "1 row that can be used; 2 are needed, to train on and to judge by"}
    ]
    assert result.report["gains"]["kept"]["mean"] > 0.5
    with Store(spec.store.path) as store:
        one = store.show("u1@production")
        assert one.seed == 0
        other = store.show("u0@production")
        assert len(one.data_digest) == len(other.data_digest) == 32
        assert one.data_digest != other.data_digest
        assert set(one.tags) == {"night", f"fleet-{spec.digest()}"}
        assert one.metrics["validation.loss"] < one.metrics["before.loss"]
        record = store.get("u1")
        assert record.metadata["user"] == "u1"
        assert record.recipe_digest == spec.digest()
    assert seen[-1].users == seen[-1].of_users == 4
    assert seen[-1].steps == seen[-1].of_steps
    assert all(a.steps <= b.steps for a, b in itertools.pairwise(seen))
    assert seen[-1].adapters_per_hour > 0


def test_an_adapter_is_the_one_that_tune_makes_of_these_rows(tmp_path):
    spec = spec_in(tmp_path, (6, 9, 14), users={"held_out": 0.0}, train={"epochs": 2, "min_steps": 2})
    train_fleet(spec)
    rows = [json.loads(line) for line in (tmp_path / "users.jsonl").read_text().splitlines()]
    for user in ("u0", "u2"):
        own = small_checkpoints.write_jsonl(
            tmp_path / f"{user}.jsonl", [r for r in rows if r["user"] == user]
        )
        recipe = make_recipe(
            {
                "model": {"name_or_path": str(small_checkpoints.llama())},
                "data": {"train": str(own), "max_length": 64},
                "method": fleets.METHODS["lora_xs"],
                "train": {"epochs": 2, "batch_size": 4, "learning_rate": 2e-2, "report_to": "none"},
                "output": str(tmp_path / user),
            }
        )
        _, wanted = read_adapter(tune(recipe).adapter)
        with Store(spec.store.path) as store:
            found = state_from(store.get(user))
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=2e-6)


def test_adapters_go_on_a_model_as_any_other(tmp_path):
    spec = spec_in(tmp_path, (6, 9))
    train_fleet(spec)
    with Store(spec.store.path) as store:
        (tmp_path / f"u1{SUFFIX}").write_bytes(store.get_bytes("u1"))
    base = load_base(spec.model.name_or_path)
    ids = torch.tensor([[1, 20, 21, 22]])
    before = base(ids).logits
    assert not torch.allclose(load_adapter(base, tmp_path / f"u1{SUFFIX}")(ids).logits, before, atol=1e-2)


@pytest.mark.parametrize("moment", ["gathered", "trained", "stored", "reported"])
def test_interrupted_anywhere_a_job_ends_with_the_same_store(tmp_path, monkeypatch, moment):
    whole = tmp_path / "whole"
    whole.mkdir()
    alias = {"alias": "production"}
    train_fleet(spec_in(whole, store=alias))
    part = tmp_path / "part"
    part.mkdir()
    spec = spec_in(part, rows=whole / "users.jsonl", store=alias)

    def stop(owner, name, after, count):
        original, seen = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            seen.append(1)
            if len(seen) == count and not after:
                raise StopError
            found = original(*args, **kwargs)
            if len(seen) == count and after:
                raise StopError
            return found

        monkeypatch.setattr(owner, name, wrapped)

    if moment == "gathered":
        stop(job, "gather", True, 1)
    elif moment == "trained":
        stop(worker.Training, "run", True, 2)
    elif moment == "stored":
        stop(Store, "put_many", True, 2)
    else:
        stop(job, "write_reports", False, 1)
    with pytest.raises(StopError):
        train_fleet(spec)
    monkeypatch.undo()
    # what is elsewhere by now does not matter: the rows are in the ledger
    result = train_fleet(spec, resume=True)
    found = contents(spec.store.path)
    assert found == contents(whole / "store")
    assert {aliases for *_, aliases in found.values()} == {("production",)}
    assert states(result.folder) == states(whole / "run")
    assert train_fleet(spec, resume=True).reused


def test_folders_that_are_taken(tmp_path):
    spec = spec_in(tmp_path, (4,))
    train_fleet(spec)
    with pytest.raises(ConfigError, match="holds a finished job"):
        train_fleet(spec)
    other = spec_in(tmp_path, (4,), train={"seed": 5})
    with pytest.raises(ConfigError, match=re.escape("train.seed: 0 → 5")):
        train_fleet(other, resume=True)
    before = contents(spec.store.path)
    assert not train_fleet(spec, overwrite=True).reused
    # the same records again are no new versions
    assert contents(spec.store.path) == before
    train_fleet(other, overwrite=True)
    assert set(contents(spec.store.path)) == {"u0@1", "u0@2"}


def test_two_processes_do_not_work_on_one_job(tmp_path):
    spec = spec_in(tmp_path, (4,))
    seen = []

    def again(_):
        with pytest.raises(ConfigError, match="another process is at work"):
            train_fleet(spec, overwrite=True)
        seen.append(1)

    train_fleet(spec, tell=again)
    assert seen
    assert train_fleet(spec, resume=True).reused


def test_users_rows_are_gone_when_the_job_is_finished(tmp_path):
    spec = spec_in(tmp_path, (9, 9))
    text = "xyzzy-secret"
    with (tmp_path / "users.jsonl").open("a") as stream:
        stream.write(json.dumps({"user": "u1", "prompt": text, "completion": text}) + "\n")
    folder = train_fleet(spec).folder
    assert text.encode() not in b"".join(path.read_bytes() for path in folder.iterdir())
    assert (folder / FILE).stat().st_mode & 0o077 == 0


def test_where_the_base_is_better_nothing_is_stored(tmp_path):
    # what is judged by is what the base model would say itself, and not what is trained on
    held_out = set(np.random.default_rng(0).permutation(6)[:2].tolist())
    usual = said_by(small_checkpoints.llama())
    rows = [
        {"user": user, "text": usual if row in held_out and user == "turned" else "xy" * 25}
        for user in ("turned", "plain")
        for row in range(6)
    ]
    source = small_checkpoints.write_jsonl(tmp_path / "users.jsonl", rows)
    spec = spec_in(tmp_path, rows=source, train={"evaluations": 1})
    report = train_fleet(spec).report
    assert states(tmp_path / "run") == {"turned": "base", "plain": "stored"}
    assert set(contents(spec.store.path)) == {"plain@1"}
    gains = report["gains"]
    assert gains["base_better"] == ["turned"]
    assert gains["kept"]["n"] == 1
    assert gains["served_mean"] == pytest.approx(gains["kept"]["mean"] / 2)


def test_training_goes_on_from_what_a_user_has(tmp_path):
    spec = spec_in(tmp_path, (6, 9), store={"alias": "production"})
    train_fleet(spec)
    more = fleets.table(tmp_path / "more.jsonl", (6, 9, 8))
    values = {"store": {"start_from": "production"}, "output": str(tmp_path / "second")}
    report = train_fleet(spec_in(tmp_path, rows=more, **values)).report
    with Store(spec.store.path) as store:
        assert store.show("u1@2").parent == "u1@1"
        assert store.show("u2").parent is None
    assert report["users"]["stored"] == 3
    rows = {row["user"]: row for row in parquet.read_table(tmp_path / "second" / "users.parquet").to_pylist()}
    assert rows["u1"]["after"] < rows["u1"]["before"]


def test_lora_of_several_ranks_goes_to_the_store(tmp_path):
    rows = fleets.table(tmp_path / "users.jsonl", (6, 14))
    spec = fleets.spec(
        "lora",
        ranks={10: 8},
        users={"source": str(rows)},
        store={"path": str(tmp_path / "store")},
        output=str(tmp_path / "run"),
    )
    train_fleet(spec)
    with Store(spec.store.path) as store:
        ranks = {name: store.get(name).config["r"] for name in ("u0", "u1") if "r" in store.get(name).config}
        assert store.get("u0").layout.shapes[0][0] == 4
        assert ranks == {"u0": 4}  # 8 is PEFT's default
        assert store.get("u1").layout.shapes[0][0] == 8
        assert store.get("u1").method == "peft:LORA"
    found = evaluate_fleet(spec, tmp_path / "scratch", part="all")
    assert [one["user"] for one in found["table"]] == ["u0", "u1"]
    assert all(one["gain"] > 0 for one in found["table"])


def alone(spec, folder: Path, user: str) -> float:
    """The mean loss over a user's rows of the adapter in the store, loaded onto the base model."""
    rows = [json.loads(line) for line in Path(spec.users.source).read_text().splitlines()]
    mine = [row for row in rows if row["user"] == user]
    learner = prepare_user(
        Rows(user, mine, [("", at) for at in range(len(mine))]),
        spec.model_copy(update={"users": spec.users.model_copy(update={"held_out": 0.0})}),
        load_tokenizer(spec.model.name_or_path),
        4,
    ).learner
    with Store(spec.store.path) as store:
        (folder / f"{user}{SUFFIX}").write_bytes(store.get_bytes(user))
    model = load_adapter(load_base(spec.model.name_or_path), folder / f"{user}{SUFFIX}")
    batch = Collator(0)([learner.train[at] for at in range(len(learner.train))])
    with torch.no_grad():
        return model(**batch).loss.item()


@pytest.mark.parametrize("part", ["held_out", "all"])
def test_evaluation_out_of_the_store(tmp_path, part):
    spec = spec_in(tmp_path, (6, 9, 1, 14))
    train_fleet(spec)
    found = evaluate_fleet(spec, tmp_path / "scratch", part=part)
    rows = {row["user"]: row for row in parquet.read_table(tmp_path / "run" / "users.parquet").to_pylist()}
    assert found["users"] == 3
    assert [one["user"] for one in found["table"]] == ["u0", "u1", "u3"]
    for one in found["table"]:
        if part == "held_out":
            assert one["before"] == pytest.approx(rows[one["user"]]["before"], rel=1e-5)
            assert one["after"] == pytest.approx(rows[one["user"]]["after"], rel=1e-5)
        assert one["gain"] > 0
    assert found["without_adapter"] == 1
    if part == "all":
        # as anybody would measure it: the adapter on a model of its own
        wanted = alone(spec, tmp_path, "u1")
        assert found["table"][1]["after"] == pytest.approx(wanted, rel=1e-4)


def test_evaluation_of_another_fleet_is_refused(tmp_path):
    spec = spec_in(tmp_path, (6,))
    train_fleet(spec)
    with pytest.raises(DataError, match="u0@1 is no adapter of this fleet"):
        evaluate_fleet(spec_in(tmp_path, (6,), method={"r": 2}), tmp_path / "scratch", part="held_out")


def test_training_that_explodes_stores_nothing(tmp_path):
    spec = spec_in(tmp_path, (6, 9), train={"learning_rate": 1e30})
    report = train_fleet(spec).report
    assert states(tmp_path / "run") == {"u0": "diverged", "u1": "diverged"}
    assert [one["what"][:14] for one in report["faults"]] == ["diverged after"] * 2
    assert contents(spec.store.path) == {}


def test_without_rows_to_judge_by_one_row_is_enough(tmp_path):
    spec = spec_in(tmp_path, (1, 4), users={"held_out": 0.0})
    train_fleet(spec)
    assert states(tmp_path / "run") == {"u0": "stored", "u1": "stored"}
    assert set(contents(spec.store.path)) == {"u0@1", "u1@1"}


def test_progress_by_hand():
    # a process that went on after 20 of 240 steps has made 40 in half a minute
    now = Progress(users=3, of_users=12, steps=60, of_steps=240, seconds=30.0, steps_here=40)
    assert now.adapters_per_hour == 12 * 40 / 240 * 3600 / 30
    assert now.seconds_left == 180 * 30 / 40
    fresh = Progress(users=0, of_users=12, steps=20, of_steps=240, seconds=0.0, steps_here=0)
    assert (fresh.adapters_per_hour, fresh.seconds_left) == (0, 0)


def test_names_of_adapters():
    assert name_of("ada", "team/{user}") == "team/ada"
    assert name_of("Ada Lovelace!", "{slug}") == "Ada-Lovelace-"
    assert re.fullmatch(r"[0-9a-f]{24}", name_of("Ada", "{digest}"))
