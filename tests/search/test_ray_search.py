"""A search whose points are tasks on a local Ray of two processes: the points of one worker."""

from __future__ import annotations

import pytest
from tests.jobs import rays
from tests.search.test_search import options
from tests.train.test_elastic import recipe

from modicum.errors import MissingExtraError, ModicumError
from modicum.train.run import tune
from modicum.train.search import search_run

try:
    import ray
except ImportError:
    ray = None

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of several kinds


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tune(recipe(tmp_path_factory.mktemp("search") / "run")).folder


def test_without_ray_nothing_is_begun(run, tmp_path):
    if ray is not None:
        pytest.skip("Ray is installed")
    with pytest.raises(MissingExtraError, match=r"modicum\[ray\]"):
        search_run(run, options(strategy="heuristic"), tmp_path / "s", ray=True)
    assert not (tmp_path / "s").exists()


@pytest.fixture(scope="module")
def joined():
    with rays.two_workers() as found:
        yield found


def values(result):
    return [(point.choices, point.values, point.violations) for point in result.points]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["random", "nsga2", "hill"])
def test_points_are_those_of_one_worker(strategy, run, tmp_path, joined):
    wanted = options(strategy=strategy, trials=8, population=4, budgets={"macs": 0.95})
    alone = search_run(run, wanted, tmp_path / "alone")
    workers = 1 if strategy == "hill" else 2
    told = []
    found = search_run(
        run, wanted.model_copy(update={"workers": workers}), tmp_path / "s", ray=True, tell=told.append
    )
    if strategy == "random":
        assert sorted(values(found), key=str) == sorted(values(alone), key=str)
    else:
        assert values(found) == values(alone)
    assert len(told) == len(found.points) == len(alone.points)
    assert found.best.choices == alone.best.choices
    assert (tmp_path / "s" / "sub_network.json").read_bytes() == (
        tmp_path / "alone" / "sub_network.json"
    ).read_bytes()
    # and on from there
    more = wanted.model_copy(update={"trials": 10, "workers": workers})
    assert len(search_run(run, more, tmp_path / "s", resume=True, ray=True).points) == 10


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_changes_no_point(run, tmp_path, joined):
    wanted = options(strategy="random", trials=8, budgets={"macs": 0.95})
    alone = search_run(run, wanted, tmp_path / "alone")
    killed = []

    def tell(point):
        if not killed:
            # of two processes, one that evaluates
            killed.extend(filter(None, [rays.kill_one()]))

    two = wanted.model_copy(update={"workers": 2})
    found = search_run(run, two, tmp_path / "s", ray=True, tell=tell)
    assert killed
    assert sorted(values(found), key=str) == sorted(values(alone), key=str)


@pytest.mark.slow
def test_a_point_that_fails_is_named(run, tmp_path, joined):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run/adapter/adapter_model.safetensors"
    save_file({name: value * 1e30 for name, value in load_file(file).items()}, file)
    with pytest.raises(ModicumError, match=r"(?s)^the sub-network .*diverged"):
        search_run(tmp_path / "run", options(strategy="heuristic"), tmp_path / "s", ray=True)
