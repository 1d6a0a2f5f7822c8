"""Training a cohort: every user at its own pace, stopped and judged by its own held-out rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import torch

from modicum.errors import DataError
from modicum.evaluate.metrics import LARGER_IS_BETTER
from modicum.fleet.adamw import rate_at
from modicum.fleet.cohort import Cohort
from modicum.fleet.pace import Pace
from modicum.fleet.passes import passes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from modicum.data.encoded import Encoded
    from modicum.fleet.base import FleetBase
    from modicum.fleet.spec import FleetSpec

    #: is told of steps that were made, or are not made any more, one for each user
    Told = Callable[[int], None]


@dataclass(frozen=True)
class Learner:
    """One user's rows as tokens, and the rank of its adapter."""

    train: Encoded
    held_out: Encoded | None = None
    test: Encoded | None = None
    rank: int = 16
    #: numbers to start from, (P,) of that rank; the method's own start when None
    start: Tensor | None = None


@dataclass
class Learnt:
    """What became of one user in training; metrics by name, None where there are no such rows."""

    steps: int = 0
    #: the step whose numbers were kept
    best_step: int = 0
    before: dict[str, float] | None = None
    held_out: dict[str, float] | None = None
    test_before: dict[str, float] | None = None
    test: dict[str, float] | None = None
    #: loss on the training rows of the first and of the last step
    losses: list[float] = field(default_factory=list)
    diverged: bool = False
    stopped_early: bool = False


@final
class Training:
    """A cohort in training; `run` trains it, then `values` (N, P) are the numbers to keep."""

    def __init__(self, base: FleetBase, spec: FleetSpec, learners: Sequence[Learner], tokens: int) -> None:
        options = spec.train
        self._spec, self._tokens, self._learners = spec, tokens, learners
        self.cohort = Cohort(base, [one.rank for one in learners], weight_decay=options.weight_decay)
        for row, one in zip(self.cohort.values, learners, strict=True):
            if one.start is not None:
                row.copy_(base.spread(one.rank, one.start))
        self.values = self.cohort.values
        self._paces = [Pace(len(one.train), options) for one in learners]
        self.learnt = [Learnt() for _ in learners]
        self._patience = [0] * len(learners)
        self._active = list(range(len(learners)))
        self._train = {slot: one.train for slot, one in enumerate(learners)}
        self._held_out = _present(enumerate(one.held_out for one in learners))

    def run(self, told: Told = lambda _: None) -> list[Learnt]:
        """What became of each user, in their order."""
        tests = _present(enumerate(one.test for one in self._learners))
        for slot, found in self._measured(self._held_out, base_only=True).items():
            self.learnt[slot].before = found
        for slot, found in self._measured(tests, base_only=True).items():
            self.learnt[slot].test_before = found
        if self._held_out:
            # the best numbers so far, beside those in training
            self.values = self.cohort.values.clone()
        while self._active:
            self._step()
            told(len(self._active))
            self._look(told)
        if self._held_out:
            self.cohort.values.copy_(self.values)
            self.values = self.cohort.values
        for slot, found in self._measured(tests).items():
            self.learnt[slot].test = found
        return self.learnt

    def _step(self) -> None:
        """One step of everybody who has not finished."""
        options, peak = self._spec.train, self._spec.learning_rate
        wanted = {slot: self._paces[slot].batch(self.learnt[slot].steps) for slot in self._active}
        lengths = {slot: self._train[slot].lengths for slot in wanted}
        for one in passes(wanted, lambda slot, row: lengths[slot][row], self._tokens):
            rates = [
                rate_at(
                    self.learnt[slot].steps,
                    self._paces[slot].steps,
                    peak,
                    options.scheduler,
                    options.warmup_ratio,
                )
                for slot in one.slots
            ]
            found = self.cohort.step(one, self._train, rates, options.max_grad_norm)
            for slot, loss, norm in zip(one.slots, found.losses, found.norms, strict=True):
                mine = self.learnt[slot]
                mine.steps += 1
                mine.losses = [*mine.losses[:1], loss]
                mine.diverged = not (math.isfinite(loss) and math.isfinite(norm))

    def _look(self, told: Told) -> None:
        """Evaluate those whose turn it is, keep what is best so far, and let go of whoever has finished."""
        due = {
            slot: self._held_out[slot]
            for slot in self._active
            if slot in self._held_out
            and not self.learnt[slot].diverged
            and self._paces[slot].is_measured_after(self.learnt[slot].steps)
        }
        for slot, found in self._measured(due).items():
            mine = self.learnt[slot]
            if is_better(found, mine.held_out, self._spec.metric):
                mine.held_out, mine.best_step = found, mine.steps
                self.values[slot] = self.cohort.values[slot]
                self._patience[slot] = 0
            else:
                self._patience[slot] += 1
        patience, left, spared = self._spec.train.early_stopping_patience, [], 0
        for slot in self._active:
            mine, pace = self.learnt[slot], self._paces[slot]
            mine.stopped_early = bool(patience) and self._patience[slot] >= (patience or 0)
            if mine.steps < pace.steps and not mine.stopped_early and not mine.diverged:
                left.append(slot)
                continue
            if slot not in self._held_out:
                mine.best_step = mine.steps
            spared += pace.steps - mine.steps
        if spared:
            told(spared)
        self._active = left

    def _measured(
        self, data: Mapping[int, Encoded], *, base_only: bool = False
    ) -> dict[int, dict[str, float]]:
        return measured(self.cohort, data, self._tokens, base_only=base_only)


def measured(
    cohort: Cohort, data: Mapping[int, Encoded], tokens: int, *, base_only: bool = False
) -> dict[int, dict[str, float]]:
    """The metrics of each adapter (slot → rows) on its own rows, many adapters in a batch; or of the base model.

    causal_lm: loss and token accuracy over counted tokens. seq_cls: loss and accuracy over rows. `n`: number of rows.
    """
    lengths = {slot: rows.lengths for slot, rows in data.items()}
    sums = {slot: torch.zeros(3, dtype=torch.float64) for slot in data}
    wanted = {slot: range(len(rows)) for slot, rows in data.items()}
    for one in passes(wanted, lambda slot, row: lengths[slot][row], tokens, may_split=True):
        for slot, part in zip(one.slots, cohort.measure(one, data, base_only=base_only), strict=True):
            sums[slot] += torch.tensor(part, dtype=torch.float64)
    name = "token_accuracy" if cohort.base.task == "causal_lm" else "accuracy"
    found = {}
    for slot, (loss, counted, right) in ((slot, total.tolist()) for slot, total in sums.items()):
        if not counted:
            raise DataError("rows to measure on have nothing that the loss counts")
        found[slot] = {"loss": loss / counted, name: right / counted, "n": len(data[slot])}
    return found


def is_better(found: Mapping[str, float], than: Mapping[str, float] | None, metric: str) -> bool:
    """Whether `found` is better than the other metrics; nothing is better than what is not finite."""
    value = found[metric]
    if not math.isfinite(value) or than is None:
        return math.isfinite(value)
    return value > than[metric] if LARGER_IS_BETTER[metric] else value < than[metric]


def _present(items: Iterable[tuple[int, Encoded | None]]) -> dict[int, Encoded]:
    return {slot: rows for slot, rows in items if rows is not None}
