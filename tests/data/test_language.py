"""Rows for language models: what is trained on, what is cut, what is packed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.small_checkpoints import CHAT, CHAT_WITHOUT_MARKS, tokenizer

from modicum.data.encoded import IGNORED, Collator
from modicum.data.files import Rows
from modicum.data.language import encode_language, special_prefix
from modicum.data.options import DataOptions
from modicum.errors import DataError

BEGIN, END = 1, 2


def rows(*items, source="rows.jsonl"):
    return Rows(source, list(items), [(source, n) for n in range(1, len(items) + 1)])


def encode(*items, chat=None, **options):
    return encode_language(rows(*items), DataOptions(**options), tokenizer(chat))


def trained_text(row):
    return tokenizer().decode([i for i in row["labels"] if i != IGNORED])


def pair(prompt="ab=", completion="cd"):
    return {"prompt": prompt, "completion": completion}


def test_only_the_completion_and_the_end_are_trained():
    data = encode(pair())
    row = data[0]
    assert row["input_ids"][0] == BEGIN
    assert row["input_ids"][-1] == END
    assert row["labels"][:4] == [IGNORED] * 4
    assert trained_text(row) == "cd</s>"
    assert data.prompt(0) == row["input_ids"][:4]
    assert data.references == ["cd"]


def test_everything_can_be_trained():
    assert trained_text(encode(pair(), completion_only=False)[0]) == "<s>ab=cd</s>"


def test_templates_build_prompt_and_completion():
    data = encode(
        {"question": "q", "answer": 7}, prompt_template="Q: {question}\nA:", completion_template=" {answer}"
    )
    assert tokenizer().decode(data[0]["input_ids"]) == "<s>Q: q\nA: 7</s>"
    assert data.references == ["7"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 60), st.integers(2, 40))
def test_cutting_never_removes_the_whole_completion(prompt, completion, max_length):
    data = encode(pair("p" * prompt, "c" * completion), max_length=max_length)
    row = data[0]
    assert len(row["input_ids"]) <= max_length
    kept = sum(label != IGNORED for label in row["labels"])
    assert kept >= min(completion + 1, (max_length - 1) - max(max_length - 1, 0) // 4)
    assert kept > 0
    assert data.cut == (prompt + completion + 2 > max_length)
    # the part of the prompt next to the completion is the one that stays
    assert row["input_ids"][0] == BEGIN


def test_long_documents_are_cut_into_pieces_and_nothing_is_lost():
    data = encode({"text": "x" * 25}, {"text": "yy"}, {"text": "  "}, max_length=10)
    assert [len(data[i]["input_ids"]) for i in range(len(data))] == [10, 10, 7, 4]
    assert sum(i not in (BEGIN, END) for n in range(3) for i in data[n]["input_ids"]) == 25


def test_packing_fills_rows_and_separates_documents():
    data = encode({"text": "xxx"}, {"text": "yyyy"}, {"text": "zz"}, max_length=8, packing=True)
    assert [len(data[i]["input_ids"]) for i in range(len(data))] == [8, 7]
    joined = "".join(tokenizer().decode(data[i]["input_ids"]) for i in range(len(data)))
    assert joined == "<s>xxx</s><s>yyyy</s><s>zz</s>"


@pytest.mark.parametrize(
    ("items", "options", "expected"),
    [
        ([{"promt": "a", "completion": "b"}], {}, r"lacks the column 'prompt' \(did you mean 'promt'"),
        ([{"a": 1}], {}, r"has the columns a; needed for causal_lm"),
        (
            [pair(), pair(completion=" "), pair(completion="")],
            {},
            "2 of 3 rows .*rows.jsonl:2: the completion is empty",
        ),
        ([pair(), pair(prompt=3)], {}, r"rows.jsonl:2: column 'prompt' holds 3, must be a string"),
        ([{"text": None}], {}, "holds None, must be a string"),
        ([{"text": " "}], {}, "holds no text at all"),
        ([pair()], {"packing": True}, "packing is for plain text"),
        (
            [{"q": "x"}],
            {"prompt_template": "{question}", "completion_template": "{q}"},
            "lacks the column 'question'",
        ),
        ([{"q": "x"}], {"prompt_template": "{q", "completion_template": "{q}"}, "write {{ and }} for braces"),
        ([{"q": "x"}], {"prompt_template": "{q.y}", "completion_template": "{q}"}, "may name columns only"),
        ([{"q": "x", "a": None}], {"prompt_template": "{q}", "completion_template": "{a}"}, "no value for a"),
    ],
)
def test_unusable_rows(items, options, expected):
    with pytest.raises(DataError, match=expected):
        encode(*items, **options)


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "ok"},
]


def test_all_assistant_turns_are_trained_where_the_template_marks_them():
    assert trained_text(encode({"messages": TALK}, chat=CHAT)[0]) == "yo</s>ok</s>"


def test_the_last_turn_is_trained_where_the_template_marks_none():
    data = encode({"messages": TALK}, chat=CHAT_WITHOUT_MARKS)
    assert trained_text(data[0]) == "ok</s>"
    assert data.references == ["ok"]


@pytest.mark.parametrize("template", [CHAT, CHAT_WITHOUT_MARKS])
@pytest.mark.parametrize("max_length", [4, 9, 20])
def test_cutting_a_chat_keeps_something_of_the_last_turn(template, max_length):
    row = encode({"messages": TALK}, chat=template, max_length=max_length)[0]
    assert len(row["input_ids"]) <= max_length
    assert trained_text(row)[:1] in ("o", "k", "y")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "no list of messages"),
        ([{"role": "user"}], "message 0 lacks role or content"),
        ([{"role": "asistant", "content": ""}], r"did you mean 'assistant'"),
        (TALK[:3], "the last message is by 'user', must be by 'assistant'"),
    ],
)
def test_unusable_chats(messages, expected):
    with pytest.raises(DataError, match=expected):
        encode({"messages": messages}, chat=CHAT)


def test_a_chat_without_a_template_says_what_to_do():
    with pytest.raises(DataError, match=r"has no chat template.*give prompt and completion columns instead"):
        encode({"messages": TALK})


def test_the_begin_mark_is_found():
    assert special_prefix(tokenizer()) == [BEGIN]


@pytest.mark.parametrize("left", [False, True])
def test_batches_are_padded_to_their_longest_row(left):
    data = encode(pair(), pair("longer", "x"))
    batch = Collator(0, multiple=8, left=left)([data[0], data[1]])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (2, 16), "attention_mask": (2, 16), "labels": (2, 16)
    }  # fmt: skip
    for index in range(2):
        inside = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][inside].tolist() == data[index]["input_ids"]
        assert batch["labels"][index][inside].tolist() == data[index]["labels"]
        assert set(batch["labels"][index][~inside].tolist()) == {IGNORED}
