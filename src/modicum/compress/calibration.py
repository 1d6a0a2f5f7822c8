"""Text as sequences of tokens of one length: what quantization is calibrated and judged on."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modicum.data import bundled
from modicum.data.language import special_prefix
from modicum.errors import DataError, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

#: characters of a text file that are read, so that a file of any size can be named
_LIMIT = 1 << 25
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


def text_sequences(files: Sequence[Path], tokenizer: Any, count: int, length: int) -> Sequences:
    """`count` sequences of `length` tokens, evenly spread over the text of `files`.

    A file is one text; its tokens begin and end with the tokenizer's marks and texts follow each other. At most
    32 MiB of a file are read.

    Raises:
        DataError: files are missing, unreadable or empty (all of them), or hold too few tokens.
    """
    ids = [token for text in _read(files) for token in _tokens(text, tokenizer)]
    there = len(ids) // length
    names = listing([str(file) for file in files])
    if there < count:
        raise DataError(
            f"{names} {'holds' if len(files) == 1 else 'hold'} {len(ids):,} tokens, which is too short: "
            f"{count:,} sequences of {length:,} tokens take {count * length:,}. Give more text, or take at most "
            f"{there} sequences, or shorter ones"
        )
    return Sequences(_spread(ids, there, count, length), names, len(ids))


def evaluation_sequences(file: Path | None, tokenizer: Any, most: int, length: int) -> Sequences:
    """Up to `most` sequences of `length` tokens of `file`, or of the bundled task's test split; 0 for all.

    Raises:
        DataError: the file is missing or empty, or too short for one sequence.
    """
    if file is None:
        return bundled_sequences("test", tokenizer, most, length)
    ids = [token for text in _read([file]) for token in _tokens(text, tokenizer)]
    return _up_to(ids, str(file), most, length)


def bundled_sequences(split: str, tokenizer: Any, most: int, length: int) -> Sequences:
    """Up to `most` sequences of a split of the task that the package bundles; 0 for all.

    Raises:
        DataError: the tokenizer makes fewer than `length` tokens of it.
    """
    lines = bundled.path(_BUNDLED, split).read_text(encoding="utf-8").splitlines()
    texts = ("".join(json.loads(line).values()) for line in lines)
    ids = [token for text in texts for token in _tokens(text, tokenizer)]
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


def _read(files: Iterable[Path]) -> list[str]:
    texts, faults = [], []
    for file in files:
        try:
            with Path(file).open(encoding="utf-8") as opened:
                text = opened.read(_LIMIT)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
            faults.append(f"{file} cannot be read: {reason}")
            continue
        if not text.strip():
            faults.append(f"{file} holds no text")
        texts.append(text)
    if faults:
        raise DataError("; ".join(faults))
    return texts


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
