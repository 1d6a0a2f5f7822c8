"""The report of a comparison without a browser: tables, plots, escaping, the same bytes, nothing half-written."""

from __future__ import annotations

import copy
import html.parser
import json
import math
import os
import re
import subprocess
import sys

import pytest
from tests.compare.sample import cell, comparison, measure

from modicum.compare import markdown, plots, svg
from modicum.compare.columns import columns, seconds, size, with_interval
from modicum.compare.report import page, write_report
from modicum.compare.words import found, reading
from modicum.errors import MissingExtraError

HOSTILE = (
    '</title><script>alert("x")</script><img src=http://127.0.0.1/x onerror=alert(1)>|`_$x^2$*[a](b)&lt;\n# b'
)


@pytest.fixture(scope="module")
def whole():
    return comparison()


@pytest.fixture(scope="module")
def drawn(whole):
    return plots.plots(whole)


@pytest.fixture(scope="module")
def text(whole):
    return page(whole)


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes, as a browser's parser would start them."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, kind):
        return [attributes for _, attributes in self.found if kind in (attributes.get("class") or "").split()]


def test_the_table_has_a_row_for_every_cell(whole):
    shown = markdown.table(whole)
    assert [row[0] for row in shown["rows"]] == [one["label"] for one in whole["cells"]]
    assert {len(row) for row in shown["rows"]} == {len(shown["columns"])}
    by_title = [dict(zip(shown["columns"], row, strict=True)) for row in shown["rows"]]
    assert by_title[4]["accuracy"] == "0.851 ± 0.011"
    assert by_title[4]["trained values"] == "6,850"
    assert by_title[4]["shared"] == "3.05 MiB"
    assert by_title[5]["notes"] == "best at the highest rate; worse than the best"
    assert [by_title[i]["notes"] for i in (4, 7, 11)] == ["–", "failed", "missing"]
    assert by_title[7]["accuracy"] == "–"
    assert "Student's t over seeds, 95%" in shown["note"]
    json.dumps(shown)


def test_the_markdown_table_is_the_same_table(whole):
    lines = markdown.markdown_table(whole).splitlines()
    rows = [[part.strip() for part in line.strip("|").split(" | ")] for line in lines]
    shown = markdown.table(whole)
    assert rows[0] == shown["columns"]
    assert rows[2:] == shown["rows"]
    assert rows[1][:3] == ["---", "---", "---:"]


def test_columns_without_anything_are_left_out(whole):
    titles = [column.title for column in columns(whole)]
    assert not {"energy", "cost", "GPU time"} & set(titles)
    one = copy.deepcopy(whole)
    one["cells"] = one["cells"][:3]
    one["cells"][0].update(energy_joules=12.0, energy_source="rapl")
    one["cells"][1]["cost"] = {"amount": 0.5, "currency": "EUR", "missing": {}}
    one["cells"][2]["cost"] = {"amount": 0.25, "currency": "EUR", "missing": {"energy": "not measured"}}
    titles = [column.title for column in columns(one)]
    assert {"energy", "cost"} <= set(titles)
    assert [columns(one)[titles.index("cost")].text(each) for each in one["cells"]] == [
        "–",
        "0.5 EUR",
        "≥ 0.25 EUR",
    ]
    assert any("from rapl" in sentence for sentence in reading(one))
    assert any("≥" in sentence for sentence in reading(one))
    assert "compression" not in titles


def test_what_was_found(whole):
    best, smallest, rest = found(whole)
    assert best == "Highest accuracy: lora r=16 (none), 0.858 ± 0.011 with 197,888 trained values."
    assert smallest.endswith("lora_xs r=16 (none), 0.851 ± 0.011 with 6,850 trained values.")
    assert rest == "Of 12 cells, 10 are done, 1 failed, 1 missing."
    turned = {**whole, "larger_is_better": False, "metric": "loss"}
    assert found(turned)[0].startswith("Lowest loss: lora r=16 (none), 0.342")


def test_one_seed_has_no_intervals(whole):
    one = copy.deepcopy(whole)
    one["seeds"] = [0]
    for each in one["cells"]:
        each["metrics"] = {name: measure(m["value"], 0, n=1) for name, m in each["metrics"].items()}
        each["significantly_worse_than_best"] = None
    assert markdown.table(one)["rows"][0][2] == "0.842"
    assert "single seed" in reading(one)[0]
    assert not any("Holm" in sentence for sentence in reading(one))
    assert 'class="bar"' not in page(one)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.86149, "0.861 ± 0.010"),
        (15.257, "15.26 ± 0.01"),
        (123.45, "123.5 ± 0.0"),
        (float("nan"), "diverged"),
    ],
)
def test_digits_suit_the_mean(value, shown):
    assert with_interval(measure(value, 0.01)) == shown


