"""The page on watching a server: its metrics are those of a server, its prices are prices, its line is a line."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.docs.pages import ROOT, blocks

from modicum.cli import main
from modicum.serve.costs import Tariff
from modicum.serve.exposition import Exposition
from modicum.serve.keys import Keys
from modicum.serve.logs import about
from modicum.serve.metrics import Metrics, Observed

PAGE = ROOT / "docs" / "do" / "monitor.md"


def prices():
    return Tariff.of(yaml.safe_load(blocks(PAGE, "yaml")[1]))


def test_every_metric_is_named_and_no_other():
    metrics = Metrics(tariff=prices())
    text, _ = Exposition(metrics).text()
    metrics.close()
    told = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(text.decode())
    }
    page = PAGE.read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| `modicum_")]
    assert {name for row in rows for name in re.findall(r"`(modicum_\w+)`", row.split("|")[1])} == told
    assert {name for query in re.findall(r"rate\((\w+)\[", page) for name in [query]} <= told


def test_the_prices_are_read():
    tariff = prices()
    assert (tariff.currency, tariff.prompt, tariff.cached, tariff.generated) == ("EUR", 2e-4, 2e-5, 6e-4)
    assert tariff.machine is not None
    assert (tariff.machine.cpu_hour, tariff.machine.gpu_hour, tariff.machine.kwh) == (0.04, 2.5, 0.3)


def test_the_line_has_what_a_line_has():
    (text,) = blocks(PAGE, "json")
    seen = Observed("ada", "ok", 0, 1.0, "r", "m", "v", None, (0.0, 0.5), 0.5, 1, 1, 1, None, "never")
    assert list(json.loads(text)) == ["at", "level", "logger", "message", *about(seen)]


def test_the_key_that_is_made_reads_metrics_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MODICUM_STATE", str(tmp_path))
    line = next(line for block in blocks(PAGE, "sh") for line in block.splitlines() if "keys add" in line)
    with pytest.raises(SystemExit) as stop:
        main(line.split()[1:])
    assert not stop.value.code
    with Keys(tmp_path) as keys:
        key = keys.find(capsys.readouterr().out.strip())
    assert key is not None
    assert key.metrics
    assert not any((key.admin, key.base, key.adapters))
