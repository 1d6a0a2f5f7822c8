"""Many records as one block: whatever way they are read, it is the numbers that each of them has, or an error."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.store.small_records import record

from modicum.errors import ConfigError, CorruptAdapterError, NotStoredError
from modicum.store import Store
from modicum.store import record as records
from modicum.store import stack as stacks
from modicum.store.catalogue.names import Reference
from modicum.store.engine.interface import Located
from modicum.store.record import Section, decode, encode
from modicum.store.stack import stack


def located(data: bytes) -> Located:
    """`data` as a backend gives it: on memory of its own, or at the end of what it is given."""

    def read(into: bytearray | None) -> bytes | memoryview:
        if into is None:
            return data
        into[5 : 5 + len(data)] = data
        return memoryview(into)[5 : 5 + len(data)]

    return Located(data[96:128], len(data), read)


def stacked(*data: bytes):
    return stack([str(row) for row in range(len(data))], [*map(located, data)], lambda _, one: decode(one))


@pytest.fixture(params=["here", "threads"])
def way(request, monkeypatch):
    """The same work done by one thread, and shared among several."""
    monkeypatch.setattr(stacks, "COMPUTING", 4)
    monkeypatch.setattr(stacks, "_MANY", 0 if request.param == "threads" else 1 << 40)


KINDS = {
    "numbers": record,
    "descriptions": lambda n: record(n, metadata={"n": "x" * n}),
    "int8": lambda n: record_of("int8", n),
    "int4": lambda n: record_of("int4", n),
    "float16": lambda n: record_of("float16", n),
    "heads": lambda n: dataclasses.replace(
        record(n), sections=(Section("head", "float32", (2,), np.array([n, 1], "<f4")),)
    ),
    "all of them": lambda n: record(n, metadata={"n": n} if n % 3 else {}),
}


def record_of(dtype: str, seed: int):
    tensors = dict(record(seed).tensors())
    return records.build("lora_xs", tensors, dtype, config={"r": 8})


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_has_the_numbers_of_its_record(kind):
    made = [KINDS[kind](n) for n in (5, 3, 3, 8, 0, 11, 2)]
    block = stacked(*map(encode, made))
    assert block.values.dtype == made[0].values.dtype
    assert np.array_equal(block.values, np.stack([one.values for one in made]))
    assert np.array_equal(block.floats(), np.stack([one.floats() for one in made]))
    assert stacked(encode(made[0])).values.tolist() == [made[0].values.tolist()]


@pytest.mark.usefixtures("way")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(0, 5), at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_of_any_row_is_refused(row, at, bit):
    data = [bytearray(encode(record(n))) for n in range(6)]
    data[row][at % len(data[row])] ^= 1 << bit
    with pytest.raises(CorruptAdapterError):
        stacked(*map(bytes, data))


def test_every_bit_of_a_header_counts():
    first, second = encode(record(0)), encode(record(1))
    for at in range(128):
        for bit in range(8):
            damaged = bytearray(second)
            damaged[at] ^= 1 << bit
            with pytest.raises(CorruptAdapterError):
                stacked(first, bytes(damaged))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_numbers_that_are_not_finite_are_refused(dtype, monkeypatch):
    made = record_of(dtype, 1)
    values = made.values.copy()
    values[:2] = np.array([0xFF, 0x7F], np.uint8) if dtype == "int8" else 0x7F80
    if values.dtype.kind == "f":
        values[0] = np.nan
    with monkeypatch.context() as patch:
        patch.setattr(records, "_check_numbers", lambda _: None)
        poisoned = encode(dataclasses.replace(made, values=values))
    sound = [encode(record_of(dtype, n)) for n in range(2, 6)]
    with pytest.raises(CorruptAdapterError, match="NaN or infinite"):
        stacked(*sound, poisoned)


def test_full_modules_are_checked_too(monkeypatch):
    head = Section("head", "float32", (2,), np.array([1, np.nan], "<f4"))
    with monkeypatch.context() as patch:
        patch.setattr(records, "_check_numbers", lambda _: None)
        poisoned = encode(dataclasses.replace(record(1), sections=(head,)))
    with pytest.raises(CorruptAdapterError, match="NaN or infinite values in 'head'"):
        stacked(encode(KINDS["heads"](0)), poisoned)


def test_those_that_look_alike_are_told_apart():
    plain = record_of("bfloat16", 0)
    names = [name.replace("q_proj", "k_proj") for name in plain.layout.names]
    renamed = records.build(
        "lora_xs", dict(zip(names, (v for _, v in plain.tensors()), strict=True)), config={"r": 8}
    )
    other = [encode(one) for one in (plain, record_of("float16", 0), renamed)]
    assert len({len(data) for data in other}) == 1
    for data in other[1:]:
        with pytest.raises(ConfigError, match="different are 1 "):
            stacked(other[0], data)


def test_those_of_another_kind_are_named():
    wanted = [record(0), record(1, r=4), record_of("float32", 2), record(3), record(4, r=4)]
    with pytest.raises(
        ConfigError, match=r"0 is lora_xs, bfloat16.*different are 1 .*2 \(lora_xs, float32.*4 "
    ):
        stacked(*map(encode, wanted))
    with pytest.raises(ConfigError, match="name at least one"):
        stacked()


@pytest.fixture
def store(location):
    with Store(location, create=True) as made:
        yield made


def test_references_of_every_kind_in_any_order(store):
    store.put_many([(f"u{n}", record(n)) for n in range(30)])
    store.put("u7", record(100), alias="canary")
    store.alias("u7@1", "zeta")
    store.put("u7", record(101))
    store.promote("u8@1", "canary")
    wanted = [
        "u7@1",
        "u29",
        "u7",
        "u7@canary",
        "u3@latest",
        "u8@canary",
        "u7@2",
        "u29",
        *(f"u{n}@1" for n in range(30)),
    ]
    block = store.get_many(wanted)
    assert block.versions[:8] == ("u7@1", "u29@1", "u7@3", "u7@2", "u3@1", "u8@1", "u7@2", "u29@1")
    for version, row in zip(wanted, block.values, strict=True):
        assert np.array_equal(row, store.get(version).values), version
    with store.snapshot() as frozen:
        store.put("u29", record(102))
        assert np.array_equal(frozen.get_many(wanted).values, block.values)
    assert store.get_many(iter([Reference("u29")])).versions == ("u29@2",)


@pytest.mark.parametrize("wrong", ["u99", "u3@2", "u3@production", "u3@99999999999999"])
def test_the_one_that_is_not_there_is_named(store, wrong):
    store.put_many([(f"u{n}", record(n)) for n in range(20)])
    with pytest.raises(NotStoredError, match=wrong.partition("@")[0]):
        store.get_many([*(f"u{n}" for n in range(20)), wrong])
    store.remove("u4", 1)
    with pytest.raises(NotStoredError, match="'u4' were removed"):
        store.get_many(f"u{n}" for n in range(20))