def test_units():
    assert [size(n) for n in (0, 1023, 1024, 147_456, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "144 KiB",
        "5 TiB",
    ]
    assert [seconds(s) for s in (1.234, 600, 7200)] == ["1.23 s", "10 min", "2 h"]


def test_every_cell_with_a_value_is_drawn(whole, drawn):
    done = {str(i) for i, one in enumerate(whole["cells"]) if one["state"] == "done"}
    assert [plot.name for plot in drawn["quality"]] == [
        "plot-trained-values",
        "plot-stored-bytes",
        "plot-total-bytes",
    ]
    for plot in drawn["quality"]:
        elements = Elements(plot.svg)
        assert {mark["data-cell"] for mark in elements.of("mark")} == done
        assert {bar["data-cell"] for bar in elements.of("bar")} == done
        assert [line["data-base"] for line in elements.of("untrained")] == ["0", "1"]
        assert "lora r=16 (4bit), vera r=256 (4bit)" in plot.remark
    # lines through ranks: LoRA-XS on both bases, LoRA and VeRA on the first at most
    assert [line["data-base"] for line in Elements(drawn["quality"][0].svg).of("link")].count("1") == 2
    assert [len(Elements(plot.svg).of("front")) for plot in drawn["quality"]] == [1, 1, 0]
    # stairs: what one size allows holds until the next one
    front = re.search(
        r'class="front">.*?d="M (\S+) (\S+) \s*L (\S+) (\S+)', drawn["quality"][0].svg, re.DOTALL
    )
    assert front.group(2) == front.group(4) != front.group(1)
    for part, kind in (("curves", "curve"), ("rates", "sweep")):
        assert [plot.title.split(":")[0] for plot in drawn[part]] == ["lora", "lora_xs", "vera"]
        cells = {line["data-cell"] for plot in drawn[part] for line in Elements(plot.svg).of(kind)}
        assert cells == done


def test_the_chosen_rate_is_marked_and_an_edge_differently(drawn):
    lora, _, vera = (Elements(plot.svg) for plot in drawn["rates"])
    assert [ring["data-cell"] for ring in lora.of("chosen")] == ["0", "1", "6"]
    assert not lora.of("edge")
    assert [ring["data-cell"] for ring in vera.of("edge")] == ["5"]


def test_plots_of_one_kind_have_one_scale(drawn):
    for part in ("curves", "rates"):
        ticks = [re.findall(r">(0\.\d+)</text>", plot.svg) for plot in drawn[part]]
        assert ticks[0]
        assert ticks[0] == ticks[1] == ticks[2]


def test_lines_are_fuller_for_larger_cells(whole):
    shades = plots._shades(whole["cells"])
    # a cell that failed on one base does not put its label first
    assert sorted(shades, key=lambda label: shades[label])[-2:] == ["lora r=4", "lora r=16"]
    assert max(shades.values()) == 1


def test_the_axes_of_sizes_are_logarithmic(whole, drawn):
    # equal ratios are equal distances: LoRA-XS 4, 8 and LoRA 4, 16 by their trained values
    marks = dict(
        re.findall(
            r'class="mark" data-cell="(\d+)".*?<use [^>]*x="([\d.]+)"', drawn["quality"][0].svg, re.DOTALL
        )
    )
    places = [(math.log(whole["cells"][int(i)]["trained_values"]), float(x)) for i, x in marks.items()]
    (a, x), (b, y), (c, z) = places[0], places[1], places[2]
    assert (x - z) / (a - c) == pytest.approx((y - z) / (b - c), rel=1e-3)


@pytest.mark.parametrize(
    ("values", "named", "base", "ticks"),
    [
        ((900, 250_000), plots._short, 10, ["1k", "10k", "100k"]),
        ((49_000, 105_000), size, 2, ["50 KiB", "60 KiB"]),
        ((5_000, 800_000), size, 2, ["8 KiB", "16 KiB"]),
        ((200, 235), plots._short, 10, ["200", "210"]),
        ((1_000, 40_000_000_000), size, 2, ["1 KiB", "16 KiB", "256 KiB"]),
    ],
)
def test_ticks_are_few_and_round(values, named, base, ticks):
    _, axes = svg.figure_of(3)
    axes.set_xscale("log")
    axes.set_xlim(*values)
    svg.log_ticks(axes, named, base)
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert 3 <= len(shown) <= 7
    assert shown[: len(ticks)] == ticks
    assert len(set(shown)) == len(shown)


def test_a_sweep_without_choice_and_runs_without_curves_have_no_plots(whole):
    bare = copy.deepcopy(whole)
    for each in bare["cells"]:
        each["rates"], each["curves"] = each["rates"][:1], []
    drawn = plots.plots(bare)
    assert drawn["curves"] == drawn["rates"] == []
    assert 'id="rates"' not in page(bare)


def test_curves_are_means_over_the_seeds_that_have_a_step():
    seeds = [[[1, 2.0], [2, float("nan")], [3, None]], [[1, 4.0], [2, 5.0]], []]
    assert plots._over_steps(seeds) == [(1, 3.0, 2.0, 4.0), (2, 5.0, 5.0, 5.0)]


def test_diverged_runs_are_shown_as_such(whole):
    wild = copy.deepcopy(whole)
    wild["cells"][0]["metrics"]["accuracy"] = measure(float("nan"), 0.1)
    wild["cells"][2]["curves"][0]["train"][3][1] = 1e6
    wild["cells"][2]["curves"][1]["train"][4][1] = float("inf")
    wild["cells"][3]["curves"][0]["validation"][1][1] = None
    text = page(wild)
    assert ">diverged</td>" in text
    assert "Not drawn, for want of a value: lora r=4 (none), lora r=16 (4bit)" in text


def test_nothing_at_all_is_still_a_report(whole, tmp_path):
    empty = {**whole, "pareto": {}, "untrained": None, "conditions": {}, "cells": whole["cells"][7:8]}
    write_report(tmp_path, empty)
    assert "the rows ran out after 12 steps" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_names_and_errors_cannot_become_markup(whole, text):
    harmed = copy.deepcopy(whole)
    harmed["name"] = harmed["split"] = HOSTILE
    harmed["conditions"]["model"] = harmed["conditions"]["versions"][HOSTILE] = HOSTILE
    harmed["untrained"][HOSTILE] = harmed["untrained"].pop("4bit")
    for each in harmed["cells"]:
        each["label"] = f"_{HOSTILE}{each['label']}"
        each["compression"] = each["compression"].replace("4bit", HOSTILE)
        each["error"] = each["error"] and HOSTILE
    harmed["cells"][0]["label"], harmed["cells"][1]["label"] = "日本語 _a", "$x^2$"
    harm = page(harmed)
    calm, elements = Elements(text), Elements(harm)
    tags = {tag for tag, _ in calm.found}
    assert {tag for tag, _ in elements.found} == tags
    assert "img" not in tags
    assert sum(tag == "script" for tag, _ in elements.found) == 1
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    assert len(elements.of("mark")) == len(calm.of("mark"))
    # the legends name them all, also what starts with an underscore
    assert harm.count(">日本語 _a (none)</text>") == harm.count(">$x^2$ (none)</text>") == 2
    table = markdown.markdown_table(harmed)
    assert len(table.splitlines()) == 14
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "<script" not in markdown.page(harmed)


def test_the_page_loads_nothing(text):
    for tag, attributes in Elements(text).found:
        assert tag not in ("link", "img", "iframe", "object", "base", "image")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "url(http" not in text
    assert "@import" not in text


def test_ids_are_unique_and_references_resolve(text):
    defined = [attributes["id"] for _, attributes in Elements(text).found if "id" in attributes]
    assert len(defined) == len(set(defined))
    used = re.findall(r'(?:xlink:href="|url\()#([^")]+)', text)
    assert used
    assert set(used) <= set(defined)


def test_the_same_comparison_gives_the_same_bytes(whole, tmp_path):
    write_report(tmp_path, json.loads(json.dumps(whole)))
    code = (
        "import json, pathlib, sys, matplotlib\n"
        "matplotlib.rcParams.update({'font.size': 30, 'axes.xmargin': 0.3, 'lines.linewidth': 9})\n"
        "from tests.compare.sample import comparison\n"
        "from modicum.compare.report import write_report\n"
        f"write_report(pathlib.Path({str(tmp_path / 'again')!r}), comparison())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    for name in ("report.html", "report.md"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_report_that_cannot_be_drawn_writes_nothing(whole, tmp_path):
    broken = copy.deepcopy(whole)
    del broken["cells"][3]["label"]
    with pytest.raises(KeyError):
        write_report(tmp_path, broken)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'modicum[compare]'")):
        write_report(tmp_path, {**whole, "cells": whole["cells"][7:8]})
    assert not list(tmp_path.iterdir())


def test_many_methods_stay_apart():
    cells = [cell(f"method_{i}", 4, "none", (100 * (i + 1), 400, 0, 0.8)) for i in range(16)]
    look = plots._Look(tuple(f"method_{i}" for i in range(16)), ("none",))
    assert len({(look.of(one)["color"], look.of(one)["marker"]) for one in cells}) == 16
