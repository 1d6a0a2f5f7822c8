"""A fleet on a local Ray of two processes: killed workers and a killed command change nothing of what is stored."""

from __future__ import annotations

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
            killed.append(rays.wait_for(rays.at_work)[0])
            killed[0].send_signal(signal.SIGKILL)

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


@pytest.mark.slow
def test_a_killed_command_goes_on_with_and_without_ray(tmp_path, whole):
    pytest.importorskip("ray", reason="Ray is not installed (modicum[ray])")
    spec = spec_of(tmp_path / "job", whole[1])
    (tmp_path / "fleet.yaml").write_text(spec.to_yaml())
    # the command of the page
    (line,) = re.findall(
        r"^modicum (fleet train fleet\.yaml --ray.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    words = [
        sys.executable,
        "-m",
        "modicum",
        *shlex.split(line.replace("fleet.yaml", str(tmp_path / "fleet.yaml"))),
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def cohorts():
        assert process.poll() is None
        try:
            with closing(sqlite3.connect(f"file:{spec.folder / FILE}?mode=ro", uri=True)) as ledger:
                return ledger.execute("SELECT count(*) FROM cohorts").fetchone()[0]
        except sqlite3.OperationalError:
            return 0

    assert rays.wait_for(cohorts) < 6
    # two agents of Ray's, which touch nothing, look up once a minute
    everybody = [
        one for one in psutil.Process(process.pid).children(recursive=True) if "Agent" not in one.name()
    ]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert rays.gone(everybody), "nobody goes on when the one in charge is gone"
    assert len(contents(spec.store.path)) < len(COUNTS) - 1
    result = train_fleet(spec, resume=True)
    assert contents(spec.store.path) == contents(whole[0] / "store")
    assert states(result.folder) == states(whole[0] / "run")
