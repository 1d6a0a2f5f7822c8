"""The page in a real browser, over a real server: what it draws, what its buttons do, and what it never does."""

from __future__ import annotations

import time

import pytest
from tests.browser import NoBrowserError, browser
from tests.serve.page.served import HOSTILE, run_experiment, site

#: how many elements the keyboard reaches
STOPS = """[...document.querySelectorAll('a[href], button, input, svg[tabindex], [role=region][tabindex]')]
    .filter((one) => one.tabIndex >= 0 && one.getBoundingClientRect().width > 0).length"""
#: what has the focus: its name, whether that is shown, and how
FOCUSED = """(() => {
    const one = document.activeElement, outline = getComputedStyle(one.closest("label") ?? one).outlineStyle;
    const name = one.id || one.dataset.key || one.getAttribute("aria-label") || one.textContent.trim();
    return [name, one.matches(":focus-visible"), outline]; })()"""
#: title of every plot -> heights of the lines that are drawn
DRAWN = """Object.fromEntries([...document.querySelectorAll("figure")].map((figure) => [
    figure.querySelector("h3").textContent, [...figure.querySelectorAll(".plot .line")]
        .map((line) => line.getBBox()).filter((box) => box.width > 1).map((box) => box.height)]))"""
#: what has neither a text nor a label
NAMELESS = """[...document.querySelectorAll("button, input, svg.plot, [role=region], section, dialog")]
    .filter((one) => !(one.textContent.trim() || one.labels?.length || one.ariaLabel)).map((one) => one.outerHTML)"""
INJECTED = """(() => {
    const script = document.createElement("script"), image = new Image();
    script.textContent = "window.ran = 1";
    image.src = "http://127.0.0.1:9/x.png";
    document.body.append(script, image);
    script.remove();
    image.remove(); })()"""


@pytest.fixture(scope="module")
def window():
    try:
        with browser() as page:
            yield page
    except NoBrowserError as error:
        pytest.skip(f"no browser: {error}")


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with site(tmp_path_factory.mktemp("site")) as running:
        run_experiment(running)
        for model in ("notes", "notes@1", "base"):
            running.complete(model)
        yield running


@pytest.fixture
def signed_in(window, served):
    """The page as an admin sees it, with some seconds of traffic on it."""
    enter(window, served, served.admin)
    window.wait("document.querySelector('#experiment-list article')")
    return window


def enter(window, served, key, width=1280):
    window.resize(width)
    window.dark(False)
    window.open(f"{served.address}/")
    window.evaluate("sessionStorage.clear()")
    window.open(f"{served.address}/")
    window.wait("!document.querySelector('#login').hidden")
    window.evaluate("document.querySelector('#key').focus()")
    window.write(key)
    window.requested.clear()  # what the page before this one was asking arrives late
    window.press("Enter")
    window.wait("!document.querySelector('#who').hidden || document.querySelector('#key-fault').textContent")
    window.logged.clear()  # the first request was answered with 401, which Chromium tells


def texts(window, selector):
    return window.evaluate(f"[...document.querySelectorAll({selector!r})].map((one) => one.textContent)")


def answer(window, name):
    """Presses a button of the dialog that has opened."""
    window.wait("document.querySelector('dialog').open")
    window.click(f"dialog button[value={name}]")
    window.wait("!document.querySelector('dialog').open")


def test_plots_draw_the_traffic(signed_in, served):
    for _ in range(12):
        served.complete("notes")
        time.sleep(0.1)
    signed_in.wait(f"({DRAWN})['Tokens per second'].some((height) => height > 20)")
    heights = signed_in.evaluate(DRAWN)
    assert len(heights) == 6
    assert max(heights["Tokens per second"]) > 20
    assert len(heights["Requests at a time"]) == 3
    # durations are there for the seconds with traffic: points may stand alone, but there are some
    paths = signed_in.evaluate("""[...document.querySelectorAll("figure")].slice(1, 3).flatMap((figure) =>
        [...figure.querySelectorAll(".plot .line")].map((line) => line.getAttribute("d")))""")
    assert len(paths) == 4
    assert all(path.startswith("M") for path in paths)
    tiles = dict(zip(texts(signed_in, "#tiles dt"), texts(signed_in, "#tiles dd"), strict=True))
    assert tiles["Adapters in memory"].startswith("3 of 8")
    assert "ms" in tiles["First token"] or tiles["First token"].startswith("–")
    assert signed_in.logged == []


