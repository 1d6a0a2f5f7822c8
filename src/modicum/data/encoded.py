"""Token rows in flat arrays, and the collator that pads a batch of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: label value that the loss skips
IGNORED = -100


@dataclass
class EncodedRow:
    """One row as tokens: `trained` says which tokens the loss counts, `target` is a class or a number."""

    ids: list[int]
    trained: list[bool] | None = None
    target: float | None = None
    #: completion as text, for comparing generated text; None when the row has no prompt
    reference: str | None = None
    cut: bool = False


class Encoded(Dataset):
    """A map-style data set of token rows, held in flat arrays (about 5 bytes per token)."""

    def __init__(self, rows: Sequence[EncodedRow], *, class_targets: bool = False) -> None:
        lengths = np.fromiter((len(row.ids) for row in rows), np.int64, len(rows))
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._ids = np.fromiter((i for row in rows for i in row.ids), np.int32, int(lengths.sum()))
        self._trained = None
        self.targets = None
        if rows and rows[0].target is not None:
            dtype = np.int64 if class_targets else np.float32
            self.targets = np.array([row.target for row in rows], dtype=dtype)
        else:
            flat = (t for row in rows for t in (row.trained or [True] * len(row.ids)))
            self._trained = np.fromiter(flat, np.bool_, len(self._ids))
        self.references = [row.reference for row in rows]
        self.cut = sum(row.cut for row in rows)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` and `labels`: per token (causal_lm), or one number."""
        span = slice(self._starts[index], self._starts[index + 1])
        ids = self._ids[span]
        if self.targets is not None:
            return {"input_ids": ids.tolist(), "labels": self.targets[index].item()}
        assert self._trained is not None
        return {"input_ids": ids.tolist(), "labels": np.where(self._trained[span], ids, IGNORED).tolist()}

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of every row."""
        return np.diff(self._starts).tolist()

    @property
    def tokens(self) -> int:
        """Number of tokens of all rows."""
        return len(self._ids)

    @property
    def trained_tokens(self) -> int:
        """Number of tokens that the loss counts."""
        return int(self._trained.sum()) if self._trained is not None else 0

    def prompt(self, index: int) -> list[int]:
        """The tokens before the first trained one: what a completion is generated from."""
        assert self._trained is not None
        span = slice(self._starts[index], self._starts[index + 1])
        trained = np.flatnonzero(self._trained[span])
        return self._ids[span][: trained[0] if len(trained) else None].tolist()

    def describe(self) -> dict[str, int]:
        """Counts of rows, tokens, trained tokens and rows that were cut, for reports."""
        counts = {
            "rows": len(self),
            "tokens": self.tokens,
            "longest": max(self.lengths, default=0),
            "cut": self.cut,
        }
        return counts if self.targets is not None else {**counts, "trained_tokens": self.trained_tokens}


@dataclass
class Collator:
    """Pads a batch to its longest row (or the next multiple), on the right unless `left`."""

    pad_id: int
    multiple: int = 1
    left: bool = False
    dtypes: dict[type, torch.dtype] = field(default_factory=lambda: {int: torch.long, float: torch.float32})

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and, where the rows have them, `labels`."""
        longest = max(len(row["input_ids"]) for row in features)
        width = -(-longest // self.multiple) * self.multiple
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in features], width, self.pad_id),
            # by length, not by comparing with the pad id: that id may also be a token of the text
            "attention_mask": self._pad([[1] * len(row["input_ids"]) for row in features], width, 0),
        }
        if "labels" in features[0]:
            labels = [row["labels"] for row in features]
            is_sequence = isinstance(labels[0], list)
            batch["labels"] = (
                self._pad(labels, width, IGNORED)
                if is_sequence
                else torch.tensor(labels, dtype=self.dtypes[type(labels[0])])
            )
        return batch

    def _pad(self, rows: Sequence[list[int]], width: int, value: int) -> Tensor:
        result = torch.full((len(rows), width), value, dtype=torch.long)
        for index, row in enumerate(rows):
            where = slice(width - len(row), width) if self.left else slice(len(row))
            result[index, where] = torch.tensor(row, dtype=torch.long)
        return result
