"""Strategies on a real study, with known losses: what is evaluated, in which order, and after an interruption."""

from __future__ import annotations

import json

import pytest

from modicum.errors import ConfigError
from modicum.search.options import SearchOptions
from modicum.search.space import SearchSpace
from modicum.search.strategies import Explorer
from modicum.search.study import FILE, Study

LAYERS = {f"model.layers.{block}.{name}": 8 for block in range(3) for name in ("q_proj", "up_proj")}
SPACE = SearchSpace.of(
    {"groups": [{"rank": [name], "choices": [8, 6, 4, 2]} for name in ("q_proj", "up_proj")]}, LAYERS, []
)
MAXIMIZED = {"loss": False, "parameters": False}


def cost(choices) -> int:
    return sum(choices.values())


def loss(choices) -> float:
    """Least where every group has the rank 6 or 2, in turns; each group's part has one valley."""
    return sum((rank - (6 if index % 2 else 2)) ** 2 for index, rank in enumerate(choices.values()))


def over(choices, limit) -> dict[str, float]:
    return {"parameters": cost(choices) / limit - 1} if cost(choices) > limit else {}


def search(folder, *, limit=1000, stop=None, identity=None, **options):
    """The points, and what was evaluated in order; `stop` interrupts the evaluation of that number."""
    wanted = SearchOptions(**options)
    study = Study(folder, SPACE, wanted, MAXIMIZED, identity or {"model": "a"})
    evaluated = []

    def evaluate(choices):
        if len(evaluated) == stop:
            raise KeyboardInterrupt
        evaluated.append(choices)
        return {"loss": loss(choices), "parameters": cost(choices)}, over(choices, limit)

    explorer = Explorer(study, wanted, evaluate, lambda c: over(c, limit), maximized=MAXIMIZED)
    if stop is None:
        explorer.run()
    else:
        with pytest.raises(KeyboardInterrupt):
            explorer.run()
    return study.points(), evaluated


def steps(first, second) -> int:
    """How many steps apart two sub-networks are."""
    return sum(abs(first[name] - second[name]) // 2 for name in first)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hill_climbing_keeps_the_best_so_far(seed, tmp_path):
    _, evaluated = search(tmp_path, strategy="hill", trials=60, seed=seed)
    assert evaluated[0] == SPACE.heuristic()
    for index, choices in enumerate(evaluated[1:], 1):
        assert steps(choices, min(evaluated[:index], key=loss)) == 1
    assert min(map(loss, evaluated)) == 0, "every group's part has one valley, so its bottom is reached"
    assert len({json.dumps(one) for one in evaluated}) == len(evaluated) < 60


def test_hill_climbing_evaluates_nothing_beyond_a_budget_it_keeps(tmp_path):
    limit = cost(SPACE.heuristic()) - 4
    _, evaluated = search(tmp_path, strategy="hill", trials=60, limit=limit)
    costs = [cost(choices) for choices in evaluated]
    assert costs[0] > limit, "the heuristic is over the budget, so the way into it comes first"
    inside = next(index for index, one in enumerate(costs) if one <= limit)
    assert inside == 2
    assert max(costs[inside:]) <= limit


@pytest.mark.parametrize("strategy", ["hill", "random", "nsga2"])
def test_a_resumed_search_is_an_uninterrupted_one(strategy, tmp_path):
    options = {"strategy": strategy, "trials": 10, "population": 4}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, _ = search(tmp_path / "whole", **options)
    _, before = search(tmp_path / "cut", **options, stop=6)
    cut, after = search(tmp_path / "cut", **options)
    assert [point.choices for point in cut] == [point.choices for point in whole]
    assert len(before) == 6
    assert not any(choices in before for choices in after), "what is known is not evaluated again"


@pytest.mark.parametrize("strategy", ["hill", "random", "nsga2"])
def test_a_study_with_more_points_than_wanted_is_left_alone(strategy, tmp_path):
    points, _ = search(tmp_path, strategy="random", trials=5)
    assert len(points) == 5
    more, evaluated = search(tmp_path, strategy=strategy, trials=3)
    # hill-climbing cannot do without its start
    assert len(more) - len(points) == len(evaluated) == (strategy == "hill")


def test_random_search_ends_where_everything_is_known(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SPACE", SearchSpace.of({"groups": [
        {"rank": ["q_proj"], "choices": [8, 4], "share": "model"}]}, LAYERS, []))  # fmt: skip
    points, _ = search(tmp_path, strategy="random", trials=20)
    assert sorted(point.choices["rank.q_proj"] for point in points) == [4, 8]


def test_random_search_evaluates_nothing_over_a_budget_that_shapes_tell(tmp_path):
    limit = cost(SPACE.smallest()) + 2  # one draw in 600 is so small
    points, evaluated = search(tmp_path, strategy="random", trials=6, limit=limit)
    assert all(cost(choices) <= limit for choices in evaluated)
    assert not any(point.violations for point in points)
    assert len(evaluated) > 2


def test_what_a_killed_process_had_begun_is_forgotten(tmp_path):
    study = Study(tmp_path, SPACE, SearchOptions(), MAXIMIZED, {"model": "a"})
    study.draw()
    points, evaluated = search(tmp_path, strategy="hill", trials=2)
    assert evaluated[0] == SPACE.heuristic()
    assert [point.choices for point in points] == evaluated


def test_evolution_goes_where_budgets_are_kept(tmp_path):
    limit = 24  # of 12 to 48, 30 in the mean
    points, _ = search(tmp_path, strategy="nsga2", trials=18, population=6, limit=limit)
    over = [bool(point.violations) for point in points]
    assert sum(over[:6]) > 3
    assert sum(over[12:]) < 6


def test_a_study_of_something_else_says_all_that_differs(tmp_path):
    search(tmp_path, strategy="heuristic", identity={"model": "a", "rows": "1", "prompt": 8})
    with pytest.raises(ConfigError) as error:
        search(tmp_path, strategy="heuristic", identity={"model": "b", "rows": "2", "prompt": 8})
    assert "model was 'a', is 'b'" in str(error.value)
    assert "rows was '1', is '2'" in str(error.value)
    assert "prompt" not in str(error.value)


def test_a_file_that_is_no_study(tmp_path):
    (tmp_path / FILE).write_bytes(b"not a data base" * 100)
    with pytest.raises(ConfigError, match="cannot be read as a study"):
        search(tmp_path, strategy="heuristic")
