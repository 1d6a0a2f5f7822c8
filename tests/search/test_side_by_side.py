"""Strategies whose points are evaluated many at a time, in whatever order: the same points as one after the other."""

from __future__ import annotations

import pytest
from tests.search.test_strategies import MAXIMIZED, SPACE, cost, loss, over

from modicum.search.options import SearchOptions
from modicum.search.strategies import Explorer
from modicum.search.study import Study


def search(folder, *, many=None, limit=1000, stop=None, **options):
    """The points; with `many`, side by side, and `many` says in which order a batch ends. `stop`: after so many."""
    wanted = SearchOptions(**options)
    folder.mkdir(exist_ok=True)
    study = Study(folder, SPACE, wanted, MAXIMIZED, {"model": "a"})
    sizes, done = [], []

    def evaluate(choices):
        return {"loss": loss(choices), "parameters": cost(choices)}, over(choices, limit)

    def together(batch):
        sizes.append(len(batch))
        for at in many(range(len(batch))):
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(at)
            yield at, evaluate(batch[at]), 0.5

    explorer = Explorer(
        study,
        wanted,
        evaluate,
        lambda c: over(c, limit),
        maximized=MAXIMIZED,
        many=together if many else None,
    )
    if stop is None:
        explorer.run()
    else:
        with pytest.raises(KeyboardInterrupt):
            explorer.run()
    return study.points(), sizes


def numbered(points):
    return [(point.number, point.choices, point.values, point.violations) for point in points]


def found(points):
    return sorted((sorted(point.choices.items()), sorted(point.values.items())) for point in points)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("order", [reversed, list], ids=["last first", "first first"])
def test_generations_are_those_of_one_after_the_other(seed, order, tmp_path):
    options = {"strategy": "nsga2", "trials": 45, "population": 8, "seed": seed, "limit": 26}
    alone, _ = search(tmp_path / "alone", **options)
    points, sizes = search(tmp_path / "many", many=order, **options)
    assert numbered(points) == numbered(alone)
    assert len(points) == 45
    # never across a generation; a sub-network that turned up before is not evaluated again
    assert len(sizes) == 6
    assert max(sizes) <= 8
    assert sum(sizes) == len({str(sorted(point.choices.items())) for point in points}) < 45


@pytest.mark.parametrize("limit", [1000, 20])
def test_random_points_are_those_of_one_after_the_other(limit, tmp_path):
    options = {"strategy": "random", "trials": 30, "limit": limit}
    alone, _ = search(tmp_path / "alone", **options)
    points, sizes = search(tmp_path / "many", many=reversed, **options)
    assert found(points) == found(alone)
    assert sizes[0] == len(points)
    assert {point.seconds for point in points} == {0.5}


def test_few_random_points_end_the_search(tmp_path):
    options = {"strategy": "random", "trials": 500, "limit": 14}
    alone, _ = search(tmp_path / "alone", **options)
    points, _ = search(tmp_path / "many", many=list, **options)
    assert found(points) == found(alone)
    assert 0 < len(points) < 500


def test_steps_are_taken_one_by_one(tmp_path):
    options = {"strategy": "hill", "trials": 40}
    alone, _ = search(tmp_path / "alone", **options)
    points, sizes = search(tmp_path / "many", many=list, **options)
    assert numbered(points) == numbered(alone)
    assert set(sizes) == {1}


@pytest.mark.parametrize("strategy", ["random", "nsga2"])
def test_an_interrupted_batch_is_gone_on_with(strategy, tmp_path):
    options = {"strategy": strategy, "trials": 24, "population": 8}
    alone, _ = search(tmp_path / "alone", **options)
    points, _ = search(tmp_path / "many", many=reversed, stop=11, **options)
    # a point that turned up before is told without being evaluated
    assert 11 <= len(points) < 24
    points, _ = search(tmp_path / "many", many=reversed, **options)
    assert len(points) == 24
    if strategy == "random":
        assert found(points) == found(alone)
