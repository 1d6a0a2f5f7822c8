"""Rows for classification and regression: one or two texts and a label."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from modicum.data.checks import Faults, require_columns, text_of
from modicum.data.encoded import Encoded, EncodedRow
from modicum.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from modicum.data.files import Rows
    from modicum.data.options import DataOptions

#: usual names of the text columns, looked for in this order
USUAL_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("sentence",),
    ("text",),
)


def encode_labelled(
    rows: Rows, options: DataOptions, tokenizer: Any, num_labels: int | None, *, regression: bool
) -> Encoded:
    """`rows` as tokens with a class index below `num_labels`, or a number, each.

    Raises:
        DataError: columns are missing, or labels are no integers, no numbers, or out of range.
    """
    columns = resolve_text_columns(rows, options)
    require_columns(rows, [*columns, options.label_column], "texts and label")
    targets = labels_of(rows, options, num_labels, regression=regression)
    faults = Faults(rows)
    texts = [
        [text_of(row, name, i, faults, empty=True) for name in columns] for i, row in enumerate(rows.rows)
    ]
    faults.finish()
    ids = _ids(texts, tokenizer, options.max_length)
    encoded = [
        EncodedRow(row_ids, target=target, cut=len(row_ids) >= options.max_length)
        for row_ids, target in zip(ids, targets, strict=True)
    ]
    return Encoded(encoded, class_targets=not regression)


def resolve_text_columns(rows: Rows, options: DataOptions) -> list[str]:
    """The text columns: those asked for, or the first usual names that are all present."""
    if options.text_columns is not None:
        if not 1 <= len(options.text_columns) <= 2:
            raise DataError(
                f"data.text_columns must name one or two columns, not {len(options.text_columns)}"
            )
        return list(options.text_columns)
    present = rows.columns
    for names in USUAL_COLUMNS:
        if all(name in present for name in names):
            return list(names)
    usual = "; ".join(" + ".join(names) for names in USUAL_COLUMNS)
    near = next(
        (hint for names in USUAL_COLUMNS for name in names if (hint := did_you_mean(name, present))), ""
    )
    raise DataError(
        f"{rows.source} has the columns {', '.join(present)}{near}, none of the usual text columns ({usual}); "
        "name one or two with data.text_columns"
    )


def labels_of(rows: Rows, options: DataOptions, num_labels: int | None, *, regression: bool) -> list[float]:
    """The labels as numbers; class indices are checked to be integers from 0 to below `num_labels`."""
    require_columns(rows, [options.label_column], "the label")
    names = None if regression else options.label_names
    faults = Faults(rows)
    labels: list[float] = []
    for index, row in enumerate(rows.rows):
        value = row.get(options.label_column)
        label = _number(value) if names is None or value not in names else float(names.index(value))
        if label is None:
            hint = did_you_mean(str(value), names) if names else ""
            kind = (
                "a number"
                if regression
                else "an integer" + (f" or one of {', '.join(names)}" if names else "")
            )
            faults.add(index, f"label {value!r}{hint} is not {kind}")
        elif not regression and not label.is_integer():
            faults.add(index, f"label {value!r} is not an integer (for numbers set model.task to regression)")
        elif not regression and (label < 0 or (num_labels is not None and label >= num_labels)):
            faults.add(index, f"label {value!r} is not in 0..{'' if num_labels is None else num_labels - 1}")
        labels.append(label if label is not None else math.nan)
    faults.finish("" if regression or names else "Class names can be listed in data.label_names")
    return labels


def count_labels(rows: Rows, options: DataOptions) -> int:
    """The number of classes: of `label_names`, or the largest label plus one, at least 2."""
    if options.label_names:
        return len(options.label_names)
    return max(2, int(max(labels_of(rows, options, None, regression=False))) + 1)


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else None


def _ids(texts: list[list[str]], tokenizer: Any, max_length: int) -> list[list[int]]:
    first = [row[0] for row in texts]
    second = [row[1] for row in texts] if len(texts[0]) == 2 else None
    if second is not None and tokenizer.sep_token_id is None:
        # without a separator token the two texts would run into each other
        first, second = [f"{a}\n{b}" for a, b in zip(first, second, strict=True)], None
    return tokenizer(first, second, truncation=True, max_length=max_length, verbose=False)["input_ids"]