def test_a_plot_is_read_with_the_keyboard(signed_in):
    signed_in.wait("document.querySelector('.plot .line[d^=M]')")
    signed_in.evaluate("document.querySelector('.plot').focus()")
    signed_in.press("Home")
    signed_in.press("ArrowRight")
    name, label = signed_in.evaluate(
        "[document.querySelector('figure h3').textContent, document.querySelector('.plot').ariaLabel]"
    )
    assert name == "Tokens per second"
    assert label.startswith(f"{name}, ")
    assert " generated " in label
    assert len(signed_in.evaluate("document.querySelector('.cursor').getAttribute('d')")) > 4
    # it stays at its moment when more frames come
    count = "document.querySelector('.plot .line').getAttribute('d').length"
    drawn = signed_in.evaluate(count)
    signed_in.wait(f"{count} > {drawn}")
    assert signed_in.evaluate("document.querySelector('.plot').ariaLabel") == label


def test_the_hour_is_drawn_too(signed_in, served):
    points = "document.querySelector('.plot .line').getAttribute('d').split(/[ML]/).length"
    timeline = served.served.service.metrics.timeline
    while not timeline.since(coarse=True)["at"]:
        time.sleep(0.2)
    signed_in.wait(f"{points} > 8")
    signed_in.click("input[value=coarse]")
    signed_in.wait(f"{points} < 8 && {points} > 1")
    signed_in.click("input[value=fine]")
    signed_in.wait(f"{points} > 8")
    assert signed_in.logged == []


def test_experiments_show_intervals(signed_in):
    rows = texts(signed_in, "#experiment-list tbody tr")
    assert len(rows) == 2
    assert rows[0].startswith("controlnotes@2, the control")
    assert rows[1].startswith("boldnotes@3")
    assert all("…" in row for row in rows)
    ends = signed_in.evaluate("""[...document.querySelectorAll("#experiment-list .interval")].map((one) => {
        const span = one.querySelector(".span").getBBox(), dot = one.querySelector("circle");
        return [span.x, Number(dot.getAttribute("cx")), span.x + span.width]; })""")
    assert len(ends) == 2
    assert all(low < mean < high and high - low > 5 for low, mean, high in ends)


def test_rollback_rolls_back(signed_in, served):
    open_adapter(signed_in, "notes")
    assert texts(signed_in, "#adapter-detail tbody th")[:3] == ["3", "2", "1"]
    served.store.promote("notes@2")
    signed_in.wait("document.querySelector('#adapter-detail .badge')")
    # whoever says no has changed nothing
    asked = [one for one in signed_in.requested if one.endswith("/rollback")]
    signed_in.click("[data-key=rollback]")
    assert "version 2" in texts(signed_in, "#ask-text")[0]
    answer(signed_in, "no")
    signed_in.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert [one for one in signed_in.requested if one.endswith("/rollback")] == asked
    assert served.store.show("notes@production").version == 2
    signed_in.click("[data-key=rollback]")
    answer(signed_in, "yes")
    signed_in.wait("document.querySelector('#status').textContent.includes('version 1 again')")
    assert served.store.show("notes@production").version == 1
    assert served.store.log("notes")[-1].actor == "chief"
    signed_in.wait("document.querySelector('#adapter-detail tbody tr:nth-child(3) .badge')")
    assert (
        "rollback" in texts(signed_in, "#adapter-detail article > .scroll:last-child tbody tr:first-child")[0]
    )
    # what was moved meanwhile is not moved back
    served.store.promote("notes@3")
    signed_in.click("[data-key=rollback]")
    answer(signed_in, "yes")
    signed_in.wait("document.querySelector('#status').classList.contains('wrong')")
    assert served.store.show("notes@production").version == 3
    assert [one for one in signed_in.logged if "409" not in one] == []


