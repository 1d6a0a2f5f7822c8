"""A store's contents elsewhere: only what is new travels, what is purged goes, and an interruption harms nothing."""

from __future__ import annotations

import contextlib
import json
import stat

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tests.store.small_records import record
from tests.store.test_archive import said

from modicum.errors import ConfigError, ConflictError, CorruptAdapterError, MissingExtraError, StoreError
from modicum.store import Store, pull, push, sync
from modicum.store.record import encode, peek


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store", create=True, actor="ann") as made:
        made.put("ada", record(0), metrics={"acc": 0.5}, tags=["a"], note="é")
        made.put("bob", record(1), parent="ada@1", alias="production")
        made.put("copy", record(0))
        yield made


@pytest.fixture
def other(tmp_path):
    with Store(tmp_path / "other", create=True) as made:
        yield made


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    yield f"{request.param}://{tmp_path}/place"
    MemoryFileSystem.store.clear()


def files(url):
    fs, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).strip("/"): fs.cat_file(path) for path in fs.find(root)}


def test_what_goes_there_comes_back(store, other, url):
    told = []
    sent = push(store, url, progress=lambda *step: told.append(step))
    assert (sent.number, sent.versions, sent.records, sent.sent, sent.deleted) == (1, 3, 2, 2, 0)
    assert told == [(2, 2)]
    found = pull(other, url)
    assert (found.stored, found.known) == (3, 0)
    assert said(other) == said(store)
    assert other.get_bytes("bob") == store.get_bytes("bob")
    assert "(manifest 1): bob@1, put by ann" in other.log("bob")[0].detail["source"]
    assert pull(other, url).known == 3


def test_only_what_is_new_travels(store, other, url):
    push(store, url)
    before = files(url)
    again = push(store, url)
    assert (again.number, again.sent, again.sent_bytes) == (2, 0, 0)
    store.put("ada", record(7), parent="ada@1")
    store.tag("bob", "new")
    sent = push(store, url)
    assert (sent.sent, sent.records) == (1, 3)
    packs = {name for name in before if name.startswith("packs/")}
    assert packs < set(files(url))
    pull(other, url)
    assert said(other) == said(store)
    store.put("ada", record(8))
    push(store, url)
    assert pull(other, url).stored == 1
    assert said(other) == said(store)


def test_what_is_purged_or_removed_leaves_the_place(store, url):
    store.put("eve", record(3))
    push(store, url)
    numbers = record(3).values.tobytes()
    assert any(numbers in data for data in files(url).values())
    store.purge("eve")
    store.remove("copy", 1)
    sent = push(store, url)
    assert sent.sent == 2  # those that lay in the same pack
    found = files(url)
    assert not any(numbers in data or b"eve" in data for data in found.values())
    assert len(found) == 3


def test_local_files_are_for_the_owner(store, tmp_path):
    push(store, str(tmp_path / "place"))
    modes = {
        path: stat.S_IMODE(path.stat().st_mode)
        for path in [tmp_path / "place", *(tmp_path / "place").rglob("*")]
    }
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o600}


