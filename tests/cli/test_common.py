"""Output, progress and overrides that the verbs share."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path

import pytest

from modicum.cli._common import (
    emit,
    jsonable,
    layer_progress,
    parse_overrides,
    progress,
    table,
)
from modicum.errors import ConfigError


@dataclasses.dataclass
class _Point:
    x: int
    where: Path
    loss: float = float("nan")


def test_json_of_a_dataclass(capsys):
    emit({"points": (_Point(1, Path("a") / "b"),)}, True, str)
    assert capsys.readouterr().out == '{"points": [{"x": 1, "where": "a/b", "loss": null}]}\n'


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_json_has_no_infinity(value):
    assert jsonable([value, 1.5]) == [None, 1.5]


def test_a_table_keeps_whole_rows_in_a_pipe(capsys):
    emit(None, False, lambda _: [table("t", ["name", "n"], [["x" * 90, "1,234"], ["y" * 40, ""]]), "done"])
    out = capsys.readouterr().out
    assert "x" * 90 in out
    assert out.endswith("done\n")


def test_progress_without_a_terminal_is_lines(capsys):
    with progress("reading", 3, every=1e9) as advance:
        for index in range(3):
            advance(note=f"file {index}")
    assert capsys.readouterr().err == "reading 3/3 file 2\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    screen, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr("sys.stderr", terminal)
        with progress("reading", 4) as advance:
            advance(2)
            advance(note="file c")
    shown = b""
    with os.fdopen(screen, "rb", buffering=0) as ours, contextlib.suppress(OSError):  # Linux ends with one
        while part := ours.read(4096):
            shown += part
    before, _, after = shown.decode().rpartition("75%")
    assert "reading file c" in before
    assert "\x1b[2K" in after  # and it leaves nothing behind


def test_progress_without_a_total(capsys):
    with progress("reading", every=0.0) as advance:
        advance(2)
        advance()
    assert capsys.readouterr().err == "reading 2\nreading 3\n"


def test_layers_are_counted_from_where_a_resumed_run_begins(capsys):
    with layer_progress("layers") as advance:
        advance(2, 4, "")
        advance(3, 4, "c")
        advance(4, 4, "d")
    assert capsys.readouterr().err == "layers 4/4 d\n"
    with layer_progress("layers"):
        pass
    assert capsys.readouterr().err == ""


def test_overrides():
    pairs = [
        "train.lr=1e-3",
        "train.steps=10",
        "method.target_modules=[q_proj, v_proj]",
        "name=a=b",
        "seed=",
        "x=true",
    ]
    assert parse_overrides(pairs) == {
        "train": {"lr": 1e-3, "steps": 10},
        "method": {"target_modules": ["q_proj", "v_proj"]},
        "name": "a=b",
        "seed": None,
        "x": True,
    }


@pytest.mark.parametrize("pair", ["", "lr", "=3", "train.=3", ".lr=3"])
def test_a_bad_override_says_how(pair):
    with pytest.raises(ConfigError, match=r"write key=value"):
        parse_overrides([pair])


def test_overrides_that_contradict_each_other():
    with pytest.raises(ConfigError, match="goes below 'train'"):
        parse_overrides(["train=1", "train.lr=2"])
