"""Stores that earlier versions have made stay readable: one committed fixture per format."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from tests.store.small_records import record

from modicum.store import Store
from modicum.store.catalogue.audit import Head

FIXTURES = Path(__file__).parent / "fixtures"
#: what the log of a fixture ended with when it was made
HEADS = {"store_1": Head(19, "e181bbe614038645fbbff24176d02335b1fbb1dff0c233055a47975b47469ef0")}


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_store_of_this_format(name, tmp_path):
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as packed:
        # an argument from Python 3.11.4 on, and missed from 3.12 on
        packed.extraction_filter = getattr(tarfile, "data_filter", None)
        packed.extractall(tmp_path)
    with Store(tmp_path / name) as store:
        assert store.verify(expected=HEADS[name]).faults == ()
        assert store.get("ada@production") == record(0, r=4)
        assert store.get("ada@canary") == store.get("ada") == record(2, r=4)
        for n in range(7):
            assert store.get(f"users/{n}") == record(n % 5, r=4)
        first = store.show("ada@1")
        assert (first.metrics, first.tags, first.note, first.seed) == ({"acc": 0.5}, ("x",), "first", 7)
        assert (first.aliases, first.data_digest, first.actor) == (("production",), "d1", "maker")
        assert store.show("ada@2").parent == "ada@1"
        assert [entry.action for entry in store.log(after=14)] == [
            "put",
            "purge",
            "erased",
            "remove",
            "rollback",
        ]
        # and it goes on
        assert store.put("ada", record(4, r=4), parent="ada@3").version == 4
        assert store.gc(0.0).segments > 0
        assert store.verify(expected=HEADS[name]).faults == ()
