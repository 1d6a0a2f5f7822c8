"""Processes of this machine: fresh ones, as many as allowed, whose failures are told."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from tests.jobs import work

from modicum.compare.run import PRELOAD
from modicum.errors import ModicumError
from modicum.jobs.pool import Task
from modicum.jobs.processes import Processes, gpu_of


def outcomes(pool, tasks):
    return {outcome.key: outcome for outcome in pool.outcomes(tasks)}


def test_every_task_has_a_process_of_its_own_with_its_threads():
    with Processes(2, 3, PRELOAD) as pool:
        found = outcomes(pool, [Task(n, work.add, (n, 1)) for n in range(4)])
    assert [found[n].value[0] for n in range(4)] == [1, 2, 3, 4]
    pids = {found[n].value[1] for n in range(4)}
    assert len(pids) == 4
    assert os.getpid() not in pids
    assert {found[n].value[2:] for n in range(4)} == {(3, "3")}


def test_a_failure_is_told_and_ends_no_other_task():
    kinds = ("told", "killed", "silent", "else")
    with Processes(2, 1, PRELOAD) as pool:
        tasks = [Task(kind, work.fail, (kind,)) for kind in kinds]
        found = outcomes(pool, [*tasks, Task("good", work.add, (1, 1))])
    assert found["told"].error == "no rows"
    assert (
        found["killed"].error == "its process was ended by SIGKILL; the system does so when memory runs out"
    )
    assert found["silent"].error == "its process ended without a word (exit code 3)"
    assert found["else"].error == "ZeroDivisionError: unexpected"
    assert "work.py" in found["else"].trace
    assert found["good"].error is None
    assert found["good"].value[0] == 2


def test_memory_of_one_task_is_not_counted_for_the_next():
    with Processes(1, 1, PRELOAD) as pool:
        found = outcomes(pool, [Task(n, work.peak, (n,)) for n in (1, 300, 2)])
    assert found[300].value - found[1].value == pytest.approx(299 << 20, rel=0.1)
    assert abs(found[2].value - found[1].value) < 20 << 20


def test_leaving_ends_what_runs():
    with Processes(1, 1, PRELOAD) as pool:
        pool.start(Task(0, work.wait, (600,)))
        process = psutil.Process(pool._running[0].process.pid)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_each_slot_has_one_gpu_of_those_that_may_be_used():
    assert gpu_of(3, 0, None) is gpu_of(3, 1, "5") is None
    assert [gpu_of(slot, 2, None) for slot in range(3)] == ["0", "1", "0"]
    assert [gpu_of(slot, 2, "4,7") for slot in range(3)] == ["4", "7", "4"]
    assert gpu_of(1, 2, "GPU-aa, GPU-bb") == "GPU-bb"


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    file = tmp_path / "pid"
    with Processes(1, 1, PRELOAD) as pool:
        pool.start(Task(0, work.nest, (file,)))
        until = time.monotonic() + 60
        while not file.is_file() or not file.read_text():
            assert time.monotonic() < until
            time.sleep(0.02)
        below = psutil.Process(int(file.read_text()))
        os.kill(pool._running[0].process.pid, signal.SIGKILL)
        assert "SIGKILL" in pool.wait()[0].error
    # nothing but its own watching can end it: nobody is left to
    assert not psutil.wait_procs([below], timeout=20)[1]


def test_a_task_is_taken_when_there_is_room_for_it():
    taken = []

    def tasks():
        for n in range(5):
            taken.append(n)
            yield Task(n, work.add, (n, 0))

    with Processes(2, 1, PRELOAD) as pool:
        for seen, outcome in enumerate(pool.outcomes(tasks()), 1):
            assert outcome.result("sum")[0] == outcome.key
            assert len(taken) <= seen + 2
    assert taken == list(range(5))


def test_a_result_that_is_none_says_what_the_task_was_and_where_it_failed():
    with Processes(1, 1, PRELOAD) as pool:
        [outcome] = pool.outcomes([Task(0, work.fail, ("else",))])
    with pytest.raises(ModicumError, match=r"^cohort 3: ZeroDivisionError: unexpected$") as caught:
        outcome.result("cohort 3")
    assert "work.py" in str(caught.value.__cause__)
