"""The tasks that ship with the package: small, written by this project, made by a script of its own.

Every task has the splits `train`, `validation` and `test`, JSON lines with a prompt and the completion that
should follow it. This module only knows where the files are and what they are for; it imports no torch.
"""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path

from modicum.errors import DataError, did_you_mean

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class BundledTask:
    """What a bundled task is."""

    name: str
    """Folder and name of the task."""

    summary: str
    """What the model has to do, in one line."""

    rows: dict[str, int]
    """Number of rows of every split."""

    prompt: str = "prompt"
    """Field with the text the model is given."""

    completion: str = "completion"
    """Field with the text the model should go on with; the end-of-text token follows it."""

    parts: tuple[str, ...] = ()
    """Names of the parts of a completion, in order."""

    separator: str = ";"
    """What stands between two parts."""

    metric: str = "exact_match"
    """Share of greedy completions equal to the wanted one, blanks at both ends ignored."""

    max_new_tokens: int = 24
    """Tokens that the longest completion needs with the embedded base model, rounded up."""


TASKS = {
    "notes": BundledTask(
        name="notes",
        summary="A short message about an order becomes a one-line note: kind; number; thing; day.",
        rows={"train": 1600, "validation": 200, "test": 400},
        parts=("kind", "number", "thing", "day"),
    ),
}


def names() -> list[str]:
    """The names of the bundled tasks, sorted."""
    return sorted(TASKS)


def task(name: str) -> BundledTask:
    """The task called `name`.

    Raises:
        DataError: there is no such task.
    """
    if name not in TASKS:
        raise DataError(
            f"no bundled task {name!r}{did_you_mean(name, TASKS)}; there are: {', '.join(names())}"
        )
    return TASKS[name]


def path(name: str, split: str) -> Path:
    """The JSONL file of a split of a bundled task.

    Raises:
        DataError: there is no such task or split.
    """
    found = task(name)
    if split not in SPLITS:
        raise DataError(
            f"task {name!r} has no split {split!r}{did_you_mean(split, SPLITS)}; use one of {SPLITS}"
        )
    return Path(str(importlib.resources.files(__name__))) / found.name / f"{split}.jsonl"


def texts(name: str, split: str) -> list[str]:
    """The rows of a split of a bundled task as plain texts, prompt and completion joined.

    Raises:
        DataError: there is no such task or split.
    """
    lines = path(name, split).read_text(encoding="utf-8").splitlines()
    return ["".join(json.loads(line).values()) for line in lines]
