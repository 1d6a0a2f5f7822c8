"""Rows for classification and regression."""

from __future__ import annotations

import pytest
from tests.small_checkpoints import tokenizer

from modicum.data.files import Rows
from modicum.data.labelled import count_labels, encode_labelled
from modicum.data.options import DataOptions
from modicum.errors import DataError


def rows(*items):
    return Rows("rows.csv", list(items), [("rows.csv", n) for n in range(2, len(items) + 2)])


def encode(*items, num_labels=2, regression=False, sep=True, **options):
    return encode_labelled(
        rows(*items), DataOptions(**options), tokenizer(sep=sep), num_labels, regression=regression
    )


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["sentence"], "<s>a"),
        (["text"], "<s>a"),
        (["sentence1", "sentence2"], "<s>a<sep>a"),
        (["premise", "hypothesis"], "<s>a<sep>a"),
        (["question", "sentence"], "<s>a<sep>a"),
        (["question1", "question2"], "<s>a<sep>a"),
    ],
)
def test_usual_columns_are_found(columns, expected):
    data = encode({**dict.fromkeys(columns, "a"), "label": "1", "id": "x"})
    assert tokenizer().decode(data[0]["input_ids"]).replace(" ", "") == expected
    assert data[0]["labels"] == 1


def test_texts_are_parted_by_a_line_where_there_is_no_separator():
    data = encode({"sentence1": "a", "sentence2": "b", "label": 0}, sep=False)
    assert tokenizer().decode(data[0]["input_ids"]) == "<s>a\nb"


def test_columns_can_be_named():
    data = encode({"q": "a", "x": "b", "y": 1}, text_columns=["x"], label_column="y")
    assert tokenizer().decode(data[0]["input_ids"]) == "<s>b"


def test_class_names_can_be_listed():
    options = DataOptions(label_names=["no", "yes"])
    items = rows({"text": "a", "label": "yes"}, {"text": "b", "label": "no"})
    assert count_labels(items, options) == 2
    assert encode_labelled(items, options, tokenizer(), 2, regression=False).targets.tolist() == [1, 0]


def test_classes_are_counted():
    assert count_labels(rows({"text": "a", "label": 4}, {"text": "b", "label": 0}), DataOptions()) == 5
    assert count_labels(rows({"text": "a", "label": 0}), DataOptions()) == 2


def test_regression_takes_numbers():
    data = encode({"text": "a", "label": "2.5"}, num_labels=1, regression=True)
    assert data[0]["labels"] == 2.5
    assert isinstance(data[0]["labels"], float)


def test_long_texts_are_cut():
    data = encode({"text": "a" * 50, "label": 0}, max_length=8)
    assert data.lengths == [8]
    assert data.cut == 1


@pytest.mark.parametrize(
    ("items", "options", "expected"),
    [
        ([{"text": "a"}], {}, "lacks the column 'label' for texts and label; it has text"),
        ([{"text": "a", "lable": 1}], {}, r"'label' \(did you mean 'lable'\?\)"),
        (
            [{"sentense": "a", "label": 1}],
            {},
            r"has the columns sentense, label \(did you mean 'sentense'\?\)",
        ),
        (
            [{"text": "a", "label": 0}, {"text": "a", "label": "yes"}],
            {},
            "rows.csv:3: label 'yes' is not an integer",
        ),
        ([{"text": "a", "label": "yse"}], {"label_names": ["no", "yes"]}, r"'yse' \(did you mean 'yes'\?\)"),
        ([{"text": "a", "label": 0.5}], {}, "label 0.5 is not an integer .*regression"),
        ([{"text": "a", "label": 2}], {}, r"label 2 is not in 0\.\.1"),
        ([{"text": "a", "label": -1}], {}, r"label -1 is not in 0\.\.1"),
        ([{"text": "a", "label": None}], {}, "label None is not an integer"),
        ([{"text": 3, "label": 0}], {}, "column 'text' holds 3"),
        ([{"text": "a", "label": 0}], {"text_columns": ["a", "b", "c"]}, "one or two columns, not 3"),
    ],
)
def test_unusable_rows(items, options, expected):
    with pytest.raises(DataError, match=expected):
        encode(*items, **options)


def test_regression_refuses_what_is_no_number():
    with pytest.raises(DataError, match="label 'x' is not a number"):
        encode({"text": "a", "label": "x"}, num_labels=1, regression=True)
