"""Searching a real super-network of the embedded model: strategies, budgets, studies that go on, what is refused."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from types import SimpleNamespace

import pytest
from tests.train.test_elastic import recipe

from modicum.data import bundled
from modicum.errors import ConfigError, DataError
from modicum.search.options import SearchOptions
from modicum.search.pareto import front
from modicum.search.study import Point
from modicum.train.run import tune
from modicum.train.search import search_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tune(recipe(tmp_path_factory.mktemp("search") / "run")).folder


def options(**values):
    return SearchOptions(**{"max_rows": 4, "prompt": 8, "generate": 2, "repeats": 3, **values})


def test_the_heuristic_is_one_point(run, tmp_path):
    found = search_run(run, options(strategy="heuristic"), tmp_path / "s")
    assert len(found.points) == 1
    assert (
        found.best.choices["0.width.mlp"]
        == json.loads((tmp_path / "s/sub_network.json").read_text())["choices"]["0.width.mlp"]
    )
    assert {p.name for p in (tmp_path / "s").iterdir()} >= {
        "study.db",
        "search.json",
        "pareto.html",
        "pareto.png",
    }


def test_hill_climbing_starts_at_the_heuristic_and_never_gets_worse(run, tmp_path):
    told = []
    found = search_run(run, options(strategy="hill", trials=10), tmp_path / "s", tell=told.append)
    assert told[0].choices == {
        name: choices[(len(choices) - 1) // 2] for name, choices in _choices(tmp_path / "s", run).items()
    }
    assert (
        len({json.dumps(point.choices, sort_keys=True) for point in found.points}) == len(found.points) <= 10
    )
    assert found.best.values["loss"] <= told[0].values["loss"]
    # one step from an incumbent: from some point seen before, in one group
    for index, point in enumerate(told[1:], 1):
        steps = [sum(point.choices[g] != other.choices[g] for g in point.choices) for other in told[:index]]
        assert min(steps) == 1


def _choices(folder, run):
    from modicum.models.loading import load_adapted, load_base
    from modicum.search.space import SearchSpace

    del folder
    model = load_adapted(load_base("embedded"), run / "adapter")
    space = SearchSpace.of_model(model.peft_config["default"].search_space, model)
    return {name: group.choices for name, group in space.groups.items()}


@pytest.mark.parametrize(
    ("strategy", "cost"), [("random", "macs"), ("nsga2", "macs"), ("random", "bytes"), ("nsga2", "memory")]
)
def test_budgets_and_objectives(strategy, cost, run, tmp_path):
    wanted = options(
        strategy=strategy,
        trials=6,
        population=3,
        objectives=["parameters", "token_accuracy"],
        budgets={cost: 0.95},
    )
    found = search_run(run, wanted, tmp_path / "s")
    assert list(found.objectives.items()) == [("token_accuracy", True), ("parameters", False)]
    assert len(found.points) == 6
    for point in found.points:
        assert set(point.values) == {"token_accuracy", "parameters", cost}
        assert bool(point.violations) == (point.values[cost] > 0.95 * found.whole[cost])
    assert not any(point.violations for point in found.front)


def test_the_point_is_what_evaluating_its_sub_network_gives(run, tmp_path):
    from modicum.adapters.elastic import SubNetwork, Switch
    from modicum.data.prepare import prepare
    from modicum.evaluate.run import evaluate
    from modicum.models.loading import load_adapted, load_base, load_tokenizer

    found = search_run(run, SearchOptions(strategy="random", trials=2), tmp_path / "s")
    model, tokenizer = load_adapted(load_base("embedded"), run / "adapter"), load_tokenizer("embedded")
    Switch(model).activate(SubNetwork.read(found.sub_network()))
    rows = prepare(recipe(tmp_path).data, tokenizer, "causal_lm").validation
    measured = evaluate(model, tokenizer, rows, exact_match=False, resamples=10).metrics["loss"].value
    assert measured == pytest.approx(found.best.values["loss"], rel=1e-6)


def test_ranks_of_lora_xs_are_trained_and_searched(tmp_path):
    from modicum.adapters.elastic import SubNetwork, Switch
    from modicum.data.prepare import prepare
    from modicum.evaluate.run import evaluate
    from modicum.models.loading import load_adapted, load_base, load_tokenizer

    space = {
        "groups": [
            {"rank": ["heads.outputs"], "choices": [4, 2, 1], "share": "model"},
            {"rank": ["mlp.outputs", "mlp.inputs"], "choices": [4, 1], "share": "model"},
        ]
    }
    made = recipe(tmp_path / "run", method={"name": "lora_xs", "r": 4}, elastic__space=space)
    folder = tune(made.with_values(train__learning_rate=0.05)).folder
    found = search_run(folder, SearchOptions(strategy="random", trials=9), tmp_path / "s")
    assert len(found.points) == found.space_size == 6
    assert len({point.values["loss"] for point in found.points}) == 6
    model, tokenizer = load_adapted(load_base("embedded"), folder / "adapter"), load_tokenizer("embedded")
    switch = Switch(model)
    for name, adapter in switch.adapters.items():
        # all of it was trained, what only the largest rank has too
        if name.endswith(("q_proj", "down_proj")):
            assert adapter.R[3].abs().max() > 1e-3, name
    switch.activate(SubNetwork.read(found.sub_network()))
    found_ranks = {name.rpartition(".")[2]: adapter.active_rank for name, adapter in switch.adapters.items()}
    assert found_ranks["q_proj"] == next(v for k, v in found.best.choices.items() if "q_proj" in k)
    assert found_ranks["down_proj"] == next(v for k, v in found.best.choices.items() if "down_proj" in k)
    rows = prepare(made.data, tokenizer, "causal_lm").validation
    measured = evaluate(model, tokenizer, rows, exact_match=False, resamples=10).metrics["loss"].value
    assert measured == pytest.approx(found.best.values["loss"], rel=1e-6)


def test_a_study_goes_on_where_it_stopped(run, tmp_path):
    wanted = options(strategy="random", trials=3)
    first = search_run(run, wanted, tmp_path / "s")
    with pytest.raises(ConfigError, match="--resume"):
        search_run(run, wanted, tmp_path / "s")
    told = []
    more = search_run(
        run, wanted.model_copy(update={"trials": 5}), tmp_path / "s", resume=True, tell=told.append
    )
    assert more.points[:3] == first.points
    assert len(told) == 2
    assert len({json.dumps(point.choices, sort_keys=True) for point in more.points}) == 5
    assert len(search_run(run, wanted, tmp_path / "s", overwrite=True).points) == 3


def test_a_study_of_another_adapter_is_refused(run, tmp_path):
    search_run(run, options(strategy="random", trials=1), tmp_path / "s")
    other = tune(recipe(tmp_path / "other", train__seed=1)).folder
    with pytest.raises(ConfigError, match="study of something else") as error:
        search_run(other, options(strategy="random", trials=2), tmp_path / "s", resume=True)
    assert "adapter" in str(error.value)


def test_starting_anew_forgets_the_search_alone_and_only_if_it_can_begin(run, tmp_path):
    search_run(run, options(strategy="random", trials=2), tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    before = (tmp_path / "search.json").read_bytes()
    with pytest.raises(ConfigError, match="smallest sub-network"):
        search_run(run, options(budgets={"parameters": 0.1}), tmp_path, overwrite=True)
    assert (tmp_path / "search.json").read_bytes() == before
    assert len(search_run(run, options(strategy="heuristic"), tmp_path, overwrite=True).points) == 1
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": 16}, "prompt, batch was [8, 1], is [16, 1]"),
        ({"max_rows": 3}, "rows"),
        ({"budgets": {"macs": 0.9}}, "budgets"),
        ({"objectives": ["loss", "macs"]}, "objectives"),
    ],
)
def test_a_study_measured_otherwise_is_refused(changes, words, run, tmp_path):
    search_run(run, options(strategy="heuristic"), tmp_path)
    with pytest.raises(ConfigError, match="study of something else") as error:
        search_run(run, options(strategy="random", trials=2, **changes), tmp_path, resume=True)
    assert words in str(error.value)


def test_rows_of_other_labels_are_other_rows():
    from modicum.data.encoded import Encoded, EncodedRow
    from modicum.train.search import rows_digest

    one, other = (Encoded([EncodedRow([1, 2], target=t)], class_targets=True) for t in (0, 1))
    assert rows_digest(one) != rows_digest(other)


def test_times_of_ranks_alone_are_those_of_adapters_beside_the_model(tmp_path):
    space = {"groups": [{"rank": ["q_proj"], "choices": [4, 2], "share": "model"}]}
    ranks = tune(recipe(tmp_path / "run", elastic__space=space, train__max_steps=1)).folder
    found = search_run(
        ranks, options(strategy="random", trials=5, objectives=["loss", "prefill_time"]), tmp_path / "s"
    )
    assert sorted(point.choices["rank.q_proj"] for point in found.points) == [2, 4]
    assert all(0 < point.values["prefill_time"] < 10 for point in found.points)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_diverged_adapter_is_said_to_be_one(run, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run/adapter/adapter_model.safetensors"
    save_file({name: value * 1e30 for name, value in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="diverged"):
        search_run(tmp_path / "run", options(strategy="heuristic"), tmp_path / "s")


def test_the_runs_of_a_sweep_are_named(tmp_path):
    swept = tune(
        recipe(tmp_path / "sweep", sweep={"learning_rate": [1e-3, 1e-2], "seeds": [0]}, train__max_steps=1)
    ).folder
    with pytest.raises(ConfigError, match=r"lr=0\.001/seed=0"):
        search_run(swept, options())
    assert search_run(swept / "lr=0.001/seed=0", options(strategy="heuristic")).best


def test_low_bit_bases_stay_as_many_bytes_as_they_are():
    import peft
    import torch
    from tests.models_for_tests import llama

    from modicum.methods.elastic_lora import ElasticLoraConfig
    from modicum.quant.huggingface import quantized_linear
    from modicum.quant.spec import AffineSpec
    from modicum.search.costs import Costs

    base = llama()
    dense = peft.get_peft_model(llama(), ElasticLoraConfig(r=4))
    for name, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and "proj" in name:
            parent, _, child = name.rpartition(".")
            spec = AffineSpec(4, (1, 8), "integer", offset_dtype="float32")
            setattr(base.get_submodule(parent), child, quantized_linear(module.requires_grad_(False), spec))
    low = peft.get_peft_model(base, ElasticLoraConfig(r=4))
    costs, full = (Costs.of_model(model, merged=False) for model in (low, dense))
    assert costs.parameters() == full.parameters()
    assert costs.bytes() < full.bytes()
    held = {id(t): t.nbytes for t in (*low.parameters(), *low.buffers())}
    assert costs.bytes() == sum(held.values())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "nsga2"])
def test_two_workers_share_a_study(strategy, run, tmp_path):
    mine, patience = [], time.monotonic() + 240  # in case there is no other

    def finished():
        with contextlib.closing(sqlite3.connect(tmp_path / "s/study.db", timeout=60)) as kept:
            return kept.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()[0]

    def wait_for_the_other(point):
        mine.append(point.number)
        while finished() == len(mine) and time.monotonic() < patience:
            time.sleep(0.05)

    wanted = options(strategy=strategy, trials=6, population=3, workers=2)
    found = search_run(run, wanted, tmp_path / "s", tell=wait_for_the_other)
    assert 6 <= len(found.points) <= 7
    assert set(mine) < {point.number for point in found.points}
    assert mine


@pytest.fixture
def timed(monkeypatch):
    """Times that go with the channels that are left, prefill with their square; nothing else is stood in for."""
    from modicum.search import evaluator

    def channels(model):
        return sum(layer.mlp.up_proj.out_features for layer in model.model.layers)

    def measure(models, *, baseline, **_):
        share = channels(models["sub-network"]) / channels(models[baseline])
        times = {
            "prefill_ratio": SimpleNamespace(value=share**-2),
            "decode_ratio": SimpleNamespace(value=1 / share),
        }
        return SimpleNamespace(models=[SimpleNamespace(name="sub-network", **times)])

    monkeypatch.setattr(evaluator, "measure", measure)


@pytest.mark.usefixtures("timed")
def test_budgets_of_time(run, tmp_path):
    found = search_run(
        run, options(strategy="random", trials=8, budgets={"decode_time": 0.77}), tmp_path / "s"
    )
    whole = {name: choices[0] for name, choices in _choices(tmp_path, run).items()}
    widths = [name for name in whole if name.endswith("mlp") and ".width." in name]
    for point in found.points:
        share = sum(point.choices[name] for name in widths) / sum(whole[name] for name in widths)
        assert point.values["decode_time"] == pytest.approx(share)
        over = {"decode_time": pytest.approx(share / 0.77 - 1)} if share > 0.77 else {}
        assert point.violations == over
    kept = [point for point in found.points if not point.violations]
    assert 0 < len(kept) < len(found.points)
    assert found.best.values["loss"] == min(point.values["loss"] for point in kept)
    assert {point.number for point in found.front} <= {point.number for point in kept}


@pytest.mark.usefixtures("timed")
def test_times_that_not_even_the_smallest_sub_network_keeps(run, tmp_path):
    wanted = options(budgets={"decode_time": 0.4, "prefill_time": 0.2, "parameters": 0.99})
    with pytest.raises(ConfigError) as error:
        search_run(run, wanted, tmp_path / "s")
    assert "budgets.decode_time = 0.4, the smallest sub-network takes 0.5" in str(error.value)
    assert "budgets.prefill_time = 0.2, the smallest sub-network takes 0.25" in str(error.value)
    assert "parameters" not in str(error.value)
    assert not (tmp_path / "s").exists()


def test_times_are_shares_of_the_super_network(run, tmp_path):
    wanted = options(strategy="random", trials=1, objectives=["loss", "prefill_time", "decode_time"])
    point = search_run(run, wanted, tmp_path / "s").points[0]
    assert set(point.values) == {"loss", "prefill_time", "decode_time"}
    assert all(value > 0 for value in point.values.values())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"budgets": {"parameters": 0.1}}, "the smallest sub-network takes"),
        ({"budgets": {"paramters": 0.8}}, "parameters"),
        ({"objectives": ["los", "parameters"]}, "loss"),
        ({"objectives": ["parameters"]}, "exactly one metric"),
        ({"workers": 2}, "step by step"),
        ({"strategy": "random", "workers": 2, "objectives": ["loss", "decode_time"]}, "disturb"),
        ({"budgets": {"decode_time": 1.3}}, "at most 1"),
        ({"budgets": {"parameters": float("nan")}}, "above 0"),
        ({"budgets": {"parameters": 0.8, "macs": 0}}, "above 0"),
        (
            {"budgets": {"parameters": 0.1, "macs": 0.2, "bytes": 0.9}},
            r"parameters = 0\.1.*macs = 0\.2[^y]*$",
        ),
    ],
)
def test_options_that_cannot_work(values, words, run, tmp_path):
    with pytest.raises(ConfigError, match=words):
        search_run(run, options(**values), tmp_path / "s")
    assert not (tmp_path / "s" / "search.json").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_that_were_seen_are_refused(split, run, tmp_path):
    with pytest.raises(DataError, match="training" if split == "train" else "test"):
        search_run(run, options(rows=str(bundled.path("notes", split)), max_rows=None), tmp_path / "s")


def test_a_run_without_a_search_space(tmp_path):
    plain = tune(recipe(tmp_path / "run", elastic=None)).folder
    with pytest.raises(ConfigError, match="search space"):
        search_run(plain, options())
    with pytest.raises(ConfigError, match="holds no run"):
        search_run(tmp_path, options())


def point(number, loss, cost, **over):
    return Point(number, {"g": number}, {"loss": loss, "parameters": cost}, over)


def test_the_front_holds_what_nothing_beats():
    points = [
        point(0, 1.0, 10),
        point(1, 1.0, 12),
        point(2, 0.9, 15),
        point(3, 1.2, 9),
        point(4, 1.3, 9),
        point(5, 0.1, 1, parameters=0.5),
        point(6, 1.0, 10),
    ]
    assert [p.number for p in front(points, {"loss": False, "parameters": False})] == [2, 0, 3]
