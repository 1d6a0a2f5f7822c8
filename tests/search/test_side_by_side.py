"""Strategies whose points are evaluated many at a time, in whatever order: the same points as one after the other."""

from __future__ import annotations

import pytest
from tests.search.test_strategies import LAYERS, MAXIMIZED, cost, loss, over

from modicum.search.options import SearchOptions
from modicum.search.space import SearchSpace
from modicum.search.strategies import Explorer
from modicum.search.study import Study

#: sixteen sub-networks, so that evolution meets some of them again
GROUPS = [{"rank": [name], "choices": [8, 6, 4, 2], "share": "model"} for name in ("q_proj", "up_proj")]
SPACE = SearchSpace.of({"groups": GROUPS}, LAYERS, [])


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


def test_generations_are_those_of_one_after_the_other(tmp_path):
    options = {"strategy": "nsga2", "trials": 17, "population": 5, "limit": 12}
    alone, _ = search(tmp_path / "alone", **options)
    points, sizes = search(tmp_path / "many", many=reversed, **options)
    assert numbered(points) == numbered(alone)
    assert len(points) == 17
    # never across a generation; a sub-network that turned up before is not evaluated again
    assert len(sizes) == 4
    assert max(sizes) <= 5
    assert sum(sizes) == len({str(sorted(point.choices.items())) for point in points}) < 17


@pytest.mark.parametrize("limit", [1000, 9])
def test_random_points_are_those_of_one_after_the_other(limit, tmp_path):
    options = {"strategy": "random", "trials": 10, "limit": limit}
    alone, _ = search(tmp_path / "alone", **options)
    points, sizes = search(tmp_path / "many", many=reversed, **options)
    assert found(points) == found(alone)
    assert sizes[0] == len(points)
    assert {point.seconds for point in points} == {0.5}


def test_few_random_points_end_the_search(tmp_path):
    options = {"strategy": "random", "trials": 500, "limit": 6}
    alone, _ = search(tmp_path / "alone", **options)
    points, _ = search(tmp_path / "many", many=list, **options)
    assert found(points) == found(alone)
    assert len(points) == 3


def test_steps_are_taken_one_by_one(tmp_path):
    options = {"strategy": "hill", "trials": 14}
    alone, _ = search(tmp_path / "alone", **options)
    points, sizes = search(tmp_path / "many", many=list, **options)
    assert numbered(points) == numbered(alone)
    assert set(sizes) == {1}


@pytest.mark.parametrize("strategy", ["random", "nsga2"])
def test_an_interrupted_batch_is_gone_on_with(strategy, tmp_path):
    # two generations; the next one would have the same parents in another order
    options = {"strategy": strategy, "trials": 12, "population": 6, "seed": 2}
    alone, _ = search(tmp_path / "alone", **options)
    points, _ = search(tmp_path / "many", many=reversed, stop=8, **options)
    # a point that turned up before is told without being evaluated
    assert 8 <= len(points) < 12
    points, _ = search(tmp_path / "many", many=reversed, **options)
    assert len(points) == 12
    assert found(points) == found(alone)
