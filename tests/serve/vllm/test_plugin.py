"""What of the plug-in needs no vLLM: numbers of versions, names for a while, and seams that have changed."""

from __future__ import annotations

import asyncio

import pytest
import torch

from modicum.errors import MissingExtraError
from modicum.serve.settings import EngineSettings
from modicum.serve.vllm import plugin
from modicum.serve.vllm.engine import VllmEngine
from modicum.serve.vllm.plugin import STORE, identity, is_core, register
from modicum.serve.vllm.resolver import Bounded
from modicum.serve.vllm.seams import VllmChangedError, check_seams


def test_versions_have_numbers_of_their_own_that_never_change():
    assert identity("ada@3") == 3435050774771991806
    found = {identity(f"user-{n}@{version}") for n in range(2000) for version in range(1, 4)}
    assert len(found) == 6000
    # vLLM counts its own adapters from 1, and keeps numbers in 64 bits
    assert all(1 << 61 <= number < 1 << 63 for number in found)


def test_a_b_without_numbers_makes_a_core():
    full, empty = torch.ones(3, 2), torch.empty(0)
    assert is_core(empty)
    assert is_core([None, empty])
    assert not is_core(full)
    assert not is_core([None, full])


def test_names_are_forgotten_by_last_use():
    names = Bounded(2)
    names["a"], names["b"] = 1, 2
    assert names["a"] == 1
    names["c"] = 3
    assert list(names) == ["a", "c"]
    assert "b" not in names
    with pytest.raises(KeyError):
        names["b"]


def test_missing_entries_are_made_where_they_may_be():
    locks = Bounded(1, asyncio.Lock)
    first = locks["a"]
    assert locks["a"] is first
    assert locks["b"] is not first
    assert list(locks) == ["b"]


def test_all_seams_that_changed_are_named():
    seams = {
        "json.decoder:JSONDecoder.decode": ("self", "s"),
        "json.decoder:JSONDecoder.raw_decode": ("self", "s", "idx"),
        "json.decoder:Gone.decode": ("self",),
        "json.gone:Gone": (),
    }
    with pytest.raises(VllmChangedError) as caught:
        check_seams(seams)
    text = str(caught.value)
    assert "JSONDecoder.decode takes (self, s, _w), not (self, s)" in text
    assert "no Gone.decode in json.decoder" in text
    assert "json.gone" in text
    assert "raw_decode" not in text


def test_nothing_happens_without_a_store(monkeypatch):
    monkeypatch.delenv(STORE, raising=False)
    register()
    assert plugin._done is False


def test_without_vllm_the_engine_says_where_to_read_on():
    pytest.importorskip("fastapi")
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"scale-out\.md"):
            VllmEngine("nowhere", EngineSettings("embedded")).start()
