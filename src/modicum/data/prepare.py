"""From the data section of a recipe to token rows for training, validation and test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.data.files import Rows, has_split, load_rows
from modicum.data.labelled import count_labels, encode_labelled
from modicum.data.language import encode_language
from modicum.errors import DataError

if TYPE_CHECKING:
    from modicum.data.encoded import Encoded
    from modicum.data.options import DataOptions, Split, Task

_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Prepared:
    """Token rows of each split (None where there is none) and the number of classes (None for causal_lm)."""

    train: Encoded | None
    validation: Encoded | None
    test: Encoded | None
    num_labels: int | None

    def describe(self) -> dict[str, dict[str, int]]:
        """Counts of each split, for reports."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: rows.describe() for name, rows in splits.items() if rows is not None}


def prepare(options: DataOptions, tokenizer: Any, task: Task, num_labels: int | None = None) -> Prepared:
    """The token rows of all splits of `options`; classes are counted in the training rows unless given.

    Raises:
        DataError: see `load_rows`, `encode_language`, `encode_labelled`.
    """
    rows = load_splits(options)
    if task == "regression":
        num_labels = 1
    elif task == "seq_cls" and num_labels is None:
        counted = rows.get("train") or next(iter(rows.values()))
        num_labels = count_labels(counted, options)
    encoded = {name: encode(split, options, tokenizer, task, num_labels) for name, split in rows.items()}
    return Prepared(
        encoded.get("train"),
        encoded.get("validation"),
        encoded.get("test"),
        None if task == "causal_lm" else num_labels,
    )


def encode(rows: Rows, options: DataOptions, tokenizer: Any, task: Task, num_labels: int | None) -> Encoded:
    """`rows` as token rows for `task`."""
    if task == "causal_lm":
        return encode_language(rows, options, tokenizer)
    return encode_labelled(rows, options, tokenizer, num_labels, regression=task == "regression")


def load_splits(options: DataOptions) -> dict[Split, Rows]:
    """The rows of every split that `options` name or imply, by split."""
    found: dict[Split, Rows] = {}
    for split in _SPLITS:
        source = getattr(options, split)
        if source is None and split != "train" and options.train and has_split(options.train, split):
            source = options.train
        if source is None:
            continue
        limit = options.max_rows if split == "train" else options.max_eval_rows
        found[split] = load_rows(source, split, options.hub_config).sample(limit, options.seed)
    if not found:
        raise DataError("the data section names no rows; set data.train (or data.test to evaluate)")
    if "train" in found and "validation" not in found and options.validation_fraction:
        found["train"], found["validation"] = _divided(found["train"], options)
    return found


def _divided(rows: Rows, options: DataOptions) -> tuple[Rows, Rows]:
    count = round(len(rows) * options.validation_fraction)
    if not 0 < count < len(rows):
        raise DataError(
            f"data.validation_fraction = {options.validation_fraction} of {len(rows)} rows leaves one side empty"
        )
    order = np.random.default_rng(options.seed).permutation(len(rows)).tolist()
    held_out, kept = sorted(order[:count]), sorted(order[count:])
    return rows.subset(kept), rows.subset(held_out)
