"""What a server asks of a store: which version a reference means now, and which names there are."""

from __future__ import annotations

import pytest
from tests.store.small_records import record

from modicum.store import Store
from modicum.store.catalogue import listing


@pytest.fixture
def store(location):
    with Store(location, create=True) as made:
        yield made


def test_finding_the_first_of_several_references(store):
    for seed in range(2):
        store.put("ada", record(seed))
    assert store.find("ada@production", "ada") == "ada@2"
    store.promote("ada@1")
    assert store.find("ada@production", "ada") == "ada@1"
    assert store.find("ada@2") == "ada@2"
    assert store.find("ada@3", f"ada@{10**16}", "bob") is None


def test_names_in_order_by_pattern(store, monkeypatch):
    names = [*(f"team/{a}{b}" for a in "xyz" for b in range(10)), "zoe"]
    store.put_many([(name, record(0)) for name in reversed(names)])
    store.remove("team/x3", 1)
    names.remove("team/x3")
    assert store.names() == names
    assert store.names("team/*", limit=3) == names[:3]
    assert store.names("team/*", after="team/y8", limit=100) == [
        "team/y9",
        *(f"team/z{b}" for b in range(10)),
    ]
    # most of a page does not match, and yet the answer is full
    monkeypatch.setattr(listing, "_SCAN", 4)
    assert store.names("*5", limit=2) == ["team/x5", "team/y5"]
    assert store.names("nobody*") == []
    # and what is far away is not looked for
    monkeypatch.setattr(listing, "_SCANNED", 8)
    assert store.names("*9", limit=2) == []
