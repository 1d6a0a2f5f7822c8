"""API keys: who finds whom, what is on the disk, and that changes are seen at once."""

from __future__ import annotations

import hashlib
import stat
import subprocess
import sys

import pytest

from modicum.errors import ConfigError, ConflictError, NotStoredError, StoreError
from modicum.serve.keys import EVERYBODY, FILE, Keys


@pytest.fixture
def keys(tmp_path):
    with Keys(tmp_path / "state") as opened:
        yield opened


def test_without_keys_everybody_may_do_everything(keys):
    assert not keys.exist()
    assert keys.find(None) is keys.find("anything") is EVERYBODY
    assert EVERYBODY.admin
    assert EVERYBODY.sees("team/ada")


def test_a_key_is_found_by_its_secret_alone(keys):
    ada = keys.add("ada", adapters=("team/*", "ada"), tokens_per_day=5)
    bob = keys.add("bob", base=True)
    assert ada.startswith("mod-")
    assert len(ada) == 4 + 43, "256 bits in base 64"
    found = keys.find(ada)
    assert (found.name, found.adapters, found.base, found.admin) == ("ada", ("team/*", "ada"), False, False)
    assert found.tokens_per_day == 5
    assert keys.find(bob).base
    for wrong in (None, "", "mod-", ada[:-1], ada + "x", ada.lower(), ada[:-1] + "ü", "\ud800"):
        assert keys.find(wrong) is None


def test_a_digest_that_begins_like_a_known_one_is_not_enough(keys):
    secret = keys.add("ada", base=True)
    digest = hashlib.sha256(secret.encode()).digest()
    keys._current()[digest[:8]] = (digest[:-1] + bytes([digest[-1] ^ 1]), keys.find(secret))
    assert keys.find(secret) is None


@pytest.mark.parametrize(
    ("pattern", "seen", "unseen"),
    [
        ("team/*", ["team/ada", "team/a/b", "team/"], ["team", "xteam/ada", "teamx/ada"]),
        ("ada", ["ada"], ["ada2", "Ada", "ada/x", ""]),
        ("a.b*", ["a.b", "a.bc"], ["axb"]),
        ("*", ["x", "x/y"], []),
        ("*-en", ["a-en", "t/b-en"], ["a-en-2"]),
    ],
)
def test_patterns(keys, pattern, seen, unseen):
    key = keys.find(keys.add("k", adapters=(pattern,)))
    assert [name for name in seen + unseen if key.sees(name)] == seen


def test_the_disk_holds_hashes_for_its_owner_alone(keys, tmp_path):
    secret = keys.add("ada", base=True)
    for file in (tmp_path / "state").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert secret.encode() not in file.read_bytes()
        assert secret[4:].encode() not in file.read_bytes()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_rotate_and_revoke(keys):
    old = keys.add("ada", base=True)
    new = keys.rotate("ada")
    assert keys.find(old) is None
    assert keys.find(new).name == "ada"
    keys.revoke("ada")
    assert keys.find(new) is None
    assert keys.exist(), "a server whose keys were all revoked is not open to everybody"
    assert keys.find(None) is None
    assert [key.revoked is not None for key in keys.list()] == [True]
    for again in (keys.rotate, keys.revoke):
        with pytest.raises(NotStoredError, match="no key 'ada'"):
            again("ada")
    with pytest.raises(ConflictError, match="not used again"):
        keys.add("ada", base=True)


def test_everything_that_is_wrong_is_said_at_once(keys):
    with pytest.raises(ConfigError) as caught:
        keys.add("local", adapters=("a b",), tokens_per_day=0)
    for part in ("'a b' matches no adapter", "tokens_per_day = 0, must be at least 1", "'local' is reserved"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="may do nothing"):
        keys.add("ada")
    with pytest.raises(ConfigError, match="no name for a key"):
        keys.add("a/b", base=True)
    assert not keys.exist()


def test_the_nearest_name_is_told(keys):
    keys.add("production", base=True)
    with pytest.raises(NotStoredError, match="did you mean 'production'"):
        keys.revoke("prodction")


def test_another_process_changes_them(keys, tmp_path):
    secret = keys.add("ada", base=True)
    assert keys.find(secret)
    code = (
        "import sys; from pathlib import Path; from modicum.serve.keys import Keys\n"
        "with Keys(Path(sys.argv[1])) as keys: keys.revoke('ada'); print(keys.add('bob', base=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "state"], capture_output=True, text=True, check=True
    )
    assert keys.find(secret) is None
    assert keys.find(done.stdout.strip()).name == "bob"


def test_a_damaged_file_is_said(tmp_path):
    (tmp_path / FILE).write_bytes(b"no database at all, but long enough to be read as one" * 100)
    with pytest.raises(StoreError, match=r"keys\.sqlite"):
        Keys(tmp_path)
