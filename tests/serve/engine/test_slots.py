"""The pool under many users: who stays, who leaves, and what no request ever sees."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import random
import resource
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tests.models_for_tests import llama, tokens
from tests.serve.engine.adapters_for_tests import offline, record_of

from modicum.errors import NotStoredError
from modicum.serve.engine.interface import AdapterUnavailableError, InUseError, Observer, OverloadedError
from modicum.serve.engine.slots import Slots


class Reader:
    """Versions of one family; `a@3` is three times `a@1`. Reading waits where told to."""

    def __init__(self, base):
        self.record = record_of(base, "lora_xs", r=4)
        self.read: list[str] = []
        self.gates: dict[str, threading.Event] = {}
        self.begun = threading.Semaphore(0)
        self.scale = 1

    def __call__(self, version):
        self.read.append(version)
        self.begun.release()
        if version in self.gates:
            assert self.gates[version].wait(30)
        name, _, number = version.partition("@")
        if name == "gone":
            raise NotStoredError("no such version")
        return dataclasses.replace(self.record, values=self.record.values * int(number) * self.scale)


class Loads(Observer):
    def __init__(self):
        self.loads: list[bool] = []

    def load(self, seconds, *, failed):
        assert seconds >= 0
        self.loads.append(failed)


@pytest.fixture(scope="module")
def base():
    return llama()


@pytest.fixture
def reader(base):
    return Reader(base)


@pytest.fixture
def slots(base, reader):
    pool = Slots(copy.deepcopy(base), reader, slots=3, max_rank=16)
    yield pool
    pool.remove()


def numbers(slots, lease):
    return slots._slots[lease.slot].row.values.clone()


def test_the_one_that_was_used_longest_ago_leaves(slots, reader):
    for version in ("a@1", "a@2", "a@3"):
        slots.release(slots.acquire(version))
    slots.release(slots.acquire("a@1"))
    slots.release(slots.acquire("a@4"))
    assert [one.version for one in slots.residents()] == ["a@4", "a@1", "a@3"]
    slots.release(slots.acquire("a@2"))
    assert reader.read == ["a@1", "a@2", "a@3", "a@4", "a@2"]
    stats = slots.stats()
    assert (stats.slots, stats.used, stats.hits, stats.misses, stats.evictions) == (3, 3, 1, 5, 2)


def test_pinned_and_used_ones_stay(slots):
    assert slots.load("a@1", pin=True).pinned
    lease = slots.acquire("a@2")
    slots.release(slots.acquire("a@3"))
    slots.release(slots.acquire("a@4"))
    assert {one.version for one in slots.residents()} == {"a@1", "a@2", "a@4"}
    held = slots.acquire("a@4")
    with pytest.raises(InUseError, match="all 3 places"):
        slots.acquire("a@5")
    assert {one.version: (one.pinned, one.requests) for one in slots.residents()} == {
        "a@1": (True, 0), "a@2": (False, 1), "a@4": (False, 1),
    }  # fmt: skip
    slots.unpin("a@1")
    slots.release(slots.acquire("a@5"))
    slots.release(lease)
    slots.release(held)
    assert slots.stats().pinned == 0


def test_only_when_all_are_pinned_does_waiting_not_help(slots):
    """What requests use comes back with them; what is pinned does not, used or not."""
    leases = [slots.acquire(f"a@{i}") for i in (1, 2, 3)]
    for i in (1, 2, 3):
        with pytest.raises(InUseError, match="pinned or in use"):
            slots.acquire("a@4")
        slots.load(f"a@{i}", pin=True)
    with pytest.raises(OverloadedError, match="are pinned; unpin one") as refused:
        slots.acquire("a@4")
    assert not isinstance(refused.value, InUseError)
    for lease in leases:
        slots.release(lease)
    with pytest.raises(OverloadedError, match="are pinned; unpin one"):
        slots.acquire("a@4")
    slots.unpin("a@2")
    assert slots.acquire("a@4").slot == leases[1].slot


def test_a_lease_that_is_over_is_named_and_its_tokens_run_on_the_base_model(base, slots):
    old = slots.acquire("a@1")
    slots.release(old)
    slots.unload("a@1")
    new = slots.acquire("a@2")
    assert new.slot == old.slot
    ids = tokens(2, 4)
    assert slots.step([old, new], [4, 4]) == [0]
    with torch.no_grad():
        found = slots._model(ids).logits
        slots.end_step()
        plain = slots._model(ids).logits
    assert torch.allclose(found[0], plain[0], atol=1e-5)
    assert not torch.allclose(found[1], plain[1], atol=1e-3)
    slots.release(old)
    assert slots.residents()[0].requests == 1


def test_unloaded_while_in_use_it_keeps_its_numbers_and_a_new_lease_gets_the_new_ones(slots, reader):
    lease = slots.acquire("a@1")
    before = numbers(slots, lease)
    assert slots.unload("a@1")
    assert not slots.unload("a@1")
    reader.scale = 5
    again = slots.acquire("a@1")
    assert again.slot != lease.slot
    assert torch.equal(numbers(slots, lease), before)
    assert torch.allclose(numbers(slots, again), 5 * before)
    assert slots.step([lease, again], [1, 1]) == []
    slots.end_step()
    assert slots.stats().used == 2
    slots.release(lease)
    assert slots.stats().used == 1
    assert slots.step([lease, again], [1, 1]) == [0]


def test_what_is_being_read_is_read_again_and_not_loaded_twice(base, reader):
    """Whoever wants it gone while it is being read may know of a newer one, and must not get the older one."""
    noted = Loads()
    pool = Slots(copy.deepcopy(base), reader, slots=3, max_rank=16, observer=noted)
    reader.gates["a@1"] = threading.Event()
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(pool.acquire, "a@1") for _ in range(3)]
        assert reader.begun.acquire(timeout=30)
        assert not any(pool.unload("a@1") for _ in range(3))
        reader.gates["a@1"].set()
        leases = [one.result() for one in asked]
    assert reader.read == ["a@1", "a@1"]
    assert noted.loads == [False]
    assert {lease.slot for lease in leases} == {leases[0].slot}
    assert pool.stats().used == 1
    assert pool.unload("a@1")
    for lease in leases:
        pool.release(lease)
    assert pool.stats().used == 0


def test_waiting_for_a_place_is_no_load_that_failed(base, reader):
    noted = Loads()
    pool = Slots(copy.deepcopy(base), reader, slots=1, max_rank=16, observer=noted)
    reader.gates["a@2"] = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(pool.acquire, "a@2")
        assert reader.begun.acquire(timeout=30)
        first = pool.acquire("a@1")  # the last place is taken while the other one is read
        reader.gates["a@2"].set()
        with pytest.raises(InUseError):
            second.result()
    assert noted.loads == [False]
    assert pool.stats().failures == 0
    pool.release(first)
    assert pool.acquire("a@2").slot == first.slot


def test_a_row_that_a_running_step_reads_is_not_given_away(slots):
    """A request that is cancelled in the middle of a step gives its lease back from another thread."""
    lease = slots.acquire("a@1")
    slots.step([lease], [4])
    before = numbers(slots, lease)
    slots.release(lease)
    slots.unload("a@1")
    others = [slots.acquire(f"a@{i}") for i in (2, 3)]
    assert torch.equal(numbers(slots, lease), before)
    with pytest.raises(InUseError):
        slots.acquire("a@4")
    slots.end_step()
    assert slots.acquire("a@4").slot == lease.slot
    assert len({one.slot for one in others}) == 2


def test_different_misses_load_at_once_and_the_same_one_is_read_once(slots, reader):
    reader.gates = {"a@1": threading.Event(), "a@2": threading.Event()}
    with ThreadPoolExecutor(6) as threads:
        waiting = [threads.submit(slots.acquire, version) for version in ["a@1"] * 3 + ["a@2"] * 2]
        for _ in range(2):
            assert reader.begun.acquire(timeout=30)
        # what is there is had at once, whatever is being loaded
        ready = threads.submit(slots.acquire, "a@3")
        assert ready.result(30).version == "a@3"
        for gate in reader.gates.values():
            gate.set()
        leases = [one.result(30) for one in waiting]
    assert sorted(reader.read) == ["a@1", "a@2", "a@3"]
    assert len({lease.slot for lease in leases}) == 2
    assert {one.version: one.requests for one in slots.residents()} == {"a@1": 3, "a@2": 2, "a@3": 1}


def test_what_cannot_be_had_fails_for_all_who_wait_and_for_nobody_else(base, reader):
    observer = Loads()
    slots = Slots(copy.deepcopy(base), reader, slots=2, max_rank=16, observer=observer)
    reader.gates = {"gone@1": threading.Event()}
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(slots.acquire, "gone@1") for _ in range(3)]
        assert reader.begun.acquire(timeout=30)
        slots.acquire("a@1")
        reader.gates["gone@1"].set()
        errors = [one.exception(30) for one in waiting]
    assert all(isinstance(error, AdapterUnavailableError) for error in errors)
    assert all(isinstance(error.__cause__, NotStoredError) for error in errors)
    assert slots.stats().used == 1
    assert sorted(observer.loads) == [False, *[True] * slots.stats().failures]
    slots.acquire("a@2")


def test_what_cannot_be_had_makes_nobody_leave(slots, reader):
    for version in ("a@1", "a@2", "a@3"):
        slots.release(slots.acquire(version))
    for version in ("gone@1", "gone@2", "gone@1"):
        with pytest.raises(AdapterUnavailableError):
            slots.acquire(version)
    reader.scale = float("nan")
    with pytest.raises(AdapterUnavailableError, match="NaN"):
        slots.acquire("a@4")
    assert {one.version for one in slots.residents()} == {"a@1", "a@2", "a@3"}
    assert (slots.stats().evictions, slots.stats().failures) == (0, 4)


@pytest.mark.parametrize("method", ["lora_xs", "elastic_lora"])
def test_loaded_inside_and_outside_of_inference_mode(base, method):
    record = record_of(base, method, r=4)
    slots = Slots(copy.deepcopy(base), lambda _: record, slots=1, max_rank=16)
    with torch.inference_mode():
        slots.release(slots.acquire("a@1"))
    slots.release(slots.acquire("a@2"))
    assert not numbers(slots, slots.acquire("a@2")).requires_grad


def test_memory_is_what_is_said_and_does_not_grow(base, reader):
    slots = Slots(copy.deepcopy(base), reader, slots=4, max_rank=16)
    lora = record_of(base, "peft:LORA", r=3)
    kinds = {"x": lora, "y": record_of(base, "lora_xs", r=8)}
    plain = slots._read
    slots._read = lambda version: kinds.get(version[0]) or plain(version)
    order = random.Random(0)
    versions = [f"{order.choice('aaxy')}@{order.randint(1, 9)}" for _ in range(1000)]
    sizes = []
    for version in versions:
        slots.release(slots.acquire(version))
        sizes.append(slots.stats().bytes)
    blocks = [block for found in slots._shelves._blocks.values() for block, _ in found]
    shared = [
        part
        for one in slots._directions.all
        for part in (one.inner, one.outer, one.shift)
        if part is not None
    ]
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in blocks + shared
    }
    assert slots.stats().bytes == sum(tensors.values()) + slots._loader.bytes
    assert max(sizes[200:]) <= max(sizes[:200])
    for version in {one.version for one in slots.residents()}:
        assert slots.unload(version)
    assert slots._shelves.bytes == 0
    assert slots.stats().used == 0


def test_many_threads_never_see_another_adapters_numbers(base, reader):
    """A generation thread steps while others acquire, release and unload at random; every answer is the right one."""
    slots = Slots(copy.deepcopy(base), reader, slots=4, max_rank=16)
    versions = [f"a@{i}" for i in range(1, 7)]
    ids = tokens(1, 4)
    wanted = {}
    for version in versions:
        with torch.no_grad():
            wanted[version] = offline(base, reader(version))(ids).logits[0]
    stop, faults = threading.Event(), []

    def disturb(seed):
        order = random.Random(seed)
        while not stop.is_set():
            version = order.choice(versions)
            try:
                lease = slots.acquire(version)
                slots.release(lease)
                if order.random() < 0.2:
                    slots.unload(version)
            except OverloadedError:
                pass
            except Exception as error:  # noqa: BLE001 - told below
                faults.append(error)

    threads = [threading.Thread(target=disturb, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    order = random.Random(9)
    try:
        for _ in range(60):
            chosen = order.sample(versions, 2)
            leases = []
            for version in chosen:
                try:
                    leases.append(slots.acquire(version))
                except OverloadedError:
                    leases.append(None)
            assert slots.step(leases, [4, 4]) == []
            with torch.no_grad():
                found = slots._model(ids.expand(2, -1)).logits
            slots.end_step()
            for version, lease, row in zip(chosen, leases, found, strict=True):
                if lease is not None:
                    assert torch.allclose(row, wanted[version], atol=2e-4)
                    slots.release(lease)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not faults


def starved():
    """A load for which there is no memory, and one more; in a process of its own, whose heap has nothing to spare."""
    base = llama()
    pool = Slots(copy.deepcopy(base), Reader(base), slots=1 << 20, max_rank=16)
    pool.release(pool.acquire("a@1"))  # all but the memory is there
    assert pool.unload("a@1")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    # a block of the pool has up to 64 MiB
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20), limits[1]))
    try:
        pool.acquire("a@2")
        said = "loaded"
    except AdapterUnavailableError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    stats = pool.stats()
    same = torch.equal(numbers(pool, pool.acquire("a@2")), 2 * numbers(pool, pool.acquire("a@1")))
    return said, stats.used, stats.failures, same


def test_without_memory_for_the_pool_a_load_fails_and_the_next_one_succeeds():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        said, used, failures, same = process.submit(starved).result()
    assert said.startswith("a@2 cannot be served")
    assert (used, failures, same) == (0, 1, True)
