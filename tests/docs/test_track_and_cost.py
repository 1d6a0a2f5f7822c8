"""The page on tracking and cost: its code runs, its prices are prices, its keys are those of the results."""

from __future__ import annotations

import re

import yaml
from tests.docs.pages import ROOT, blocks

from modicum.evaluate.resources import PRICES, Prices, Resources
from modicum.evaluate.tracking import TRACKERS

PAGE = ROOT / "docs" / "do" / "track-and-cost.md"


def test_the_code_runs():
    (code,) = blocks(PAGE, "python")
    exec(compile(code, str(PAGE), "exec"), {})


def test_the_prices_are_read():
    (text,) = blocks(PAGE, "yaml")
    prices = Prices.of(yaml.safe_load(text))
    assert all(getattr(prices, name) for name in PRICES)


def test_every_key_and_tracker_is_named():
    text = PAGE.read_text(encoding="utf-8")
    with Resources() as used:
        pass
    rows = re.findall(r"^\| (.+?) \|", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(used.as_dict()) - {"peak_memory_scope"} <= named
    assert "`peak_memory_scope`" in text
    assert set(TRACKERS) <= {row.strip("`") for row in rows}
