"""Versions compared on the same items: numbers, verdicts, and what is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from tests.evaluate.record_files import records

from modicum.errors import ConfigError, DataError
from modicum.evaluate import statistics as paired
from modicum.evaluate.ab import ALL, compare

RANDOM = np.random.default_rng(0)
#: 30 items only the first has right, 10 only the second
FIRST = [1.0] * 30 + [0.0] * 10 + [1.0] * 100 + [0.0] * 60
SECOND = [0.0] * 30 + [1.0] * 10 + [1.0] * 100 + [0.0] * 60


@pytest.fixture
def save(tmp_path):
    def write(name, made):
        path = tmp_path / f"{name}.parquet"
        made.write(path)
        return path

    return write


def test_zeros_and_ones(save):
    # items are matched by their id, not by their place
    a, b = save("a", records(FIRST)), save("b", records(SECOND, backwards=True))
    (row,) = compare([a, b]).overall
    assert (row.first, row.second, row.task, row.n) == ("a", "b", "x", 200)
    assert (row.first_value, row.second_value) == (0.65, 0.55)
    assert (row.effect["wins"], row.effect["losses"], row.effect["odds"]) == (30, 10, 3.0)
    assert row.effect["cohens_h"] == pytest.approx(paired.cohens_h(0.65, 0.55))
    assert row.difference == paired.score_interval(30, 10, 200)
    assert (row.test, row.p, row.p_corrected) == ("McNemar", paired.mcnemar(30, 10), paired.mcnemar(30, 10))
    assert row.detectable == pytest.approx(paired.detectable_paired(200, 0.2))
    assert row.needed == paired.items_needed_paired(0.1, 0.2)
    assert row.better == "a"
    assert row.sentence.startswith("a is better than b with 200 items (a 65.0 %, b 55.0 %, +10.0 points [")
    (row,) = compare([b, a]).overall
    assert (row.better, row.difference.value) == ("a", pytest.approx(-0.1))
    assert row.sentence.startswith("a is better than b")


def test_too_few_items_say_how_many_it_takes(save):
    a, b = save("a", records(FIRST[:8] + FIRST[32:])), save("b", records(SECOND[:8] + SECOND[32:]))
    (row,) = compare([a, b]).overall
    assert row.better is None
    a = save("a", records([*FIRST[:11], *FIRST[30:]]))
    b = save("b", records([*SECOND[:11], *SECOND[30:]]))
    (row,) = compare([a, b]).overall
    assert (row.effect["wins"], row.effect["losses"], row.better) == (11, 10, None)
    needed = paired.items_needed_paired(1 / 181, 21 / 181)
    assert needed > 20_000
    assert f"not distinguishable with 181 items; you would need about {needed:,} (" in row.sentence


def test_the_same_outcomes(save):
    a, b = save("a", records(FIRST)), save("b", records(FIRST))
    (row,) = compare([a, b]).overall
    assert (row.p, row.needed, row.better) == (1.0, None, None)
    assert "come out even" in row.sentence
    assert row.difference.high > 0.01
    (row,) = compare(
        [save("c", records(FIRST, [2.0] * 200)), save("d", records(FIRST, [2.0] * 200))], metric="loss"
    ).overall
    assert (row.p, row.needed, row.better, row.detectable) == (1.0, None, None, None)


def test_losses_are_per_token(save):
    tokens = RANDOM.integers(2, 20, 60).tolist()
    base = (RANDOM.normal(2, 0.3, 60) * tokens).tolist()
    worse = (np.array(base) + RANDOM.normal(0.1, 0.1, 60) * tokens).tolist()
    a, b = save("a", records([None] * 60, base, tokens)), save("b", records([None] * 60, worse, tokens))
    (row,) = compare([a, b]).overall
    gap = (sum(base) - sum(worse)) / sum(tokens)
    assert (row.test, row.better) == ("permutation", "a")
    assert row.difference.value == pytest.approx(gap)
    assert row.first_value == pytest.approx(sum(base) / sum(tokens))
    assert row.p == paired.permutation(np.array(base) - np.array(worse))
    d = np.array(base) - np.array(worse)
    assert row.needed == paired.items_needed(gap, paired.spread(d, tokens))
    (ratio,) = compare([a, b], metric="perplexity").overall
    assert ratio.first_value == pytest.approx(math.exp(sum(base) / sum(tokens)))
    assert ratio.difference.value == pytest.approx(math.exp(gap))
    assert ratio.difference.low == pytest.approx(math.exp(row.difference.low))
    assert ratio.detectable == pytest.approx(math.exp(row.detectable))
    assert (ratio.p, ratio.better, ratio.needed) == (row.p, "a", row.needed)


def test_shares_are_no_zeros_and_ones(save):
    a, b = RANDOM.uniform(0.3, 1, 40), RANDOM.uniform(0, 0.7, 40)
    (row,) = compare([save("a", records(a)), save("b", records(b))]).overall
    assert (row.test, row.difference.method, row.better) == ("permutation", "bootstrap", "a")
    assert row.effect == {"d_z": pytest.approx(paired.cohens_d(a - b))}


def test_several_versions_are_corrected(save):
    third = [1.0] * 20 + FIRST[20:]
    third[40:48] = [0.0] * 8
    paths = [save(name, records(made)) for name, made in (("a", FIRST), ("b", SECOND), ("c", third))]
    found = compare(paths)
    assert [(row.first, row.second) for row in found.overall] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [row.p_corrected for row in found.overall] == paired.holm([row.p for row in found.overall])
    # eight against none is beyond 5 % alone, and all three rows pay for being three
    a_c = found.overall[1]
    assert a_c.p == pytest.approx(2 / 2**8)
    assert a_c.p_corrected > a_c.p
    assert a_c.needed == paired.items_needed_paired(0.04, 0.04, alpha=0.05 / 3)
    four = [1.0] * 6
    few = [save(f"f{i}", records([0.0] * i + four[i:] + [1.0] * 20)) for i in (0, 6)]
    (alone,) = compare(few).overall
    assert alone.better == "f0"
    among = compare([*few, save("f6b", records([0.0] * 6 + [1.0] * 20))]).overall
    assert {row.better for row in among} == {None}


def test_folders_are_compared_task_by_task_and_together(tmp_path):
    for name, x, y in (("a", FIRST, [1.0] * 9 + [0.0]), ("b", SECOND, [0.0] + [1.0] * 8 + [0.0])):
        records(x).write(tmp_path / name / "x.parquet")
        records(y, task="y").write(tmp_path / name / "deep" / "y.parquet")
        records([None] * 3, [1.0] * 3, task="text").write(tmp_path / name / "text.parquet")
    found = compare([tmp_path / "a", tmp_path / "b"], metric="correct")
    (row,) = found.overall
    assert (row.task, row.n, row.effect["wins"]) == (ALL, 210, 31)
    assert {(row.task, row.n, row.effect["wins"]) for row in found.tasks} == {("x", 200, 30), ("y", 10, 1)}
    assert [row.p_corrected for row in found.tasks] == paired.holm([row.p for row in found.tasks])
    assert any("left out" in note and "text" in note for note in found.notes)
    assert not compare([tmp_path / "a" / "x.parquet", tmp_path / "b" / "x.parquet"]).tasks


def test_slices(save):
    kinds = [{"subject": "art" if i < 45 else "law"} for i in range(199)] + [{}]
    a, b = save("a", records(FIRST, slices=kinds)), save("b", records(SECOND, slices=kinds))
    art, law = compare([a, b], slice_by="subject").slices
    assert (art.slice, art.n, art.effect["wins"], art.better) == ("subject = art", 45, 30, "a")
    assert (law.slice, law.n, law.effect["wins"], law.better) == ("subject = law", 154, 0, None)
    assert law.sentence.startswith("subject = law: a and b are not")
    assert art.p_corrected == pytest.approx(2 * art.p)
    with pytest.raises(ConfigError, match=r"no slice 'subjects' \(did you mean 'subject'\?\)"):
        compare([a, b], slice_by="subjects")


def test_incomplete_records_are_noted(save):
    made = records(FIRST, items="0" * 32)
    notes = compare([save("a", made), save("b", records(SECOND, items="0" * 32))]).notes
    assert "a, x: the evaluation is not complete, 200 items are recorded" in notes


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"protocol": "other"}, "protocol differs"),
        ({"template": "00" * 16}, "template differs"),
        ({"decoding": {"num_beams": 4}}, "decoding differs"),
        ({"task": "y"}, "only a has the tasks x, b does not; only b has the tasks y, a does not"),
    ],
)
def test_other_conditions_are_refused(save, options, told):
    a, b = save("a", records(FIRST)), save("b", records(SECOND, **options))
    with pytest.raises(DataError, match=told):
        compare([a, b])


def test_other_items_are_refused_with_everything_else(save):
    a, b = save("a", records(FIRST)), save("b", records(SECOND[:-1], protocol="other"))
    with pytest.raises(DataError) as refused:
        compare([a, b, save("c", records(SECOND))])
    assert "a and b, x: protocol differs: 'choices' and 'other'" in str(refused.value)
    assert "items differ: 1 only in the first" in str(refused.value)
    assert "a and c" not in str(refused.value)


def test_other_tokens_are_refused(save):
    a, b = (save(name, records([None] * 5, [1.0] * 5, n)) for name, n in (("a", 4), ("b", 5)))
    with pytest.raises(DataError, match="count other tokens on 5 items"):
        compare([a, b])
    none = save("c", records([None] * 5, [0.0] * 5, 0))
    with pytest.raises(DataError, match="no item has a scored token"):
        compare([none, save("d", records([None] * 5, [0.0] * 5, 0))])


def test_missing_outcomes_are_refused(save):
    a, b = save("a", records(FIRST)), save("b", records([None, *SECOND[1:]]))
    with pytest.raises(DataError, match="1 items of b have no correct"):
        compare([a, b], metric="correct")
    with pytest.raises(DataError, match="the records hold no loss"):
        compare([a, b])


def test_bad_options(save, tmp_path):
    a = save("a", records(FIRST))
    with pytest.raises(
        ConfigError, match=re.escape("metric = 'los' (did you mean 'loss'?)") + ".*alpha = 2.*one version"
    ):
        compare([a, a], metric="los", alpha=2)
    with pytest.raises(DataError, match="no records"):
        compare([a, tmp_path / "nothing.parquet"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no records in the folder"):
        compare([a, tmp_path / "empty"])
    save("folder/one", records(FIRST))
    save("folder/two", records(FIRST))
    with pytest.raises(DataError, match=r"holds the task x twice: .*one.parquet and .*two.parquet"):
        compare([a, tmp_path / "folder"])
    with pytest.raises(DataError, match="holds no items"):
        compare([a, save("none", records([]))])


def test_versions_of_one_name_go_by_their_paths(tmp_path):
    for name, made in (("a", FIRST), ("b", SECOND)):
        records(made).write(tmp_path / name / "x.parquet")
    found = compare([tmp_path / name / "x.parquet" for name in "ab"])
    assert list(found.versions) == [str(tmp_path / name / "x.parquet") for name in "ab"]
