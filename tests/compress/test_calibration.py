"""Text as token sequences: spread over the text, marks at its ends, and errors that count tokens."""

from __future__ import annotations

import pytest
import torch
from tests import small_checkpoints as small

from modicum.compress.calibration import (
    bundled_sequences,
    calibration_sequences,
    evaluation_sequences,
)
from modicum.errors import DataError

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(ALPHABET * 4, encoding="utf-8")
    return file


def test_sequences_are_spread_over_the_text(text):
    tokenizer = small.tokenizer()
    found = calibration_sequences([text], tokenizer, 3, 10)
    whole = tokenizer(ALPHABET * 4)["input_ids"] + [2]
    assert found.available == len(whole) == 106
    # ten sequences fit, the three taken are a third of the text apart
    assert found.ids.tolist() == [whole[start : start + 10] for start in (0, 30, 60)]
    assert found.ids.dtype == torch.int64
    assert calibration_sequences([text], tokenizer, 10, 10).ids.flatten().tolist() == whole[:100]


def test_several_files_follow_each_other(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("xyz" * 5, encoding="utf-8")
    found = calibration_sequences([text, other], small.tokenizer(), 1, 123)
    assert found.ids[0, 105:107].tolist() == [2, 1]
    assert found.available == 106 + 17


def test_lines_and_long_texts_lose_nothing(tmp_path):
    lines = "".join(f"line {number} of many\n" for number in range(9000))
    file = tmp_path / "long.txt"
    file.write_text(lines, encoding="utf-8")
    tokenizer = small.tokenizer()
    want = tokenizer(lines, verbose=False)["input_ids"]
    found = calibration_sequences([file], tokenizer, 1, len(want))
    assert found.ids[0].tolist() == want


def test_too_short_a_text_says_how_many_tokens_are_there_and_needed(text):
    with pytest.raises(DataError, match=r"has 106 tokens.*one sequence takes 107"):
        calibration_sequences([text], small.tokenizer(), 4, 107)
    with pytest.raises(DataError, match=r"has 106 tokens.*one sequence takes 107"):
        evaluation_sequences(text, small.tokenizer(), 4, 107)


def test_all_unusable_files_are_named_at_once(text, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    files = [tmp_path / name for name in ("absent.txt", "empty.txt", "bytes.txt")]
    with pytest.raises(DataError) as caught:
        calibration_sequences([text, *files], small.tokenizer(), 1, 5)
    for part in ("absent.txt cannot be read: No such file", "empty.txt holds no text", "no UTF-8 text"):
        assert part in str(caught.value)


def test_evaluation_takes_what_there_is(text):
    tokenizer = small.tokenizer()
    assert evaluation_sequences(text, tokenizer, 64, 50).ids.shape == (2, 50)
    assert evaluation_sequences(text, tokenizer, 1, 50).ids.shape == (1, 50)
    assert evaluation_sequences(text, tokenizer, 0, 20).ids.shape == (5, 20)
    bundled = evaluation_sequences(None, tokenizer, 0, 64)
    assert torch.equal(bundled.ids, bundled_sequences("test", tokenizer, 0, 64).ids)
    assert "bundled task" in bundled.source
    assert len(bundled.ids) > 100


def test_calibration_takes_what_there_is(text):
    tokenizer = small.tokenizer()
    assert calibration_sequences([text], tokenizer, 4, 50).ids.shape == (2, 50)
    assert calibration_sequences([text, text], tokenizer, 64, 50).ids.shape == (4, 50)
    bundled = calibration_sequences([], tokenizer, 5, 20)
    assert torch.equal(bundled.ids, bundled_sequences("train", tokenizer, 5, 20).ids)


def test_data_sets_are_read_by_name(tmp_path):
    """A folder stands for a data set on the hub, which `datasets` reads alike."""
    tokenizer, name = small.tokenizer(), f"hub:{tmp_path}"
    small.write_jsonl(tmp_path / "train.jsonl", [{"text": ALPHABET, "other": "no"} for _ in range(4)])
    (tmp_path / "pairs").mkdir()
    small.write_jsonl(tmp_path / "pairs" / "test.jsonl", [{"question": "abc", "answer": "xyz", "n": 3}] * 900)
    (tmp_path / "same.txt").write_text("\n".join([ALPHABET] * 4))
    found = calibration_sequences([name], tokenizer, 1, 100)
    assert torch.equal(found.ids, calibration_sequences([tmp_path / "same.txt"], tokenizer, 1, 100).ids)
    assert found.source == name
    # evaluation has the test split; columns of text are joined where none is called text
    judged = evaluation_sequences(f"{name}/pairs", tokenizer, 1, 9)
    assert tokenizer.decode(judged.ids[0]) == "<s>abc\nxyz\n"
    assert len(evaluation_sequences(f"{name}/pairs", tokenizer, 60, 100).ids) == 60
    # a large data set is read no further than it takes
    small.write_jsonl(tmp_path / "train.jsonl", [{"text": ALPHABET} for _ in range(900)])
    assert calibration_sequences([name], tokenizer, 2, 10).available < 400
    absent = tmp_path / "absent.txt"
    with pytest.raises(DataError, match=r"absent.*hub:no/such:part cannot be read \(train split of part\)"):
        calibration_sequences([absent, "hub:no/such:part"], tokenizer, 1, 5)
