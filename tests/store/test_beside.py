"""Work done side by side is the same work."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from modicum.store.beside import side_by_side, split


@pytest.mark.parametrize(("count", "most"), [(0, 4), (1, 4), (4, 4), (5, 4), (64, 7), (3, 100)])
def test_parts_are_the_whole_in_order(count, most):
    items = list(range(count))
    parts = split(items, most)
    assert [one for part in parts for one in part] == items
    assert len(parts) == min(count, most)
    assert {len(part) for part in parts} <= {count // max(1, len(parts)), -(-count // max(1, len(parts)))}


def test_results_come_in_order_and_parts_run_at_the_same_time():
    together = threading.Barrier(4, timeout=10)

    def work(part):
        together.wait()
        return part, threading.get_ident()

    found = side_by_side(work, range(4))
    assert [part for part, _ in found] == [0, 1, 2, 3]
    assert found[0][1] == threading.get_ident()
    assert len({thread for _, thread in found}) == 4


@pytest.mark.parametrize("faulty", [0, 2])
def test_an_error_comes_when_nobody_works_any_more(faulty):
    done = []

    def work(part):
        if part == faulty:
            raise LookupError(part)
        done.append(part)

    with pytest.raises(LookupError, match=str(faulty)):
        side_by_side(work, range(4))
    assert sorted(done) == [part for part in range(4) if part != faulty]


def test_a_forked_child_and_the_end_of_the_interpreter():
    code = """
import atexit, os, time
from modicum.store.beside import side_by_side
assert side_by_side(lambda n: time.sleep(0.1) or n + 1, range(5)) == [1, 2, 3, 4, 5]
time.sleep(0.1)  # until four threads wait for more: a child that counts on them would wait for ever
child = os.fork()
if not child:
    os._exit(side_by_side(lambda n: n + 1, range(5)) != [1, 2, 3, 4, 5])
assert os.waitpid(child, 0)[1] == 0
atexit.register(lambda: print(side_by_side(lambda n: n * n, range(3))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout == "[0, 1, 4]\n"
