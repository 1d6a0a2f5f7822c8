"""How the next sub-network to evaluate is chosen.

    heuristic   entry (n − 1) // 2 of every group's n choices, nothing else
    hill        from the heuristic to whichever neighbour is better, the incumbent stays otherwise
    random      uniform among those within the budgets that shapes tell
    nsga2       Deb et al. 2002, as Optuna has it; points over a budget lose against all others

Sources: hill-climbing from the heuristic as in Shears, arXiv 2404.10934; NSGA-II as in LoNAS.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from modicum.search.options import SearchOptions
    from modicum.search.space import Choices
    from modicum.search.study import Found, Point, Study

    Evaluate = Callable[[Choices], Found]

#: draws of the random strategy before it makes them smaller until they keep the budgets, or gives up
_DRAWS = 200


@final
class Explorer:
    """Evaluates sub-networks until the study has as many as wanted."""

    def __init__(
        self,
        study: Study,
        options: SearchOptions,
        evaluate: Evaluate,
        violations: Callable[[Choices], Mapping[str, float]],
        *,
        maximized: Mapping[str, bool],
        tell: Callable[[Point], None] = lambda _: None,
        worker: int = 0,
    ) -> None:
        """`evaluate(choices)` gives values and violated budgets, `violations(choices)` those that shapes tell."""
        self.study, self.options, self._evaluate, self._violations = study, options, evaluate, violations
        self._first = next(iter(maximized.items()))
        self._tell = tell
        self._generator = torch.Generator().manual_seed(options.seed * 1000 + worker)
        self._known = {_key(point.choices): point for point in study.points()}

    def run(self) -> None:
        """Go on until the strategy is done or `trials` sub-networks are evaluated."""
        if self.options.strategy == "heuristic":
            self._visit(self.study.space.heuristic())
        elif self.options.strategy == "hill":
            self._climb()
        elif self.options.strategy == "random":
            while self._left() and (drawn := self._drawn()) is not None:
                self._visit(drawn)
        else:
            while self._left():
                self._evolve()

    def _left(self) -> int:
        """How many sub-networks are still to be evaluated; other processes may have done more than their share."""
        points = self.study.points()
        self._known |= {_key(point.choices): point for point in points}
        return max(0, self.options.trials - len(points))

    def _climb(self) -> None:
        incumbent = self._visit(self.study.space.heuristic())
        improved = True
        while improved:
            improved = False
            neighbours = list(self.study.space.neighbours(incumbent.choices))
            for index in torch.randperm(len(neighbours), generator=self._generator).tolist():
                over = sum(self._violations(neighbours[index]).values())
                if over > sum(incumbent.violations.values()):
                    continue  # no metric makes up for a budget
                if not self._left() and _key(neighbours[index]) not in self._known:
                    return
                point = self._visit(neighbours[index])
                if self._rank(point) > self._rank(incumbent):
                    incumbent, improved = point, True
                    break

    def _rank(self, point: Point) -> tuple[float, float]:
        """Budgets first, then the metric."""
        name, larger = self._first
        value = point.values[name]
        return -sum(point.violations.values()), value if larger else -value

    def _drawn(self) -> Choices | None:
        """A random sub-network that is new and keeps the budgets that shapes tell, None where none can be found."""
        space = self.study.space
        for _ in range(_DRAWS):
            choices = space.sample(self._generator)
            if _key(choices) not in self._known and not self._violations(choices):
                return choices
        # few keep them: one step less in random groups until this one does; the smallest one does for sure
        for _ in range(_DRAWS):
            choices = space.sample(self._generator)
            while self._violations(choices):
                larger = [name for name, group in space.groups.items() if choices[name] != group.choices[-1]]
                name = larger[int(torch.randint(len(larger), (), generator=self._generator))]
                steps = space.groups[name].choices
                choices[name] = steps[steps.index(choices[name]) + 1]
            if _key(choices) not in self._known:
                return choices
        return None

    def _visit(self, choices: Choices) -> Point:
        """The point of `choices`; one that is known is not evaluated again."""
        if _key(choices) in self._known:
            return self._known[_key(choices)]
        began = time.monotonic()
        found = self._evaluate(dict(choices))
        return self._keep(self.study.enter(choices, found, time.monotonic() - began))

    def _evolve(self) -> Point:
        """The point that the sampler wants; one that is known is entered again, since generations count it."""
        trial, began = self.study.draw(), time.monotonic()
        try:
            known = self._known.get(_key(trial.params))
            found = (known.values, known.violations) if known else self._evaluate(dict(trial.params))
        except BaseException:
            self.study.drop(trial)
            raise
        return self._keep(self.study.tell(trial, found, time.monotonic() - began))

    def _keep(self, point: Point) -> Point:
        self._known.setdefault(_key(point.choices), point)
        self._tell(point)
        return point


def _key(choices: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(choices.items()))