def test_promote_promotes(signed_in, served):
    served.store.promote("notes@2")
    open_adapter(signed_in, "notes")
    signed_in.click("[data-key='promote 1']")
    answer(signed_in, "yes")
    signed_in.wait("document.querySelector('#status').textContent.includes('points at version 1')")
    assert served.store.show("notes@production").version == 1
    assert signed_in.logged == []


def open_adapter(window, name):
    window.evaluate(
        "document.querySelector('#adapter').value = ''; document.querySelector('#adapter').focus()"
    )
    window.write(name)
    window.press("Enter")
    window.wait(f"document.querySelector('#adapter-name')?.textContent === {name!r}")


def test_an_experiment_is_stopped_and_promoted(signed_in, served):
    signed_in.click("[data-key='tone /stop']")
    answer(signed_in, "yes")
    signed_in.wait("document.querySelector('#experiment-list .badge').textContent === 'stopped'")
    assert served.ask("GET", "/admin/experiments/tone")[1]["state"] == "stopped"
    served.store.promote("notes@2")
    signed_in.click("[data-key='tone /promote bold']")
    answer(signed_in, "yes")
    signed_in.wait("document.querySelector('#experiment-list .badge').textContent === 'promoted'")
    assert served.store.show("notes@production").version == 3
    signed_in.click("[data-key='tone /rollback']")
    answer(signed_in, "yes")
    signed_in.wait("document.querySelector('#experiment-list .badge').textContent === 'rolled back'")
    assert served.store.show("notes@production").version == 2
    assert signed_in.logged == []


def test_what_others_wrote_is_text(signed_in):
    open_adapter(signed_in, "notes")
    assert any(HOSTILE in text for text in texts(signed_in, "#adapter-detail td"))
    assert signed_in.evaluate("window.ran === undefined")
    assert signed_in.evaluate("document.querySelectorAll('main img, main script, main iframe').length") == 0
    signed_in.evaluate(
        "document.querySelector('#adapter').focus(); document.querySelector('#adapter').value = ''"
    )
    signed_in.write(HOSTILE)
    signed_in.press("Enter")
    signed_in.wait("document.querySelector('#adapter-detail [role=alert]')")
    assert signed_in.evaluate("window.ran === undefined")


@pytest.mark.parametrize("width", [1280, 320])
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_read(signed_in, width, dark):
    open_adapter(signed_in, "notes")
    signed_in.resize(width)
    signed_in.dark(dark)
    assert signed_in.evaluate("innerWidth") == width
    assert signed_in.evaluate("document.documentElement.scrollWidth") <= width
    faint = signed_in.evaluate("""[...document.querySelectorAll("main *, header *, #status")].filter((one) =>
        [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
        && one.getBoundingClientRect().width > 1 && !one.closest("noscript, .hidden, option")).map((one) => {
            let under = one;
            while (under && getComputedStyle(under).backgroundColor === "rgba(0, 0, 0, 0)") under = under.parentElement;
            const style = getComputedStyle(one);
            return [one.textContent.slice(0, 30), one.closest("svg") ? style.fill : style.color,
                getComputedStyle(under ?? document.documentElement).backgroundColor]; })""")
    assert len(faint) > 60
    poor = [one for one in faint if contrast(one[1], one[2]) < 4.5]
    assert not poor
    small = signed_in.evaluate("""[...document.querySelectorAll("button, input")].map((one) =>
        (one.closest("label") ?? one)).map((one) => [one.textContent, one.getBoundingClientRect()])
        .filter(([, box]) => box.height > 0 && (box.height < 24 || box.width < 24)).map(([text]) => text)""")
    assert not small


