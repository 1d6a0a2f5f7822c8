"""Some users of a fleet, as lengths of rows and as tokens: what stands for all of them in a plan."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modicum.data.encoded import Encoded, EncodedRow
from modicum.errors import ConfigError, DataError
from modicum.fleet.gather import gather
from modicum.fleet.ledger import Ledger
from modicum.fleet.rates import Rate
from modicum.fleet.rows import divided, prepare_user
from modicum.fleet.training import Learner
from modicum.fleet.work import UserRows
from modicum.models.loading import load_tokenizer
from modicum.store import Store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.fleet.ledger import User
    from modicum.fleet.spec import FleetSpec

#: users whose rows are counted at most; users read in one sample of time at most, and samples at least
_SAMPLE, _TOGETHER, _PARTS = 4096, 64, 8


@dataclass(frozen=True)
class Sample:
    """Some users of a fleet, taken evenly from all of them in the order of cohorts."""

    #: how many users there are
    count: int
    users: list[UserRows]
    #: rows as tokens of those that can train
    learners: list[tuple[UserRows, Learner]]
    #: how long reading them took, by users
    reading: Rate | None = None


def sampled(spec: FleetSpec, limit: int | None = _SAMPLE) -> Sample:
    """Users out of `users.source`, at most `limit` of them.

    Raises:
        DataError: there are no users, or none that could train.
    """
    anew = spec.model_copy(update={"store": spec.store.model_copy(update={"start_from": None})})
    tokenizer = _tokenizer(spec)
    users, learners, took = [], [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger(Path(folder)) as ledger,
        Store(Path(folder) / "store", create=True) as store,
    ):
        gather(anew, ledger, store)
        named = in_order(ledger.users())
        few = len(named) if limit is None else min(limit, len(named))
        chosen = [named[(2 * at + 1) * len(named) // (2 * few)] for at in range(few)]
        together = max(1, min(_TOGETHER, few // _PARTS))
        for at in range(0, few, together):
            began, part = time.perf_counter(), chosen[at : at + together]
            for one in part:
                rank = spec.rank_of(one.rows)
                learner = prepare_user(ledger.rows_of(one), spec, tokenizer, rank).learner
                if learner is None:
                    users.append(UserRows(one.user, rank=rank, order=one.order))
                else:
                    users.append(UserRows.of(one.user, learner, one.order))
                    learners.append((users[-1], learner))
            took.append((len(part), time.perf_counter() - began))
    if not learners:
        raise DataError(f"none of {len(named)} users in {spec.users.source} has rows that can train")
    work, seconds = zip(*took, strict=True)
    return Sample(len(named), users, learners, Rate(work, seconds))


def alike(spec: FleetSpec, rows: int, tokens: int, count: int) -> Sample:
    """Users with so many rows of so many tokens each, for a fleet whose rows there are not yet.

    Raises:
        ConfigError: too few rows to train and to judge by, or rows longer than `data.max_length`.
    """
    parts, faults = divided(rows, spec), []
    if parts is None:
        faults.append(f"rows = {rows}: too few to train on and to judge by (users.held_out, users.test)")
    if tokens > spec.data.max_length:
        faults.append(f"tokens = {tokens} is above data.max_length = {spec.data.max_length}")
    if faults or parts is None:
        raise ConfigError("; ".join(faults))
    words = len(_tokenizer(spec))
    target = 0.0 if spec.model.task == "seq_cls" else None
    generator = torch.Generator().manual_seed(spec.train.seed)
    encoded = {
        name: Encoded(
            [
                EncodedRow(torch.randint(words, (tokens,), generator=generator).tolist(), target=target)
                for _ in chosen
            ],
            class_targets=True,
        )
        for name, chosen in parts.items()
    }
    rank = spec.rank_of(rows)
    learner = Learner(encoded["train"], encoded.get("held_out"), encoded.get("test"), rank)
    found = [UserRows.of(f"user-{at}", learner, (rows, 0, at)) for at in range(min(count, _SAMPLE))]
    return Sample(count, found, [(one, learner) for one in found])


def in_order(users: Sequence[User]) -> list[User]:
    """Those users that a job trains, in the order of its cohorts."""
    return sorted((one for one in users if one.name is not None), key=lambda one: one.order)


def _tokenizer(spec: FleetSpec) -> Any:
    options = spec.model
    return load_tokenizer(
        options.name_or_path, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
