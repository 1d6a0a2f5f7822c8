"""What a report says about gains, and that names of users cannot break it."""

from __future__ import annotations

import pytest
from tests.fleet import fleets

from modicum.fleet.page import page
from modicum.fleet.report import gains, markdown, tables
from modicum.fleet.sizing import free_bytes, sizes, token_bytes


def user(name: str, gain: float | None, state: str = "stored"):
    before = 5.0
    after = None if gain is None else before - gain
    return {
        "user": name, "state": state, "version": f"{name}@1", "gain": gain, "before": before, "after": after,
        "rows_train": 4,
    }  # fmt: skip


def test_gains_are_counted_over_those_they_are_about():
    people = [user(f"u{at}", at / 100) for at in range(1, 101)]
    people += [user("far", 9.0), user("worse", -3.0), user("own", -0.5, "base"), user("bad", None, "faulty")]
    found = gains(people, "loss")
    kept = found["kept"]
    assert kept["n"] == 102
    assert kept["mean"] == pytest.approx((50.5 + 9 - 3) / 102)
    assert kept["better"] == pytest.approx(101 / 102)
    assert kept["quantiles"]["0.5"] == pytest.approx(0.505)
    assert sum(kept["histogram"]["counts"]) == 102
    assert kept["before"] - kept["after"] == pytest.approx(kept["mean"])
    assert found["served_mean"] == pytest.approx((50.5 + 9 - 3) / 103)
    assert found["base_better"] == ["own"]
    assert [one["user"] for one in found["outliers"]] == ["worse", "far"]


def test_many_outliers_are_cut_in_the_middle():
    people = [user(f"u{at}", 0.0) for at in range(1000)] + [user(f"o{at}", 1.0 + at) for at in range(150)]
    found = gains(people, "loss")
    assert found["outliers_in_all"] == 150
    assert [one["user"] for one in found["outliers"]] == [f"o{at}" for at in (*range(50), *range(100, 150))]


def report(name: str):
    people = [user(name, 9.0), *(user(f"u{at}", 0.1) for at in range(20))]
    return {
        "spec": fleets.spec().model_dump(mode="json"),
        "digest": "0" * 16,
        "device": "cpu",
        "metric": "loss",
        "measured_on": "test",
        "users": {"all": 22, "stored": 21, "base": 0, "diverged": 0, "faulty": 1},
        "gains": gains(people, "loss"),
        "faults": [{"user": name, "rows": 0, "what": "no row\nat all"}],
        "notes": [],
        "unread": {"rows": 1, "first": [f"x.jsonl:3: {name}"]},
        "rows": {"train": 84},
        "timing": {"seconds": 3.0, "adapters_per_hour": 25200.0, "steps": 84, "cohorts": 1},
    }


def test_names_are_text_wherever_they_stand():
    shown = report('<script>alert("x")</script>|y')
    html = page(shown, tables(shown))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "http" not in html
    assert html.count("<rect") == 20
    text = markdown(shown)
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if "alert" in line}
    assert widths == {5, 4, 2}
    assert "no row at all" in text
    assert "test rows, which decided nothing" in text


def test_sizes_are_what_is_asked_for_or_what_fits():
    spec = fleets.spec()
    base = fleets.base(spec)
    sample = fleets.texts(4, 1, shortest=20)
    fits = sizes(base, spec.train, sample, 4)
    assert fits.token_bytes is not None
    assert fits.users >= 1
    assert max(sample.lengths) <= fits.tokens <= free_bytes(base.device) // fits.token_bytes
    given = fleets.spec(train={"tokens_per_pass": 77, "cohort_size": 3}).train
    assert (sizes(base, given, sample, 4).tokens, sizes(base, given, sample, 4).users) == (77, 3)


def test_bytes_of_a_token_are_those_of_a_step():
    spec = fleets.spec()
    base = fleets.base(spec)
    long = {0: fleets.texts(4, 1, shortest=50)}
    # hidden 32, two layers: some thousand numbers that the backward pass needs, and logits of 101 words
    assert 4 * 101 < token_bytes(base, long, 4) < 100_000