@pytest.mark.parametrize("width", [1280, 320])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_drawn(signed_in, tmp_path, width, dark):
    """What scripts/page_screenshot.py takes a picture of, for people to look at."""
    image = pytest.importorskip("PIL.Image")
    signed_in.resize(width)
    signed_in.dark(dark)
    signed_in.wait("document.querySelector('.plot .line[d^=M]')")
    signed_in.screenshot(tmp_path / "page.png")
    with image.open(tmp_path / "page.png") as picture:
        colours = sorted(picture.convert("RGB").getcolors(1 << 24), reverse=True)
    (most, paper), *others = colours
    assert (sum(paper) < 3 * 128) is dark
    assert len(others) > 20
    # cards, plots and letters
    assert sum(count for count, _ in others) > 0.2 * most


def contrast(one, other):
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(colour):
    red, green, blue = (int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_keyboard_reaches_everything_and_shows_where_it_is(signed_in):
    open_adapter(signed_in, "notes")
    signed_in.evaluate("document.activeElement.blur(); document.querySelector('.skip').focus()")
    reached = []
    for _ in range(signed_in.evaluate(STOPS) + 3):
        signed_in.press("Tab")
        name, visible, outline = signed_in.evaluate(FOCUSED)
        if name == "Skip to the content" or signed_in.evaluate("document.activeElement === document.body"):
            break
        reached.append(name)
        assert visible
        assert outline != "none", name
    order = [one for one in reached if one in {"leave", "pause", "adapter", "rollback", "promote 1"}]
    assert order == ["leave", "pause", "adapter", "rollback", "promote 1"]
    assert sum("Time to first token" in one for one in reached) == 1
    # a dialog takes the focus, keeps it, and gives it back
    signed_in.evaluate("document.querySelector('[data-key=rollback]').focus()")
    signed_in.press("Enter")
    signed_in.wait("document.querySelector('dialog').open")
    for _ in range(4):
        signed_in.press("Tab")
        assert signed_in.evaluate(
            "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        )
    signed_in.press("Escape")
    signed_in.wait("!document.querySelector('dialog').open")
    assert signed_in.evaluate("document.activeElement.dataset.key") == "rollback"


def test_everything_has_a_name_and_tables_have_headers(signed_in):
    open_adapter(signed_in, "notes")
    assert signed_in.evaluate(NAMELESS) == []
    tables = signed_in.evaluate("""[...document.querySelectorAll("table")].map((one) => [
        one.caption.textContent, one.querySelectorAll("thead th[scope=col]").length, one.rows[1]?.cells.length ?? 0,
        one.querySelectorAll("tbody tr > th[scope=row]").length === one.tBodies[0].rows.length])""")
    assert len(tables) == 5
    assert all(caption and columns == cells and rows for caption, columns, cells, rows in tables)
    assert signed_in.evaluate("document.querySelector('#status').getAttribute('role')") == "status"
    assert signed_in.evaluate("document.documentElement.lang") == "en"


def test_focus_stays_when_tables_are_drawn_anew(signed_in, served):
    served.complete("notes@1")
    open_adapter(signed_in, "notes")
    signed_in.evaluate("document.querySelector('[data-key=\"promote 1\"]')?.focus()")
    served.store.note("notes@3", f"noted at {time.time()}")
    signed_in.evaluate("window.before = document.querySelector('#adapter-detail article')")
    signed_in.evaluate("import('/page/app.js').then((app) => app.look(true))")
    signed_in.wait("document.querySelector('#adapter-detail article') !== window.before")
    assert signed_in.evaluate("document.activeElement.dataset.key") == "promote 1"


def test_pause_stops_asking(signed_in):
    # while an answer is on its way
    press = "document.querySelector('#pause').click()"
    signed_in.evaluate(f"import('/page/app.js').then((app) => {{ app.look(); {press}; }})")
    assert signed_in.evaluate("document.querySelector('#pause').getAttribute('aria-pressed')") == "true"
    signed_in.evaluate("new Promise((done) => setTimeout(done, 500))")  # what was on its way arrives
    signed_in.requested.clear()
    signed_in.evaluate("new Promise((done) => setTimeout(done, 2500))")
    assert signed_in.requested == []
    signed_in.click("#pause")
    signed_in.evaluate("new Promise((done) => setTimeout(done, 500))")
    assert signed_in.requested


def test_others_see_only_what_they_used(window, served):
    served.complete("notes")
    enter(window, served, served.ada)
    window.wait("document.querySelector('#tenant-list tbody tr')")
    assert texts(window, "#tenant-list tbody th") == ["ada"]
    assert (
        window.evaluate(
            "[...document.querySelectorAll('main > section')].filter((one) => !one.hidden).length"
        )
        == 1
    )
    for hidden in ("chief", "secret", "tone"):
        assert not window.evaluate(f"document.body.innerHTML.includes({hidden!r})")
    assert not [one for one in window.requested if "/admin/" in one]
    assert window.logged == []
    status, found = served.ask("GET", "/page/live", key=served.ada)
    assert status == 200
    assert set(found) == {"you", "at", "started", "currency", "tenants"}
    assert [one["name"] for one in found["tenants"]] == ["ada"]
    # what it costs is on the page, in the currency of the prices
    (used,) = found["tenants"]
    assert used["cost"] > 0.01
    amount = "document.querySelector('#tenant-list tbody tr').lastChild.textContent.split(' ')"
    window.wait(f"Math.abs({amount}[0] - {used['cost']}) < 0.0051 && {amount}[1] === {found['currency']!r}")
    assert served.ask("GET", "/metrics", key=served.ada)[0] == 403


def test_a_wrong_key_is_said_and_not_kept(window, served):
    enter(window, served, "mod-wrong")
    assert texts(window, "#key-fault") == ["This key is not valid."]
    assert window.evaluate("sessionStorage.length") == 0
    assert window.evaluate("document.activeElement.id") == "key"


def test_signing_out_leaves_nothing(signed_in):
    open_adapter(signed_in, "notes")
    signed_in.click("#leave")
    signed_in.wait("!document.querySelector('#login').hidden")
    assert signed_in.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
    for seen in ("chief", "notes", "tone"):
        assert seen not in signed_in.evaluate("document.body.outerHTML")


def test_no_request_leaves_the_server(signed_in, served):
    signed_in.open(f"{served.address}/")
    signed_in.wait("document.querySelector('#experiment-list article')")
    signed_in.evaluate("new Promise((done) => setTimeout(done, 1500))")
    assert len(signed_in.requested) > 8
    assert all(one.startswith(served.address) for one in signed_in.requested)
    assert not [one for one in signed_in.requested if "mod-" in one]  # a key is in no address


def test_the_policy_lets_nothing_else_run(signed_in):
    signed_in.evaluate(INJECTED)
    signed_in.wait("true")
    assert signed_in.evaluate("window.ran === undefined")
    assert len([one for one in signed_in.logged if "Content Security Policy" in one]) == 2
    served_as = signed_in.evaluate(
        "fetch('/').then((one) => [...one.headers].map(([name, value]) => `${name}: ${value}`))"
    )
    policy = next(one for one in served_as if one.startswith("content-security-policy"))
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


def test_where_there_are_no_keys_nobody_is_asked_for_one(window, tmp_path):
    with site(tmp_path, with_keys=False) as running:
        window.resize(1280)
        window.open(f"{running.address}/")
        window.wait("document.querySelector('#tiles dt')")
        assert texts(window, "#name") == ["local (admin)"]
        assert window.evaluate("document.querySelector('#leave').hidden")
        assert window.logged == []
    window.wait("document.querySelector('#status').textContent.includes('does not answer')")
