"""Small fleets: users with few and many rows, on real models of a few thousand numbers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from tests import models_for_tests, small_checkpoints

from modicum.data.encoded import Encoded, EncodedRow
from modicum.fleet.base import fleet_base, load_fleet_base
from modicum.fleet.spec import make_fleet
from modicum.fleet.training import Learner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from modicum.fleet.base import FleetBase
    from modicum.fleet.spec import FleetSpec

METHODS = {
    "lora_xs": {"name": "lora_xs", "r": 4, "alpha": 8.0},
    "lora": {"name": "lora", "r": 4, "lora_alpha": 8},
}
#: rows of the users of most tests
UNEVEN = (3, 9, 4, 14, 1)


def spec(kind: str = "lora_xs", *, task: str = "causal_lm", **sections: Any) -> FleetSpec:
    """A fleet that learns fast; `sections` go over its sections."""
    values: dict[str, Any] = {
        "model": {"name_or_path": str(small_checkpoints.llama()), "task": task},
        "users": {"source": "users.jsonl", "held_out": 0.0},
        "data": {"max_length": 64},
        "method": METHODS[kind],
        "train": {"epochs": 2, "min_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        "store": {"path": "store", "dtype": "float32"},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return make_fleet(values)


def base(wanted: FleetSpec) -> FleetBase:
    """The base of a fleet on a saved model."""
    return load_fleet_base(wanted)


def base_of(model: Any, wanted: FleetSpec) -> FleetBase:
    """The base of a fleet on a model in memory."""
    return fleet_base(model, small_checkpoints.tokenizer(), wanted)


def texts(rows: int, user: int = 0, *, shortest: int = 3) -> Encoded:
    """Token rows of many lengths, part of them prompts, different for every user."""
    generator = torch.Generator().manual_seed(user)
    found = []
    for row in range(rows):
        length = shortest + (3 * row + user) % 9
        ids = torch.randint(3, models_for_tests.VOCABULARY, (length,), generator=generator).tolist()
        found.append(EncodedRow(ids, [at >= length // 3 for at in range(length)]))
    return Encoded(found)


def learners(counts: Sequence[int] = UNEVEN, *, held_out: int = 0, rank: int = 4) -> list[Learner]:
    """Users with so many rows each."""
    kept = [texts(held_out, 100 + user) if held_out else None for user in range(len(counts))]
    return [Learner(texts(count, user), kept[user], rank=rank) for user, count in enumerate(counts)]


def table(path: Path, counts: Sequence[int] = UNEVEN) -> Path:
    """A table of users u0, u1, … whose prompts and answers differ."""
    rows = [
        {
            "user": f"u{user}",
            "prompt": f"{(row * user) % 7}+{row % 5}=",
            "completion": "xyzw"[user % 4] * (1 + row % 3),
        }
        for user, count in enumerate(counts)
        for row in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
