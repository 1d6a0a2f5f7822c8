"""Rows in the columns that tasks of lm-evaluation-harness read, made from rows in the columns of a data folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.data.checks import Faults, require_columns
from modicum.errors import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from modicum.data.files import Rows

Row = dict[str, Any]
_LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class HarnessSet:
    """How rows become what a task of the library reads.

    `folder`: where the library keeps the task; `columns`: what our rows must have; `convert`: one row;
    `choices`: how many there may be; `marks`: what the text of a column must hold; `subject`: the column by whose
    values the library has one task each, named `task_value`.
    """

    folder: str
    columns: tuple[str, ...]
    convert: Callable[[Row], Row]
    choices: Sequence[int] = range(2, len(_LETTERS) + 1)
    marks: Mapping[str, str] = field(default_factory=dict)
    subject: str | None = None


def converted(source: HarnessSet, rows: Rows, ids: list[str]) -> dict[str, list[Row]]:
    """The rows for the library's tasks, by the name of the task; each keeps its `id`.

    Raises:
        DataError: columns are missing, or rows cannot be used; all of them.
    """
    name = next(key for key, value in SETS.items() if value is source)
    require_columns(rows, source.columns, f"the library's task {name}, which is asked with it")
    faults, found = Faults(rows), {}
    for index, row in enumerate(rows.rows):
        wrong = _faults(row, source)
        if wrong:
            faults.add(index, "; ".join(wrong))
        else:
            key = f"{name}_{row[source.subject]}" if source.subject else name
            found.setdefault(key, []).append({**source.convert(row), "id": ids[index]})
    faults.finish()
    return found


def never_right(source: HarnessSet, rows: Rows) -> list[str]:
    """A note on the places among the choices at which the right one never stands, where there are any."""
    if "label" not in source.columns:
        return []
    labels = {row["label"] for row in rows.rows}
    never = [
        str(place) for place in range(max(len(row["choices"]) for row in rows.rows)) if place not in labels
    ]
    return [f"no item has the label {listing(never)}"] if never else []


def _faults(row: Row, source: HarnessSet) -> list[str]:
    texts = [name for name in source.columns if name not in {"choices", "label"}]
    faults = [f"column {name!r} holds no text" for name in texts if not isinstance(row.get(name), str)]
    faults += [
        f"column {name!r} holds no {mark!r}"
        for name, mark in source.marks.items()
        if mark not in str(row.get(name))
    ]
    if "choices" in source.columns:
        choices, label = row.get("choices"), row.get("label")
        if not isinstance(choices, list) or not all(isinstance(one, str) for one in choices):
            return [*faults, "choices must be a list of texts"]
        if len(choices) not in source.choices:
            few, many = min(source.choices), max(source.choices)
            faults.append(f"{len(choices)} choices, must be {few if few == many else f'{few} to {many}'}")
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            faults.append(f"label = {label!r} must be an index into the {len(choices)} choices")
    return faults


def _lettered(question: str) -> Callable[[Row], Row]:
    """Rows with a question column of that name, choices with letters, and the letter of the right one."""

    def convert(row: Row) -> Row:
        letters = list(_LETTERS[: len(row["choices"])])
        choices = {"text": row["choices"], "label": letters}
        return {question: row["question"], "choices": choices, "answerKey": letters[row["label"]]}

    return convert


def _boolq(row: Row) -> Row:
    answer = row["choices"][row["label"]].lower() in {"true", "yes"}
    # the library puts the question mark itself
    return {"passage": row["passage"], "question": row["question"].removesuffix("?"), "label": int(answer)}


def _hellaswag(row: Row) -> Row:
    """Activity and context apart; the context's last, unfinished sentence is what the library writes large."""
    activity, _, context = row["question"].partition(": ")
    cut = re.fullmatch(r"(.*[.!?\"]) ([a-z][^.!?]*)", context, re.DOTALL)
    before, after = cut.groups() if cut else (context, "")
    return {
        "activity_label": activity,
        "ctx_a": before,
        "ctx_b": after,
        "endings": row["choices"],
        "label": str(row["label"]),
    }


def _piqa(row: Row) -> Row:
    return {
        "goal": row["question"],
        "sol1": row["choices"][0],
        "sol2": row["choices"][1],
        "label": row["label"],
    }


def _social_iqa(row: Row) -> Row:
    """Context and question apart; the library joins them with a blank, so that any blank will do."""
    context, _, question = row["question"].rpartition(" ")
    answers = dict(zip(("answerA", "answerB", "answerC"), row["choices"], strict=True))
    return {"context": context, "question": question, **answers, "label": str(row["label"] + 1)}


def _winogrande(row: Row) -> Row:
    return {
        "sentence": row["question"],
        "option1": row["choices"][0],
        "option2": row["choices"][1],
        "answer": str(row["label"] + 1),
    }


def _mmlu(row: Row) -> Row:
    return {
        "subject": row["subject"],
        "question": row["question"],
        "choices": row["choices"],
        "answer": row["label"],
    }


def _gsm8k(row: Row) -> Row:
    return {"question": row["question"], "answer": row["answer"]}


_CHOICES = ("question", "choices", "label")

#: by the library's name of the task
SETS: dict[str, HarnessSet] = {
    "arc_easy": HarnessSet("arc", _CHOICES, _lettered("question")),
    "arc_challenge": HarnessSet("arc", _CHOICES, _lettered("question")),
    "boolq": HarnessSet("super_glue/boolq", ("passage", *_CHOICES), _boolq, (2,)),
    "hellaswag": HarnessSet("hellaswag", _CHOICES, _hellaswag),
    "piqa": HarnessSet("piqa", _CHOICES, _piqa, (2,)),
    "social_iqa": HarnessSet("siqa", _CHOICES, _social_iqa, (3,), {"question": " "}),
    "winogrande": HarnessSet("winogrande", _CHOICES, _winogrande, (2,), {"question": "_"}),
    "openbookqa": HarnessSet("openbookqa", _CHOICES, _lettered("question_stem")),
    "mmlu": HarnessSet("mmlu/default", ("subject", *_CHOICES), _mmlu, (4,), subject="subject"),
    "gsm8k": HarnessSet("gsm8k", ("question", "answer"), _gsm8k, marks={"answer": "####"}),
}
