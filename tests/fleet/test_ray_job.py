"""A fleet on a local Ray of two processes: killed workers and a killed command change nothing of what is stored."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import psutil
import pytest
from tests.cli.adapter_files import run
from tests.docs.pages import ROOT
from tests.fleet import fleets
from tests.fleet.test_job import contents, spec_in, states
from tests.jobs import rays

from modicum.errors import MissingExtraError
from modicum.fleet.job import train_fleet
from modicum.fleet.ledger import FILE
from modicum.jobs.cluster import ADDRESS

try:
    import ray
except ImportError:
    ray = None

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of several kinds
PAGE = ROOT / "docs" / "do" / "fleet.md"
#: rows of users: one of them has too few
COUNTS = (14, 13, 9, 12, 1, 11, 14, 10, 8, 14, 13, 12)
TRAIN = {"epochs": 40, "cohort_size": 2, "tokens_per_pass": 256}


def spec_of(folder, rows):
    folder.mkdir()
    return spec_in(folder, rows=rows, train=TRAIN, store={"alias": "production"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The job in this process, and its rows."""
    folder = tmp_path_factory.mktemp("whole")
    rows = fleets.table(folder / "users.jsonl", COUNTS)
    train_fleet(spec_of(folder / "job", rows))
    return folder / "job", rows


def test_without_ray_nothing_is_begun(tmp_path):
    if ray is not None:
        pytest.skip("Ray is installed")
    spec = spec_in(tmp_path, (4,))
    with pytest.raises(MissingExtraError, match=r"modicum\[ray\]"):
        train_fleet(spec, workers=2)
    assert not spec.folder.exists()


def test_workers_without_ray_are_refused(tmp_path, capsys):
    done = run(capsys, "fleet", "train", tmp_path / "fleet.yaml", "--workers", "2")
    assert done.code == 1
    assert "--workers are for --ray" in done.err


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_changes_nothing(tmp_path, whole):
    pytest.importorskip("ray", reason="Ray is not installed (modicum[ray])")
    spec, killed, seen = spec_of(tmp_path / "job", whole[1]), [], []

    def tell(now):
        seen.append(now)
        if not killed and 0 < now.users < len(COUNTS):
            # of two processes, one that is training
            killed.extend(filter(None, [rays.kill_one()]))

    result = train_fleet(spec, workers=2, tell=tell)
    assert killed
    assert contents(spec.store.path) == contents(whole[0] / "store")
    assert states(result.folder) == states(whole[0] / "run")
    assert result.report["timing"]["cohorts"] == 6
    assert result.report["sizes"]["threads"] == 1
    assert result.report["numbers_per_adapter"].keys() == {"4"}
    assert seen[-1].users == len(COUNTS)
    assert seen[-1].steps == seen[-1].of_steps
    assert seen[-1].adapters_per_hour > 0
    # the cluster was its own, and has ended with it
    assert rays.gone(rays.processes())


def cohorts(folder):
    """How many cohorts of a job are on the disk."""
    try:
        with closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True)) as ledger:
            return ledger.execute("SELECT count(*) FROM cohorts").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def below(pid):
    """The processes below one, but two agents of Ray's, which touch nothing and look up once a minute."""
    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "Agent" not in one.name():
                found.append(one)
    return found


def words_for(spec, file):
    """The command of the page, for `spec`, which is written to `file`."""
    file.write_text(spec.to_yaml())
    (line,) = re.findall(
        r"^modicum (fleet train fleet\.yaml --ray.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    return [sys.executable, "-m", "modicum", *shlex.split(line.replace("fleet.yaml", str(file)))]


@pytest.mark.slow
def test_the_command_trains_on_a_cluster_that_is_there(tmp_path, whole):
    """As on somebody's machines: `RAY_ADDRESS` names the head, and the cluster goes on afterwards."""
    spec = spec_of(tmp_path / "job", whole[1])
    words = words_for(spec, tmp_path / "fleet.yaml")
    with rays.two_workers() as joined:
        environment = {**os.environ, ADDRESS: joined.get_runtime_context().gcs_address}
        pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with rays.started(words, env=environment, **pipe) as process:
            said = process.communicate(timeout=300)[1]
            assert process.returncode == 0, said
        assert joined.cluster_resources()["CPU"] == 2
    assert contents(spec.store.path) == contents(whole[0] / "store")
    assert states(spec.folder) == states(whole[0] / "run")


@pytest.mark.slow
def test_a_killed_command_goes_on_with_and_without_ray(tmp_path, whole):
    pytest.importorskip("ray", reason="Ray is not installed (modicum[ray])")
    spec = spec_of(tmp_path / "job", whole[1])
    words = words_for(spec, tmp_path / "fleet.yaml")
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with rays.started(words, **silent) as process:

        def some_cohorts():
            assert process.poll() is None
            return cohorts(spec.folder)

        assert rays.wait_for(some_cohorts) < 6
        everybody = below(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert rays.gone(everybody), "nobody goes on when the one in charge is gone"
    assert len(contents(spec.store.path)) < len(COUNTS) - 1
    result = train_fleet(spec, resume=True)
    assert contents(spec.store.path) == contents(whole[0] / "store")
    assert states(result.folder) == states(whole[0] / "run")
