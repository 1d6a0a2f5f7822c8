"""Tasks on a local Ray of two processes: who dies is replaced, what fails is told, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
from tests.jobs import rays, work

from modicum.errors import ConfigError, MissingExtraError, ModicumError
from modicum.jobs.cluster import ADDRESS, Cluster, gpu_for, threads_for
from modicum.jobs.pool import Task

try:
    import ray
except ImportError:
    ray = None

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of several kinds


def test_without_ray_the_extra_is_named():
    if ray is not None:
        pytest.skip("Ray is installed")
    with pytest.raises(MissingExtraError, match=r"modicum\[ray\]"):
        Cluster(2)


@pytest.mark.parametrize(
    ("cores", "count", "threads"),
    [
        ([8], 2, 4),
        ([8], 3, 2),
        ([4, 2], 2, 2),
        ([4, 2], 3, 2),
        ([16, 4], 3, 5),
        ([0, 2, 2], 2, 2),
        ([2], 5, 1),
    ],
)
def test_threads_are_those_that_all_tasks_can_have_at_once(cores, count, threads):
    assert threads_for(cores, count) == threads
    assert threads == 1 or sum(one // threads for one in cores) >= count


@pytest.mark.parametrize(
    ("gpus", "count", "share"), [(0, 3, 0), (4, 1, 1), (2, 2, 1), (2, 3, 0.5), (1, 3, 0.3333), (4, 6, 0.5)]
)
def test_a_gpu_is_shared_by_whole_tasks(gpus, count, share):
    assert gpu_for(gpus, count) == share
    assert not share or gpus * int(1 / share) >= count


@pytest.mark.slow
def test_an_address_where_nothing_answers_is_told(monkeypatch):
    # before this process joins one, which would be the one that is meant
    pytest.importorskip("ray", reason="Ray is not installed (modicum[ray])")
    monkeypatch.setenv(ADDRESS, "127.0.0.1:1")
    with (
        pytest.raises(ConfigError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:1"),
        Cluster(1),
    ):
        pass


@pytest.fixture(scope="module")
def joined():
    with rays.two_workers() as found:
        yield found


def outcomes(pool, *tasks):
    return {outcome.key: outcome for outcome in pool.outcomes(tasks)}


@pytest.mark.slow
def test_tasks_run_side_by_side_and_in_this_folder(joined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Cluster(2) as pool:
        assert (pool.threads, pool.share) == (1, 0.5)
        found = outcomes(pool, *(Task(n, work.here, ()) for n in range(6)))
    values = [found[n].result("here") for n in range(6)]
    assert {folder for folder, _, _ in values} == {str(tmp_path)}
    assert {threads for _, _, threads in values} == {1}
    assert os.getpid() not in {pid for _, pid, _ in values}
    # processes are used again, unless each task is to have its own
    assert len({pid for _, pid, _ in values}) <= 2
    with Cluster(2, fresh=True) as pool:
        found = outcomes(pool, *(Task(n, work.here, ()) for n in range(4)))
    assert len({found[n].result("here")[1] for n in range(4)}) == 4
    # the cluster is not this pool's to end
    assert joined.is_initialized()


@pytest.mark.slow
def test_who_dies_is_begun_again_and_what_is_raised_is_told_once(joined, tmp_path, capsys):
    folders = {name: tmp_path / name for name in ("twice", "always", "raises")}
    for folder in folders.values():
        folder.mkdir()
    with Cluster(2, 1, retries=2) as pool:
        found = outcomes(
            pool,
            Task("twice", work.die, (folders["twice"], 2)),
            Task("always", work.die, (folders["always"], 9)),
            Task("raises", work.fail_again, (folders["raises"],)),
            Task("else", work.fail, ("else",)),
            Task("good", work.add, (1, 1)),
            Task("unreadable", work.add, (work.Unreadable(), 1)),
        )
    # what Ray says of it is no result
    assert capsys.readouterr().out == ""
    assert found["twice"].result("task") == 3
    assert "died 3 times" in found["always"].error
    assert len(list(folders["always"].iterdir())) == 3
    assert found["raises"].error == "no rows"
    assert len(list(folders["raises"].iterdir())) == 1
    assert found["else"].error == "ZeroDivisionError: unexpected"
    assert "work.py" in found["else"].trace
    assert found["good"].value[0] == 2
    assert "no rows" in found["unreadable"].error
    with pytest.raises(ModicumError, match="cohort 7: no rows"):
        found["raises"].result("cohort 7")


@pytest.mark.slow
def test_more_threads_than_any_machine_has_are_refused(joined):
    with (
        pytest.raises(ConfigError, match="takes 3 threads, and no machine of the cluster has more than 2"),
        Cluster(1, 3),
    ):
        pass


@pytest.mark.slow
def test_leaving_ends_what_runs_and_the_cluster_goes_on(joined, tmp_path):
    with Cluster(2) as pool:
        pool.start(Task(0, work.tell_and_wait, (tmp_path / "pid",)))
        rays.wait_for((tmp_path / "pid").is_file)
    pid = int((tmp_path / "pid").read_text())
    assert rays.ended(pid)
    with Cluster(2) as pool:
        assert outcomes(pool, Task(0, work.add, (1, 2)))[0].value[0] == 3


@pytest.mark.slow
def test_a_named_cluster_is_joined_and_left_as_it_is(joined, tmp_path):
    """By another process, as a user would; what was under way for it ends with it."""
    address = joined.get_runtime_context().gcs_address
    code = (
        "from pathlib import Path\n"
        "from tests.jobs import work\n"
        "from modicum.jobs.cluster import Cluster\n"
        "from modicum.jobs.pool import Task\n"
        "with Cluster(2) as pool:\n"
        f"    pool.start(Task(0, work.tell_and_wait, (Path({str(tmp_path / 'pid')!r}),)))\n"
        "    pool.start(Task(1, work.add, (1, 2)))\n"
        "    [outcome] = pool.wait()\n"
        f"    while not Path({str(tmp_path / 'pid')!r}).is_file(): pass\n"
        "print('sum', outcome.value[0], pool.threads)\n"
    )
    environment = {**os.environ, ADDRESS: address}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "sum 3 1" in done.stdout
    pid = int((tmp_path / "pid").read_text())
    assert rays.ended(pid)
    assert len([node for node in joined.nodes() if node["Alive"]]) == 1


@pytest.mark.slow
def test_ctrl_c_ends_a_cluster_of_its_own_with_everything_in_it(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (modicum[ray])")
    file = tmp_path / "pid"
    code = f"from pathlib import Path; from tests.jobs import work; work.cluster(Path({str(file)!r}))"
    with rays.started([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        rays.wait_for(file.is_file)
        below = psutil.Process(process.pid).children(recursive=True)
        assert int(file.read_text()) in {one.pid for one in below}
        # as a terminal does it: everybody in the foreground hears of it
        os.killpg(process.pid, signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[1].decode()
        assert rays.gone(below)


_TWO_MACHINES = """
import os
from pathlib import Path
from ray.cluster_utils import Cluster as Machines
from tests.jobs import rays, work
from modicum.jobs.cluster import ADDRESS, Cluster
from modicum.jobs.pool import Task

# the head takes no tasks, so that it is not the one that goes
machines = Machines(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = {node.node_id: node for node in (machines.add_node(num_cpus=2), machines.add_node(num_cpus=2))}
os.environ[ADDRESS] = machines.address
file = Path(FILE)
with Cluster(2) as pool:
    assert (pool.threads, pool.share) == (2, 1.0), (pool.threads, pool.share)
    pool.start(Task(0, work.machine, (file,)))
    rays.wait_for(file.is_file)
    machines.remove_node(nodes.pop(file.read_text()), allow_graceful=False)
    [outcome] = pool.wait()
    assert outcome.result("task") == next(iter(nodes)), outcome
machines.shutdown()
print("went on")
"""


@pytest.mark.slow
def test_a_task_whose_machine_dies_goes_to_another(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (modicum[ray])")
    code = _TWO_MACHINES.replace("FILE", repr(str(tmp_path / "node")))
    environment = {name: value for name, value in os.environ.items() if name != ADDRESS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.endswith("went on\n"), done.stderr[-3000:]
