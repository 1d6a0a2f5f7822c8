"""How much each user trains, and on which rows: a function of that user's rows, the options and the seed alone.

The rule, the same for users with few and with many rows: a step of a cohort is one step of every user in it that
has not finished, with one batch of that user's own rows. A user makes `epochs` passes over its rows, but at least
`min_steps` and at most `max_steps` steps. So nobody's rows crowd out anybody else's, users with few rows still make
enough steps to learn, and users with many do not hold the machine.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

from modicum.data.sampling import EpochSampler

if TYPE_CHECKING:
    from modicum.fleet.spec import TrainOptions


def steps_of(rows: int, options: TrainOptions) -> int:
    """How many steps a user with so many training rows makes."""
    wanted = math.ceil(options.epochs * math.ceil(rows / options.batch_size))
    wanted = max(wanted, options.min_steps)
    return min(wanted, options.max_steps) if options.max_steps else wanted


@final
class Pace:
    """The batches of one user, in the order in which `modicum tune` would draw them from these rows alone."""

    def __init__(self, rows: int, options: TrainOptions) -> None:
        self.steps = steps_of(rows, options)
        self._rows, self._batch = rows, options.batch_size
        self._per_epoch = math.ceil(rows / options.batch_size)
        self._sampler = EpochSampler(rows, options.seed)
        self._order: list[int] = []
        self._epoch = -1
        parts = options.evaluations
        self._evaluated = {math.ceil(self.steps * part / parts) for part in range(1, parts + 1)}

    def batch(self, step: int) -> list[int]:
        """The rows of step `step`, counted from 0."""
        epoch, at = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            self._sampler.set_epoch(epoch)
            self._order, self._epoch = list(self._sampler), epoch
        return self._order[at * self._batch : (at + 1) * self._batch]

    def is_measured_after(self, steps: int) -> bool:
        """Whether the user is evaluated when it has made so many steps."""
        return steps in self._evaluated
