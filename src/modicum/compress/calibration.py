"""Text as sequences of tokens of one length: what quantizing and sparsifying are calibrated and judged on.

Text comes from files, from the task that the package bundles, or from a data set: `hub:NAME` or `hub:NAME:CONFIG`,
where the name may also be a folder. A data set's column `text` is read, all its columns of text where it has none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modicum.data import bundled
from modicum.data.language import special_prefix
from modicum.errors import DataError, listing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: characters of a text file that are read, so that a file of any size can be named
_LIMIT = 1 << 25
#: characters of a data set that are read for each token that is wanted; it may be far larger than that
_PER_TOKEN = 16
_HUB = "hub:"
#: characters that are tokenized together
_PIECE = 1 << 16
_BUNDLED = "notes"


@dataclass(frozen=True)
class Sequences:
    """Token sequences and where they come from."""

    #: (sequences, length) int64
    ids: Tensor
    #: the files, or what the package bundles
    source: str
    #: tokens that the text has, used or not
    available: int


def calibration_sequences(files: Sequence[Path | str], tokenizer: Any, most: int, length: int) -> Sequences:
    """Up to `most` sequences of `length` tokens of `files`, or of the bundled task's train split without any.

    They are evenly spread over the text. A file is one text; its tokens begin and end with the tokenizer's marks and
    texts follow each other. At most 32 MiB of a file are read.

    Raises:
        DataError: files are missing, unreadable or empty (all of them), or too short for one sequence.
    """
    if not files:
        return bundled_sequences("train", tokenizer, most, length)
    ids = _ids(files, "train", tokenizer, most * length)
    return _up_to(ids, listing([str(file) for file in files]), most, length)


def evaluation_sequences(file: Path | str | None, tokenizer: Any, most: int, length: int) -> Sequences:
    """Up to `most` sequences of `length` tokens of `file`, or of the bundled task's test split; 0 for all.

    Of a data set, the test split is read.

    Raises:
        DataError: the file is missing or empty, or too short for one sequence.
    """
    if file is None:
        return bundled_sequences("test", tokenizer, most, length)
    ids = _ids([file], "test", tokenizer, most * length)
    return _up_to(ids, str(file), most, length)


def bundled_sequences(split: str, tokenizer: Any, most: int, length: int) -> Sequences:
    """Up to `most` sequences of a split of the task that the package bundles; 0 for all.

    Raises:
        DataError: the tokenizer makes fewer than `length` tokens of it.
    """
    ids = [token for text in bundled.texts(_BUNDLED, split) for token in _tokens(text, tokenizer)]
    return _up_to(ids, f"bundled task {_BUNDLED!r}, {split} split", most, length)


def _up_to(ids: list[int], source: str, most: int, length: int) -> Sequences:
    there = len(ids) // length
    if not there:
        raise DataError(
            f"{source} has {len(ids):,} tokens, which is too short: one sequence takes {length:,}. "
            "Give more text or take shorter sequences"
        )
    return Sequences(_spread(ids, there, min(most, there) or there, length), source, len(ids))


def _spread(ids: list[int], there: int, count: int, length: int) -> Tensor:
    """`count` of the `there` sequences that `ids` can be cut into, at even distances."""
    starts = [index * there // count * length for index in range(count)]
    return torch.tensor([ids[start : start + length] for start in starts])


def _ids(files: Sequence[Path | str], split: str, tokenizer: Any, wanted: int) -> list[int]:
    """The tokens of all files and data sets, one after the other."""
    texts, faults = [], []
    for file in files:
        try:
            name = str(file)
            text = _of_hub(name, split, wanted) if name.startswith(_HUB) else _of_file(Path(file))
        except DataError as error:
            faults.append(str(error))
            continue
        if not text.strip():
            faults.append(f"{file} holds no text")
        texts.append(text)
    if faults:
        raise DataError("; ".join(faults))
    return [token for text in texts for token in _tokens(text, tokenizer)]


def _of_file(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as opened:
            return opened.read(_LIMIT)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(f"{file} cannot be read: {reason}") from error


def _of_hub(name: str, split: str, wanted: int) -> str:
    """Text from the beginning of a data set, enough for `wanted` tokens (0: all that is read of any text)."""
    import datasets

    path, _, config = name.removeprefix(_HUB).partition(":")
    most = min(wanted * _PER_TOKEN, _LIMIT) or _LIMIT
    texts, size = [], 0
    try:
        for row in datasets.load_dataset(path, config or None, split=split, streaming=True):
            columns = [row["text"]] if isinstance(row.get("text"), str) else row.values()
            texts.append("\n".join(value for value in columns if isinstance(value, str)))
            size += len(texts[-1])
            if size >= most:
                break
    except Exception as error:  # the hub client raises many kinds, all of which mean "not to be had"
        raise DataError(
            f"{name} cannot be read ({split} split{f' of {config}' if config else ''}): {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no details'}. Write hub:NAME or hub:NAME:CONFIG, or give "
            "a local file"
        ) from error
    return "\n".join(texts)


def _tokens(text: str, tokenizer: Any) -> list[int]:
    start = special_prefix(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # whole lines, since tokenizers take more than linear time on long texts
    pieces, size = [[]], 0
    for line in text.splitlines(keepends=True):
        if size > _PIECE:
            pieces.append([])
            size = 0
        pieces[-1].append(line)
        size += len(line)
    ids = tokenizer(["".join(piece) for piece in pieces], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return [*start, *itertools.chain.from_iterable(ids), *end]
