"""Folders full of adapters: names, versions, faults, and going on after an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.store.small_records import record

from modicum.errors import ConfigError
from modicum.store import Store, bulk
from modicum.store.bulk import find_sources, name_of, put_folders
from modicum.store.record import encode


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", create=True) as made:
        yield made


@pytest.fixture
def folder(tmp_path):
    """users/USER/N.modicum for three users, two versions each, and what is to be passed over."""
    root = tmp_path / "users"
    for user in range(3):
        for version in range(2):
            file = root / f"user{user}" / f"{version}.modicum"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(record(10 * user + version)))
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.modicum").write_bytes(b"no")
    (root / "readme.txt").write_text("no")
    (root / "loop").symlink_to(root)
    return root


def test_names_are_paths(store, folder):
    told = []
    found = put_folders(store, [folder], tags=["night"], progress=lambda *step: told.append(step))
    assert found.stored == tuple(f"user{u}/{v}@1" for u in range(3) for v in range(2))
    assert (found.known, found.faults) == ((), ())
    assert told == [(n, 6) for n in range(1, 7)]
    assert store.get("user2/1") == record(21)
    assert store.show("user2/1").tags == ("night",)
    assert "user2/1.modicum" in store.log("user2/1")[0].detail["source"]


def test_a_template_makes_versions_of_one_name(store, folder):
    assert put_folders(store, [folder], template="team/{parent}").stored[:3] == (
        "team/user0@1", "team/user0@2", "team/user1@1",
    )  # fmt: skip
    assert store.get("team/user0@1") == record(0)
    assert store.get("team/user0@2") == record(1)


def test_faulty_ones_are_listed_and_the_rest_is_stored(store, folder):
    (folder / "user1" / "0.modicum").write_bytes(encode(record(0))[:-1])
    (folder / "user3 (old)").mkdir()
    (folder / "user3 (old)" / "0.modicum").write_bytes(encode(record(0)))
    with pytest.raises(ConfigError, match=r"2 of 7 are faulty(.|\n)*cut short(.|\n)*no name for an adapter"):
        put_folders(store, [folder], strict=True)
    assert store.stats().versions == 0
    found = put_folders(store, [folder])
    assert len(found.stored) == 5
    assert [fault.path.parent.name for fault in found.faults] == ["user1", "user3 (old)"]
    again = put_folders(store, [folder], template="{slug}")
    assert again.stored == ("user3-old-/0@1",)
    assert len(again.known) == 5


def test_an_interrupted_import_goes_on(store, folder, monkeypatch):
    monkeypatch.setattr(bulk, "_BATCH", 2)

    def stop(done, _):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put_folders(store, [folder], progress=stop)
    assert store.stats().versions == 4
    found = put_folders(store, [folder])
    assert (len(found.known), len(found.stored)) == (4, 2)
    assert store.verify().ok


def test_templates_and_folders_that_make_no_sense(store, folder, tmp_path):
    with pytest.raises(ConfigError, match=r"\{pth\} \(did you mean 'path'"):
        put_folders(store, [folder], template="{pth}")
    with pytest.raises(ConfigError, match="one name"):
        put_folders(store, [folder], template="ada")
    with pytest.raises(ConfigError, match="cannot be read"):
        put_folders(store, [folder], template="{path")
    with pytest.raises(ConfigError, match="there is no "):
        find_sources([folder, tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no adapter below"):
        find_sources([tmp_path / "empty"])


def test_the_folder_itself_may_be_the_adapter(tmp_path):
    file = tmp_path / "ada.modicum"
    assert name_of(file, file, "{path}") == "ada"
    assert name_of(Path("a"), Path("a/b/c d.modicum"), "{slug}+{name}") == "b/c-d+c d"
