"""`modicum plan` from the outside."""

from __future__ import annotations

import json

import pytest

from modicum.cli import main
from modicum.cli._common import size


def _run(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *args])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_the_headline_in_words(capsys):
    out = _run(
        capsys, "gpt3", "--targets", "q_proj,v_proj", "--users", "1000000", "--dtype", "float16",
        "--method", "lora_xs", "--method", "lora",
    )  # fmt: skip
    for part in ("144 MiB", "96 KiB", "1,536", "49,152", "1,000,000 users", "shared basis, once"):
        assert part in out


def test_the_headline_as_json(capsys):
    rows = json.loads(_run(capsys, "gpt3", "--targets", "q_proj", "--targets", "v_proj", "--json"))["rows"]
    assert {row["method"]: row["payload_bytes"] for row in rows}["lora_xs"] == 96 * 1024


def test_ranks_and_options(capsys):
    out = _run(
        capsys,
        "gpt3",
        "--method",
        "lora_xs",
        "--rank",
        "4",
        "--rank",
        "8",
        "--option",
        "core=diagonal",
        "--json",
    )
    assert [row["trained"] for row in json.loads(out)["rows"]] == [6 * 96 * 4, 6 * 96 * 8]


def test_what_peft_saves_besides(capsys):
    assert "of frozen numbers to every tiny_lora folder at rank 2" in _run(capsys, "gpt3", "--rank", "2")


def test_an_error_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "gpt3", "--targets", "q_prj"])
    assert exit_.value.code == 1
    assert "did you mean 'q_proj'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (96 * 1024, "96 KiB"),
        (1536, "1.5 KiB"),
        (144 * 2**20, "144 MiB"),
        (5e15, "4547 TiB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text
