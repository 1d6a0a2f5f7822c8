"""Text is told as it becomes certain, and nothing of a stop string ever is."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from tests.conftest import shared_folder

from modicum.errors import ConfigError
from modicum.models.loading import load_tokenizer
from modicum.serve.engine.interface import Step
from modicum.serve.text import Answer, chat_prompt, text_prompt, token_bytes

TEXT = "Once upon a time, a café in Zürich — 日本語 😀 😀😀 the end.\n\n  Two  blanks, and\ttabs: naïve ﷺ."
OTHER = shared_folder() / "models" / "stories260k"
TOKENIZERS = [
    "embedded",
    pytest.param(
        str(OTHER), marks=pytest.mark.skipif(not OTHER.is_dir(), reason="no model beside the repository")
    ),
]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return load_tokenizer(request.param)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _said(answer: Answer, ids: list[int], finish: str = "length") -> list[str]:
    """What is told with each of the tokens, the last with `finish`."""
    last = len(ids) - 1
    return [answer.push(Step(token, finish=finish if i == last else None)) for i, token in enumerate(ids)]


def test_pieces_are_whole_characters_and_together_the_text(tokenizer):
    answer = Answer(tokenizer)
    pieces = _said(answer, _ids(tokenizer, TEXT))
    assert "".join(pieces) == answer.text == tokenizer.decode(_ids(tokenizer, TEXT)) == TEXT
    assert not any("�" in piece for piece in pieces)
    assert "" in pieces  # bytes of characters that were not whole yet
    assert answer.finish == "length"
    assert answer.push(Step(5)) == ""


def test_a_blank_before_the_first_word_is_told_where_the_prompt_calls_for_it(tokenizer):
    ids = _ids(tokenizer, TEXT)
    for cut in range(1, 40):
        before = tokenizer.decode(ids[:cut])
        if not before.endswith("�"):
            answer = Answer(tokenizer, prompt=ids[:cut])
            _said(answer, ids[cut:])
            assert before + answer.text == TEXT


@pytest.mark.parametrize("end", ["the end", " 😀😀", "\n\n  Two", "é", "tabs", "Once", ".", "no such"])
def test_a_stop_string_cuts_exactly_wherever_tokens_end(tokenizer, end):
    whole = TEXT.partition(end)[0]
    answer = Answer(tokenizer, ["never", end])
    told = ""
    for piece in _said(answer, _ids(tokenizer, TEXT)):
        told += piece
        assert whole.startswith(told)
    assert told == answer.text == whole
    assert answer.finish == ("stop" if end in TEXT else "length")


def test_the_first_of_several_stop_strings_counts(tokenizer):
    answer = Answer(tokenizer, ["time, a café in", "me, a", "e, a", "caf", ""])
    _said(answer, _ids(tokenizer, TEXT))
    assert answer.text == "Once upon a ti"


def test_what_may_begin_a_stop_string_is_held_and_told_when_it_does_not(tokenizer):
    answer = Answer(tokenizer, ["aaab"])
    said = _said(answer, _ids(tokenizer, "aaaaaacaaa"))
    assert "".join(said) == "aaaaaacaaa"
    assert said[-1].endswith("aaa") or answer.text.endswith("aaa")
    held = Answer(tokenizer, ["x stop"])
    ids = _ids(tokenizer, "an x stop and more")
    for token in ids:
        held.push(Step(token))
    assert (held.text, held.finish) == ("an ", "stop")


def test_random_texts_and_stops_agree_with_the_plain_rule(tokenizer):
    chance = random.Random(0)
    for _ in range(60):
        text = "".join(chance.choices("ab é😀.\n", k=25)).strip() or "a"
        stops = [
            "".join(chance.choices("ab é😀.\n", k=chance.randint(1, 4))) for _ in range(chance.randint(0, 3))
        ]
        ids = _ids(tokenizer, text)
        whole = tokenizer.decode(ids)
        # the one that is complete first, the longest of those
        ends = [(whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole]
        answer = Answer(tokenizer, stops)
        assert "".join(_said(answer, ids)) == whole[: min(ends)[1] if ends else None], (text, stops)


def test_an_end_token_has_no_text_and_lets_go_what_was_held(tokenizer):
    answer = Answer(tokenizer, ["day!"])
    ids = _ids(tokenizer, "one day")
    said = [answer.push(Step(token)) for token in ids]
    assert "".join(said) == "one "
    assert answer.push(Step(tokenizer.eos_token_id, logprob=-0.5, finish="stop")) == "day"
    assert (answer.text, answer.finish, answer.tokens) == ("one day", "stop", ())


def test_a_character_that_never_becomes_whole_is_not_waited_for(tokenizer):
    half = [token for token in _ids(tokenizer, "日") if token_bytes(tokenizer, token) == b"\xe6"]
    answer = Answer(tokenizer)
    said = _said(answer, half * 30)
    assert "".join(said[:12])
    assert set(answer.text) == {"�"}


def _tokens(tokenizer, stops=(), text=TEXT, finish="length"):
    answer, told, seen = Answer(tokenizer, stops), [], ""
    ids = _ids(tokenizer, text)
    for i, token in enumerate(ids):
        top = ((token, -0.25), (ids[0], -1.5))
        seen += answer.push(Step(token, -0.25, top, finish if i == len(ids) - 1 else None))
        told += answer.tokens
        # of tokens no more is told than of the text
        assert all(one.offset <= len(seen) for one in told)
    return answer, told


def test_tokens_are_told_with_their_text(tokenizer):
    answer, told = _tokens(tokenizer)
    ids = _ids(tokenizer, TEXT)
    assert len(told) == len(ids)
    assert b"".join(one.bytes for one in told).decode().lstrip() == TEXT
    for one in told:
        if not one.text.startswith("bytes:"):
            assert answer.text[one.offset :].startswith(one.text) or one.offset == 0
        assert (one.logprob, one.top[0].bytes, one.top[1].logprob) == (-0.25, one.bytes, -1.5)
    assert any(one.text.startswith("bytes:\\x") for one in told)


@pytest.mark.parametrize("end", ["the end", "é", "me", "😀😀", "Once", "abs"])
def test_tokens_of_a_stop_string_are_not_told(tokenizer, end):
    answer, told = _tokens(tokenizer, [end])
    assert answer.finish == "stop"
    assert all(one.offset < len(answer.text) for one in told)
    assert b"".join(one.bytes for one in told).decode(errors="replace").lstrip() == answer.text.lstrip()


def test_tokens_are_told_only_where_they_are_asked_for(tokenizer):
    answer = Answer(tokenizer)
    answer.push(Step(_ids(tokenizer, "one")[0]))
    assert answer.tokens == ()


def test_a_token_that_nobody_named_has_no_text():
    tokenizer = load_tokenizer("embedded")
    assert token_bytes(tokenizer, 4_000_000) == b""
    assert token_bytes(tokenizer, tokenizer.eos_token_id) == b"<|eos|>"


def test_a_chat_follows_the_template():
    tokenizer = load_tokenizer("embedded")
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Hum"},
    ]
    text = tokenizer.decode(chat_prompt(tokenizer, messages))
    assert text == "<|system|>Be short.<|user|>Hi<|assistant|>Ho<|eos|><|user|>Hum<|assistant|>"


def test_a_chat_without_a_template_is_lines():
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = None
    found = chat_prompt(
        tokenizer, [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    )
    assert found == text_prompt(tokenizer, "system: Short.\nuser: Hi\nassistant:")


def test_a_chat_that_makes_no_sense_is_refused_all_at_once():
    tokenizer = load_tokenizer("embedded")
    with pytest.raises(ConfigError, match="no messages"):
        chat_prompt(tokenizer, [])
    with pytest.raises(
        ConfigError, match=r"messages\[0\]: no role 'usr' \(did you mean 'user'.*messages\[1\].*no text"
    ):
        chat_prompt(tokenizer, [{"role": "usr", "content": "a"}, {"role": "user", "content": None}])
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="roles must alternate"):
        chat_prompt(tokenizer, [{"role": "user", "content": "a"}])


def test_text_needs_no_torch():
    code = "import sys, modicum.serve.text; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
