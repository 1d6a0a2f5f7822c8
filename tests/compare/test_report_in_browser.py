"""The report in a real browser: its plots are there, it sorts and filters, fits a phone, and loads nothing."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
from tests.browser import NoBrowserError, browser
from tests.compare.sample import comparison
from tests.compare.small import reference
from tests.compare.test_report import HOSTILE

from modicum.compare.report import write_report

#: name of every plot and how many cells each draws
PLOTS = {
    "plot-trained-values": 10,
    "plot-stored-bytes": 10,
    "plot-total-bytes": 10,
    "plot-curves-0": 3,
    "plot-curves-1": 6,
    "plot-curves-2": 1,
    "plot-rates-0": 3,
    "plot-rates-1": 6,
    "plot-rates-2": 1,
}


@pytest.fixture(scope="module")
def window():
    try:
        with browser() as page:
            yield page
    except NoBrowserError as error:
        pytest.skip(f"no browser: {error}")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, comparison())
    return folder / "report.html"


@pytest.fixture
def opened(window, report):
    window.resize(1280)
    window.dark(False)
    window.open(report)
    return window


def column(page, index):
    """What the visible rows show in one column, from top to bottom."""
    return page.evaluate(
        "[...document.querySelectorAll('#results tbody tr')].filter((row) => row.offsetHeight > 0)"
        f".map((row) => row.cells[{index}].textContent)"
    )


def shown(page):
    """The plots that can be seen, with the number of cells each shows."""
    return page.evaluate("""Object.fromEntries([...document.querySelectorAll("svg.plot")]
        .filter((plot) => plot.getBoundingClientRect().width > 200 && plot.getBoundingClientRect().height > 120)
        .map((plot) => [plot.id, new Set([...plot.querySelectorAll(".mark, .curve, .sweep")]
            .filter((part) => { const box = part.getBoundingClientRect(); return box.width > 2 && box.height > 2; })
            .map((part) => part.dataset.cell)).size]))""")


def test_every_plot_is_there_with_every_cell(opened, report):
    assert shown(opened) == PLOTS
    assert opened.requested == [report.as_uri()]
    assert opened.logged == []


def test_the_report_of_a_comparison_that_ran(window):
    cells = json.loads((reference() / "comparison.json").read_text())["cells"]
    window.resize(1280)
    window.dark(False)
    window.open(reference() / "report.html")
    of_method = Counter(cell["method"] for cell in cells)
    swept = Counter(cell["method"] for cell in cells if len(cell["rates"]) > 1)
    assert of_method == {"lora": 4, "lora_xs": 4}
    assert swept == {"lora_xs": 4}
    quality = dict.fromkeys(("plot-trained-values", "plot-stored-bytes", "plot-total-bytes"), 8)
    courses = {"plot-curves-0": 4, "plot-curves-1": 4, "plot-rates-0": 4}
    assert shown(window) == {**quality, **courses}
    assert Counter(column(window, 0)) == Counter(cell["label"] for cell in cells)
    assert window.requested == [(reference() / "report.html").as_uri()]
    assert window.logged == []


def test_bands_are_wider_than_their_lines(opened):
    heights = opened.evaluate("""[...document.querySelectorAll(".plot")].flatMap((plot) => {
        const lines = [...plot.querySelectorAll(".curve")], bands = [...plot.querySelectorAll(".band")];
        return lines.map((line, index) => [line, bands[index]].map((part) => part.getBBox().height)); })""")
    assert heights
    assert all(band > line for line, band in heights)


def test_marks_stand_where_their_numbers_are(opened):
    # better is higher, more values is further to the right
    places = opened.evaluate("""[...document.querySelectorAll("#plot-trained-values .mark")].map((mark) => {
        const box = mark.querySelector("use").getBoundingClientRect();
        return [Number(mark.dataset.cell), box.x + box.width / 2, box.y + box.height / 2]; })""")
    cells = comparison()["cells"]
    by_accuracy = sorted(places, key=lambda one: -one[2])
    accuracies = [cells[index]["metrics"]["accuracy"]["value"] for index, _, _ in by_accuracy]
    assert accuracies == sorted(accuracies)
    by_size = [cells[index]["trained_values"] for index, _, _ in sorted(places, key=lambda one: one[1])]
    assert by_size == sorted(by_size)


def test_a_click_on_a_title_sorts(opened):
    before = column(opened, 0)
    opened.click("#results thead th:nth-child(5) button")
    values = column(opened, 4)
    # by number, not by text; what has none stays last
    assert values[:3] == ["1,090", "1,090", "2,242"]
    assert values[-3:] == ["197,888", "–", "–"]
    opened.click("#results thead th:nth-child(5) button")
    assert column(opened, 4)[:3] == ["197,888", "50,432", "50,432"]
    assert column(opened, 4)[-2:] == ["–", "–"]
    opened.click("#results thead th:nth-child(3) button")
    measured = [float(text.split()[0]) for text in column(opened, 2)[:-2]]
    assert measured == sorted(measured)
    opened.click("#results thead th:nth-child(1) button")
    assert column(opened, 0) != before
    assert column(opened, 0)[:6] == [
        "lora r=4",
        "lora r=4",
        "lora r=16",
        "lora r=16",
        "lora_xs r=4",
        "lora_xs r=4",
    ]
    sorting = "[...document.querySelectorAll('#results th[aria-sort]:not([aria-sort=none])')].map((t) => t.textContent)"
    assert opened.evaluate(sorting) == ["cell"]
    assert opened.logged == []


def test_the_filter_shows_one_compression(opened):
    opened.click("fieldset label:nth-of-type(3)")
    assert set(column(opened, 1)) == {"4bit"}
    assert len(column(opened, 0)) == 6
    less = {name: {10: 4, 6: 3, 3: 1}[cells] for name, cells in PLOTS.items() if cells > 1}
    assert shown(opened) == less
    opened.click("fieldset label:nth-of-type(1)")
    assert len(column(opened, 0)) == 12
    assert shown(opened) == PLOTS
    assert opened.logged == []


def test_the_cell_under_the_pointer_stands_out(opened):
    opened.evaluate("document.querySelector('#results tbody tr:nth-child(5)').scrollIntoView()")
    opened.send("Input.dispatchMouseEvent", type="mouseMoved", x=200, y=10)
    lit = "[...new Set([...document.querySelectorAll('.lit')].map((part) => part.dataset.cell))]"
    assert opened.evaluate(lit) == ["4"]
    opened.evaluate("scrollTo(0, 0)")
    opened.send("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert opened.evaluate(lit) == []


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits(opened, width):
    opened.resize(width)
    assert opened.evaluate("innerWidth") == width
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert shown(opened) == PLOTS


def test_dark_is_dark_and_text_can_be_read(opened):
    def contrast():
        ink, paper = (
            opened.evaluate(f"getComputedStyle(document.querySelector('{what}')).{colour}")
            for what, colour in (("#plot-trained-values text", "fill"), ("figure", "backgroundColor"))
        )
        return _luminance(ink), _luminance(paper)

    for dark in (False, True):
        opened.dark(dark)
        ink, paper = contrast()
        assert (paper < 0.1) == dark
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7
    # every stand-in of a colour has become one of the page's
    assert not opened.evaluate("document.querySelector('#quality').innerHTML.includes('#0102')")


def _luminance(colour):
    red, green, blue = (int(part) / 255 for part in colour.strip("rgb()").split(","))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_names_run_nothing(window, tmp_path):
    harmed = copy.deepcopy(comparison())
    harmed["name"] = HOSTILE
    harmed["conditions"]["model"] = "unbroken" * 40
    for each in harmed["cells"]:
        each["label"] = HOSTILE
        each["error"] = each["error"] and HOSTILE
    write_report(tmp_path, harmed)
    window.resize(400)
    window.open(tmp_path / "report.html")
    assert window.logged == []
    assert window.requested == [(tmp_path / "report.html").as_uri()]
    assert window.evaluate("document.title") == " ".join(HOSTILE.split())
    assert window.evaluate("document.querySelector('#results tbody th').textContent") == HOSTILE
    assert window.evaluate("document.documentElement.scrollWidth") <= 400


def test_the_policy_stops_what_escaping_would_miss(window, report, tmp_path):
    hole = report.read_text(encoding="utf-8").replace(
        "<body>", "<body><script>window.ran = 1</script><img src=x.png>"
    )
    (tmp_path / "hole.html").write_text(hole, encoding="utf-8")
    window.open(tmp_path / "hole.html")
    assert window.evaluate("window.ran === undefined")
    refused = [entry for entry in window.logged if "Content Security Policy" in entry]
    assert len(refused) == 2
    assert any("x.png" in entry for entry in refused)