class Failing(MemoryFileSystem):
    """Memory that stops taking files after some, in the middle of one."""

    protocol = "failing"
    store = {}  # noqa: RUF012 - as in the parent
    pseudo_dirs = [""]  # noqa: RUF012
    left = 1 << 30

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        Failing.left -= 1
        if Failing.left < 0:
            super().pipe_file(path, value[: len(value) // 2], mode, **kwargs)
            raise OSError("the connection was reset")
        super().pipe_file(path, value, mode, **kwargs)

    def rm_file(self, path):
        Failing.left -= 1
        if Failing.left < 0:
            raise OSError("the connection was reset")
        super()._rm(path)


def test_an_interrupted_sync_leaves_the_one_before(store, tmp_path, monkeypatch):
    fsspec.register_implementation("failing", Failing, clobber=True)
    monkeypatch.setattr(sync, "_PACK_BYTES", 1000)
    Failing.store.clear()
    push(store, "failing://place")
    first = said(store)
    for seed in range(20, 23):
        store.put("ada", record(seed))
    store.remove("copy", 1)
    outcomes = []
    for steps in range(12):
        Failing.left = steps
        finished = False
        with contextlib.suppress(StoreError):
            push(store, "failing://place")
            finished = True
        Failing.left = 1 << 30
        with Store(tmp_path / f"pulled{steps}", create=True) as pulled:
            pull(pulled, "failing://place")
            found = said(pulled)
        assert found in (first, said(store))
        there = files("failing://place")
        for name, data in there.items():
            manifest = sync._manifest(data) if name.startswith("manifest-") else None
            assert manifest is None or {*manifest["packs"], manifest["catalogue"]["file"]} <= there.keys()
        outcomes.append((found == said(store), finished))
    # first nothing counts, then the manifest is there but not all is cleaned up, then it is done
    assert outcomes[0] == (False, False)
    assert outcomes[-1] == (True, True)
    assert outcomes == sorted(outcomes)
    push(store, "failing://place")
    assert len(Failing.store) == 2 + len({name for name in Failing.store if ".pack" in name})


def test_a_place_belongs_to_one_store(store, other, url):
    push(store, url)
    with pytest.raises(ConfigError, match="another store"):
        push(other, url)
    with pytest.raises(ConfigError, match="nothing is kept"):
        pull(other, f"{url}/elsewhere")


def test_two_at_once_are_noticed(store, url):
    push(store, url)
    place = sync._Place(url)
    manifest = place.manifest()
    place.put_manifest({**manifest, "number": 5})
    with pytest.raises(ConflictError, match="somebody else"):
        place.put_manifest({**manifest, "number": 2})


def rewritten(place, change):
    """The manifest at `place` with a change, and with a digest that holds."""
    (path,) = place.glob("manifest-*.json")
    values = json.loads(path.read_text())
    values.pop("digest")
    change(values)
    path.write_text(json.dumps({**values, "digest": sync._digest(values)}))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["catalogue"].update(file="../store/index.sqlite"),
        lambda m: m["catalogue"].update(file="/etc/passwd", bytes=1000),
        lambda m: m["catalogue"].update(bytes=1 << 60),
        lambda m: m.update(packs={}),
        lambda m: m.update(packs={"../../x": 10}),
        lambda m: m.update(packs=dict.fromkeys(m["packs"], 5)),
    ],
)
def test_hostile_manifests_are_refused(store, other, tmp_path, change):
    push(store, str(tmp_path / "place"))
    rewritten(tmp_path / "place", change)
    with pytest.raises(CorruptAdapterError):
        pull(other, str(tmp_path / "place"))
    assert other.stats().entries == 0


@pytest.mark.parametrize("pattern", ["manifest-*", "catalogue-*", "packs/*"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_found(store, other, tmp_path, pattern, damage):
    push(store, str(tmp_path / "place"))
    (path,) = (tmp_path / "place").glob(pattern)
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == "cut" else data[:40] + bytes([data[40] ^ 1]) + data[41:])
    if damage == "gone":
        path.unlink()
    with pytest.raises((CorruptAdapterError, StoreError, ConfigError)):
        pull(other, str(tmp_path / "place"))
    assert other.stats().entries == 0


def test_a_manifest_that_was_changed_does_not_count(store, other, tmp_path):
    push(store, str(tmp_path / "place"))
    (path,) = (tmp_path / "place").glob("manifest-*")
    path.write_text(path.read_text().replace('"entries": ', '"entries": 1'))
    with pytest.raises(CorruptAdapterError, match="none of its manifests is whole"):
        pull(other, str(tmp_path / "place"))


def test_secrets_of_an_address_stay_there(store, other):
    url = "memory://somebody:hunter2@host/place"
    sent = push(store, url)
    assert sent.url == "memory://host/place"
    pull(other, url)
    assert "memory://host/place" in other.log()[0].detail["source"]
    assert not any(b"hunter2" in data for data in files(url).values())
    assert "hunter2" not in str(other.log())
    with pytest.raises(ConfigError, match="nothing is kept at memory://host/nowhere"):
        pull(other, "memory://somebody:hunter2@host/nowhere")
    MemoryFileSystem.store.clear()


def test_places_that_cannot_be_reached(store):
    with pytest.raises(StoreError, match="nowhere://x"):
        push(store, "nowhere://x")
    if not any(name in fsspec.available_protocols() for name in ("s3",)):
        return
    try:
        import s3fs  # noqa: F401 - where it is installed the next line would go out
    except ImportError:
        with pytest.raises(MissingExtraError, match="s3fs"):
            push(store, "s3://somebody:secret@bucket/x")


def test_digests_are_what_travels(store, url):
    push(store, url)
    (name,) = [name for name in files(url) if name.startswith("catalogue-")]
    lines = [json.loads(line) for line in files(url)[name].splitlines()]
    assert {line["record"] for line in lines if "record" in line} == {
        peek(encode(record(seed))).digest for seed in (0, 1)
    }
