"""The page on experiments: its commands and its code run against a real server, one after the other."""

from __future__ import annotations

import re
import shlex

import pytest
from tests.docs.pages import ROOT, blocks
from tests.serve.servers import adapter, serving

from modicum.cli import main
from modicum.serve.experiments import guardrails
from modicum.serve.experiments.design import Design
from modicum.store import Store

PAGE = ROOT / "docs" / "do" / "experiments.md"


def test_the_commands_and_the_code_run(tmp_path, monkeypatch, capsys):
    with Store(tmp_path / "store", create=True) as store:
        for seed in range(2):
            store.put("ada", adapter(seed))
        store.promote("ada@1")
        store.alias("ada@2", "canary")
        with serving(tmp_path / "state", tmp_path / "store", engine={"slots": 4}) as served:
            monkeypatch.setenv("MODICUM_URL", served.url)
            monkeypatch.setenv("MODICUM_KEY", served.service.keys.add("ann", adapters=("*",), admin=True))
            first, second, third = blocks(PAGE, "bash")
            run(first, capsys)
            (code,) = blocks(PAGE, "python")
            found = {}
            exec(compile(code, str(PAGE), "exec"), found)
            found["client"].close()
            assert found["said"] == {
                "object": "feedback",
                "experiment": "tone",
                "thumbs": "up",
                "replaced": False,
            }
            run(second, capsys)
            assert store.find("ada@production") == "ada@1"
            run(third, capsys)
            assert served.service.experiments.get("tone").state == "rolled back"
            assert served.service.experiments.get("safe").state == "running"


def run(block, capsys):
    for line in block.splitlines():
        words = shlex.split(line)
        if words[0] == "export":
            continue
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        assert not stop.value.code, (line, capsys.readouterr().err)


def test_the_numbers_are_those_of_the_code():
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    for said, value in {
        r"`--alpha`, ([\d.]+)": Design.alpha,
        r"`--error-margin` \(([\d.]+)\)": Design.error_margin,
        r"`--latency-factor` \(([\d.]+)\)": Design.latency_factor,
        r"`--window` seconds \((\d+)\)": Design.window,
        r"more than (\d+) % of its requests": 100 * guardrails.SLOW,
        r"a chance of ([\d.]+) over the whole": guardrails.ALPHA,
    }.items():
        assert float(re.search(said, text).group(1)) == value, said
    assert guardrails.USERS == 3
    assert "at least three users" in text
