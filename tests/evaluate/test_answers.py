"""Answers: found where the protocol looks for them, compared as values."""

from __future__ import annotations

from fractions import Fraction

import pytest

from modicum.errors import ConfigError
from modicum.evaluate import answers
from modicum.evaluate.answers import Found

CLOSING = "The answer is: "


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the correct answer is answer2", "answer2"),
        ("answer3, not answer1", "answer3"),
        ("Answer2", ""),
        ("", ""),
        ("the answer is 2", ""),
    ],
)
def test_the_first_choice_counts(text, found):
    how = "literal" if found else "none"
    assert answers.choice(text, ["answer1", "answer2", "answer3"]) == Found(found, how)


@pytest.mark.parametrize(
    ("text", "stop", "before"),
    [
        ("The answer is: 4 \n\n### Instruction: 5", ["Instruction", "Response"], "The answer is: 4 \n\n###"),
        ("a. b", ["."], "a"),
        ("b or a", ["a", "b"], ""),
        (" as it is ", [], " as it is "),
        ("no stop", ["none"], "no stop"),
    ],
)
def test_answers_end_at_the_first_stop_word(text, stop, before):
    assert answers.before(text, stop) == before


def test_signs_in_choices_are_no_patterns():
    assert answers.choice("a.c abc", ["abc", "a.b"]) == Found("abc", "literal")


@pytest.mark.parametrize(
    ("text", "answer", "how"),
    [
        ("3 + 4 = 7. The answer is: 7", "7", "literal"),
        ("The answer is: 1. No. The answer is: $1,234.50.", "1,234.50", "literal"),
        ("so 3 and 12 eggs", "12", "fallback"),
        ("The answer is: seven of 12", "12", "literal"),
        ("16 eggs. The answer is: none", "16", "fallback"),
        ("no digits", "", "none"),
        ("The answer is: -1/2", "-1/2", "literal"),
        # the phrase stands for itself: with another ending it is not the phrase
        ("2 + 2. The answer is 4", "4", "fallback"),
        ("2 + 2. The answer is:4", "4", "fallback"),
        ("The final answer is: 4", "4", "fallback"),
        ("the answer is: 3, or 4", "4", "fallback"),
        ("The answer is: 1,234,567 in all", "1,234,567", "literal"),
    ],
)
def test_numbers(text, answer, how):
    assert answers.number(text, CLOSING) == Found(answer, how)


@pytest.mark.parametrize(
    ("text", "answer", "how"),
    [
        ("So \\boxed{3}. The answer is: \\frac{1}{2}.\nMore text", "\\frac{1}{2}", "literal"),
        ("So \\boxed{1} and \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}", "fallback"),
        ("an open \\boxed{2", "", "none"),
        ("The answer is: \n", "", "none"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", "fallback"),
    ],
)
def test_expressions(text, answer, how):
    assert answers.expression(text, CLOSING) == Found(answer, how)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1,000", "1000", True),
        ("5.0", "5", True),
        ("1/2", "0.5", True),
        ("$3", "3", True),
        ("7", "8", False),
        ("1/0", "1", False),
        ("x", "x", False),
    ],
)
def test_equal_numbers(a, b, same):
    assert answers.same_number(a, b) is same


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("x+1", "1+x", True),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("(1,2)", "(2,1)", False),
        ("3", "4", False),
        ("\\text{east}", "\\text{east}", True),
    ],
)
def test_equal_expressions(found, wanted, same):
    assert answers.same_expression(found, wanted) is same


def test_numbers_are_exact():
    assert answers.same_number("0.1", str(Fraction(1, 10)))
    assert not answers.same_number("0.1000000000000000001", "0.1")


def test_a_function_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text("def last(text, row):\n    return text[-1:] + row['id']\n")
    assert answers.function("own.py:last", tmp_path)("abc", {"id": "1"}) == "c1"
    with pytest.raises(ConfigError, match="it has last"):
        answers.function("own.py:first", tmp_path)
    for wrong in ("choise", "none.py:last"):
        with pytest.raises(ConfigError, match="write choice, number, math or"):
            answers.function(wrong, tmp_path)
