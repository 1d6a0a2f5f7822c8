"""What is in memory is known by the entry that put it, so that a name that began anew is not taken for the old one."""

from __future__ import annotations

import pytest
from tests.store.small_records import record

from modicum.errors import NotStoredError
from modicum.serve.source import Source
from modicum.store import Store


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", create=True) as made:
        made.put_many([("ada", record(0)), ("ada", record(1)), ("bob", record(2))])
        yield made


def test_a_record_comes_with_the_entry_that_put_it(store):
    for version in ("ada@1", "ada@2", "bob@1"):
        found, entry = store.get_put(version)
        assert found == store.get(version)
        assert (version, entry) == store.find_put(version)
    with pytest.raises(NotStoredError):
        store.get_put("ada@3")


def test_a_name_that_begins_anew_is_another_one(store):
    source = Source(store, most=8)
    _, entry = store.find_put("ada@1")
    assert source.outdated("ada@1", entry)  # nothing of it was ever read
    assert source.get("ada@1") == record(0)
    assert not source.outdated("ada@1", entry)
    store.purge("ada")
    store.put("ada", record(5))
    _, again = store.find_put("ada@1")
    assert source.outdated("ada@1", again)
    assert source.get("ada@1") == record(5)
    assert not source.outdated("ada@1", again)
    assert source.outdated("ada@1", entry)


def test_only_the_last_entries_are_remembered(store):
    source = Source(store, most=2)
    for version in ("ada@1", "ada@2", "ada@1", "bob@1"):
        source.get(version)
    entries = {version: store.find_put(version)[1] for version in ("ada@1", "ada@2", "bob@1")}
    assert [source.outdated(version, entry) for version, entry in entries.items()] == [False, True, False]
