"""One user's rows as tokens: what is kept to judge by, and what is wrong with them, in words."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.data.prepare import encode
from modicum.errors import DataError, listing
from modicum.fleet.training import Learner

if TYPE_CHECKING:
    from modicum.data.encoded import Encoded
    from modicum.data.files import Rows
    from modicum.fleet.spec import FleetSpec


@dataclass(frozen=True)
class Prepared:
    """One user ready to train, or why not."""

    learner: Learner | None
    fault: str | None = None
    #: what is worth knowing although training goes on
    notes: list[str] = field(default_factory=list)
    #: rows given, usable, and in each part
    counts: dict[str, int] = field(default_factory=dict)
    data_digest: str | None = None


def prepare_user(rows: Rows, spec: FleetSpec, tokenizer: Any, rank: int) -> Prepared:
    """The user whose `rows` these are: rows that cannot be used are left out and named, the others divided.

    Held-out rows are the first of a permutation by `data.seed`, those for the test follow, and the rest trains; a
    part that is asked for has one row at least.
    """
    usable, faults = _usable(rows, spec, tokenizer)
    counts = {"given": len(rows), "usable": len(usable)}
    notes = [f"{len(faults)} of {len(rows)} rows left out: {listing(faults, 3)}"] if faults else []
    parts = divided(len(usable), spec)
    if parts is None:
        least = 1 + bool(spec.users.held_out) + bool(spec.users.test)
        what = "no row" if not len(usable) else f"{len(usable)} row" + ("s" if len(usable) > 1 else "")
        kept = f"; {least} are needed, to train on and to judge by" if least > 1 else ""
        return Prepared(None, f"{what} that can be used{kept}", notes, counts)
    try:
        encoded = {
            name: encode(usable.subset(chosen), spec.data, tokenizer, spec.model.task, spec.num_labels)
            for name, chosen in parts.items()
        }
    except DataError as error:
        return Prepared(None, str(error), notes, counts)
    counts |= {name: len(part) for name, part in encoded.items()}
    silent = [name for name, part in encoded.items() if not _counted(part)]
    if silent:
        return Prepared(None, f"nothing the loss counts is left in {', '.join(silent)}", notes, counts)
    notes += _lengths(usable, encoded, spec) + _labels(encoded)
    learner = Learner(encoded["train"], encoded.get("held_out"), encoded.get("test"), rank)
    return Prepared(learner, None, notes, counts, data_digest(usable, spec))


def data_digest(rows: Rows, spec: FleetSpec) -> str:
    """32 hex digits over what a user's rows are and how they are read."""
    options = spec.data.model_dump(mode="json"), spec.users.held_out, spec.users.test
    digest = hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=16)
    for row in rows.rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _usable(rows: Rows, spec: FleetSpec, tokenizer: Any) -> tuple[Rows, list[str]]:
    """The rows that become tokens, and what is wrong with the others."""
    faults: dict[int, str] = {
        index: f"{rows.where(index)}: empty"
        for index in range(len(rows))
        if _is_empty(rows.rows[index], spec)
    }
    left = [index for index in range(len(rows)) if index not in faults]
    try:
        if left:
            encode(rows.subset(left), spec.data, tokenizer, spec.model.task, spec.num_labels)
    except DataError:
        for index in left:
            try:
                encode(rows.subset([index]), spec.data, tokenizer, spec.model.task, spec.num_labels)
            except DataError as error:
                said = str(error).rpartition("cannot be used: ")[2]
                place = rows.where(index)
                faults[index] = said if place in said else f"{place}: {said}"
    usable = rows.subset([index for index in range(len(rows)) if index not in faults])
    return usable, [faults[index] for index in sorted(faults)]


def _is_empty(row: dict[str, Any], spec: FleetSpec) -> bool:
    """Whether all texts of a row are blank; such rows would be left out without a word."""
    data = spec.data
    others = (data.prompt_column, data.completion_column, data.messages_column)
    if data.format == "text" or (data.text_column in row and not any(name in row for name in others)):
        names = [data.text_column]
    else:
        names = [name for name in row if name != spec.users.column]
    found = [row.get(name) for name in names]
    return all(value is None or (isinstance(value, str) and not value.strip()) for value in found)


def divided(count: int, spec: FleetSpec) -> dict[str, list[int]] | None:
    """The indices of each part, None where there are too few rows."""
    shares = {"held_out": spec.users.held_out, "test": spec.users.test}
    wanted = {name: max(1, round(count * share)) for name, share in shares.items() if share}
    if count <= len(wanted):
        return None
    # rounding may leave nothing to train on
    while sum(wanted.values()) >= count:
        wanted[max(wanted, key=wanted.__getitem__)] -= 1
    order = np.random.default_rng(spec.data.seed).permutation(count).tolist()
    parts, at = {}, 0
    for name, size in wanted.items():
        parts[name] = sorted(order[at : at + size])
        at += size
    return {"train": sorted(order[at:]), **parts}


def _counted(part: Encoded) -> bool:
    """Whether the loss counts anything; the first token of a row is predicted from nothing, and is not."""
    if part.targets is not None:
        return True
    return any(label != -100 for index in range(len(part)) for label in part[index]["labels"][1:])


def _lengths(usable: Rows, encoded: dict[str, Encoded], spec: FleetSpec) -> list[str]:
    cut = sum(part.cut for part in encoded.values())
    pieces = sum(len(part) for part in encoded.values())
    width = spec.data.max_length
    if cut:
        return [f"{cut} rows are longer than {width} tokens and were cut"]
    if pieces > len(usable) and not spec.data.packing:
        return [f"texts longer than {width} tokens were divided: {len(usable)} rows became {pieces}"]
    return []


def _labels(encoded: dict[str, Encoded]) -> list[str]:
    """Labels that are judged by and were never seen in training."""
    targets = {name: part.targets for name, part in encoded.items() if part.targets is not None}
    if "train" not in targets:
        return []
    seen = set(targets["train"].tolist())
    others = Counter(label for name, found in targets.items() if name != "train" for label in found.tolist())
    unseen = sorted(label for label in others if label not in seen)
    if not unseen:
        return []
    rows = sum(others[label] for label in unseen)
    return [f"{rows} held-out rows have labels that no training row has: {listing([str(x) for x in unseen])}"]
