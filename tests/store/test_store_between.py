"""What goes between stores goes between stores of either kind, and what looks at a store looks at either."""

from __future__ import annotations

from tests.store.small_records import record
from tests.store.test_archive import said

from modicum.store import (
    Store,
    basis_state,
    diff,
    export_archive,
    import_archive,
    missing_bases,
    pull,
    push,
    put_folders,
)
from modicum.store.record import encode


def test_there_and_back(postgres, tmp_path):
    (tmp_path / "u1.modicum").write_bytes(encode(record(1)))
    needy = record(2, basis_fingerprint="svd-top-fast-v1:x")
    with (
        Store(tmp_path / "here", create=True) as here,
        Store(postgres, create=True) as there,
        Store(tmp_path / "back", create=True) as back,
    ):
        here.put("ada", record(0), metrics={"acc": 0.5}, tags=["a"], alias="production", note="é", seed=4)
        here.put("ada", needy, parent="ada@1")
        put_folders(here, [tmp_path / "u1.modicum"])
        export_archive(here, tmp_path / "archive")
        assert import_archive(there, tmp_path / "archive").stored == 3
        assert import_archive(there, tmp_path / "archive").stored == 0
        assert said(there) == said(here)
        assert push(there, str(tmp_path / "place")).sent == 3
        assert push(there, str(tmp_path / "place")).sent == 0
        assert pull(back, str(tmp_path / "place")).stored == 3
        assert said(back) == said(here)
        put_folders(there, [tmp_path], template="many/{name}")
        assert there.get("many/u1") == record(1)
        assert diff(there, "ada@1", "ada@2").total == diff(here, "ada@1", "ada@2").total
        assert [one.example for one in missing_bases(there)] == ["ada@2"]
        assert basis_state(there, "ada").stored is None
        there.purge("ada")
        push(there, str(tmp_path / "place"))
        assert all(b"ada" not in file.read_bytes() for file in (tmp_path / "place").rglob("*.jsonl"))
        assert there.verify().faults == back.verify().faults == ()
