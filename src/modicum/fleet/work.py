"""How much a fleet computes: passes and tokens, counted on the lengths of rows, without a model.

What paces users and cuts passes in training says here what it would do, so counts are those of the job, pass by pass.
Who will stop early is not known before: nobody does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from modicum.fleet.pace import Pace
from modicum.fleet.passes import passes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from modicum.fleet.passes import Pass
    from modicum.fleet.spec import TrainOptions
    from modicum.fleet.training import Learner

    Lengths = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class UserRows:
    """One user's rows as lengths in tokens, by what they are for; without rows to train on, a user at fault."""

    user: str
    train: tuple[int, ...] = ()
    held_out: tuple[int, ...] = ()
    test: tuple[int, ...] = ()
    rank: int = 16
    #: what cohorts are sorted by: rows, characters and number as gathered
    order: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def of(cls, user: str, learner: Learner, order: tuple[int, int, int] = (0, 0, 0)) -> UserRows:
        """The rows of a user who can train."""
        parts = {
            name: tuple(part.lengths) if part is not None else ()
            for name, part in (
                ("train", learner.train),
                ("held_out", learner.held_out),
                ("test", learner.test),
            )
        }
        return cls(user, **parts, rank=learner.rank, order=order)

    @property
    def rows(self) -> int:
        """How many rows there are in all."""
        return len(self.train) + len(self.held_out) + len(self.test)

    @property
    def tokens(self) -> int:
        """How many tokens they have, each row counted once."""
        return sum(self.train) + sum(self.held_out) + sum(self.test)


@dataclass(frozen=True)
class Work:
    """What is computed; padding counts as tokens."""

    #: users that train, and their steps
    users: int = 0
    steps: int = 0
    #: forward and backward
    passes: int = 0
    tokens: int = 0
    #: forward only: rows to judge by, of the base model and of adapters
    looks: int = 0
    look_tokens: int = 0

    @property
    def all_tokens(self) -> int:
        """Tokens of both kinds of passes."""
        return self.tokens + self.look_tokens

    def __add__(self, other: Work) -> Work:
        return self._each(lambda name: getattr(self, name) + getattr(other, name))

    def times(self, factor: float) -> Work:
        """So many times as much, rounded."""
        return self._each(lambda name: round(getattr(self, name) * factor))

    def _each(self, value: Any) -> Work:
        return Work(**{one.name: value(one.name) for one in fields(self)})


def cohorts_of(users: Iterable[UserRows], size: int) -> list[list[UserRows]]:
    """The cohorts that a job makes of `users`: those with as many rows, and rows as long, together."""
    ordered = sorted(users, key=lambda one: one.order)
    return [ordered[at : at + size] for at in range(0, len(ordered), size)]


def work_of(users: Sequence[UserRows], options: TrainOptions, tokens: int, *, multiple: int = 1) -> Work:
    """What one cohort computes with passes of at most `tokens` tokens.

    `multiple`: rows are padded to a multiple of so many tokens, 8 on GPUs.
    """
    able = [one for one in users if one.train]
    paces = [Pace(len(one.train), options) for one in able]
    train = {slot: one.train for slot, one in enumerate(able)}
    held_out = {slot: one.held_out for slot, one in enumerate(able) if one.held_out}
    test = {slot: one.test for slot, one in enumerate(able) if one.test}

    def looked(data: Lengths) -> Work:
        wanted = {slot: range(len(rows)) for slot, rows in data.items()}
        cut = list(passes(wanted, lambda slot, row: data[slot][row], tokens, may_split=True))
        return Work(looks=len(cut), look_tokens=sum(padded(one, data, multiple) for one in cut))

    # the base model on what is judged by, and at the end the adapters on what decides nothing
    found = Work(users=len(able)) + looked(held_out) + looked(test).times(2)
    active, step = list(train), 0
    while active:
        wanted = {slot: paces[slot].batch(step) for slot in active}
        cut = list(passes(wanted, lambda slot, row: train[slot][row], tokens))
        step += 1
        due = {
            slot: held_out[slot]
            for slot in active
            if slot in held_out and paces[slot].is_measured_after(step)
        }
        taken = sum(padded(one, train, multiple) for one in cut)
        found += Work(steps=len(active), passes=len(cut), tokens=taken) + looked(due)
        active = [slot for slot in active if step < paces[slot].steps]
    return found


def padded(one: Pass, lengths: Lengths, multiple: int = 1) -> int:
    """Tokens of a pass, padding to its longest row, and that to a `multiple`, counted."""
    longest = max(lengths[slot][row] for slot, rows in zip(one.slots, one.rows, strict=True) for row in rows)
    return sum(one.counts) * -(-longest // multiple) * multiple
