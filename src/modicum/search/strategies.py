"""How the next sub-network to evaluate is chosen.

    heuristic   entry (n − 1) // 2 of every group's n choices, nothing else
    hill        from the heuristic to whichever neighbour is better, the incumbent stays otherwise
    random      uniform among those within the budgets that shapes tell
    nsga2       Deb et al. 2002, as Optuna has it; points over a budget lose against all others

Sources: hill-climbing from the heuristic as in Shears, arXiv 2404.10934; NSGA-II as in LoNAS.
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import TYPE_CHECKING, Any, final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from modicum.search.options import SearchOptions
    from modicum.search.space import Choices
    from modicum.search.study import Found, Point, Study

    Key = tuple[tuple[str, int], ...]
    Evaluate = Callable[[Choices], Found]
    #: of many at once: index, what was found and seconds, as they end
    EvaluateMany = Callable[[Sequence[Choices]], Iterable[tuple[int, Found, float]]]

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
        many: EvaluateMany | None = None,
    ) -> None:
        """`evaluate(choices)` gives values and violated budgets, `violations(choices)` those that shapes tell.

        `many` evaluates side by side in place of `evaluate`. Whatever does not depend on what is found is then drawn at
        once: all points of the random strategy, and a whole generation of nsga2. The points stay the same; a generation
        that was interrupted ends with its own, too, but in another order, which changes those after it.
        """
        self.study, self.options, self._evaluate, self._violations = study, options, evaluate, violations
        self._first = next(iter(maximized.items()))
        self._tell = tell
        self._many, self._most = (self._one_by_one, 1) if many is None else (many, sys.maxsize)
        self._generator = torch.Generator().manual_seed(options.seed * 1000 + worker)
        self._known = {_key(point.choices): point for point in study.points()}

    def run(self) -> None:
        """Go on until the strategy is done or `trials` sub-networks are evaluated."""
        if self.options.strategy == "heuristic":
            self._visit(self.study.space.heuristic())
        elif self.options.strategy == "hill":
            self._climb()
        elif self.options.strategy == "random":
            while batch := self._draws():
                self._enter(batch)
        else:
            while count := self._left():
                self._evolve(min(count, self._most))

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

    def _draws(self) -> list[Choices]:
        """The random sub-networks that come next; empty at the end."""
        found: dict[Key, Choices] = {}
        for _ in range(min(self._left(), self._most)):
            drawn = self._drawn(found)
            if drawn is None:
                break
            found[_key(drawn)] = drawn
        return list(found.values())

    def _drawn(self, taken: Mapping[Key, Choices]) -> Choices | None:
        """A random sub-network that is new and keeps the budgets that shapes tell, None where none can be found."""
        space = self.study.space
        for _ in range(_DRAWS):
            choices = space.sample(self._generator)
            if self._is_new(choices, taken) and not self._violations(choices):
                return choices
        # few keep them: one step less in random groups until this one does; the smallest one does for sure
        for _ in range(_DRAWS):
            choices = space.sample(self._generator)
            while self._violations(choices):
                larger = [name for name, group in space.groups.items() if choices[name] != group.choices[-1]]
                name = larger[int(torch.randint(len(larger), (), generator=self._generator))]
                steps = space.groups[name].choices
                choices[name] = steps[steps.index(choices[name]) + 1]
            if self._is_new(choices, taken):
                return choices
        return None

    def _is_new(self, choices: Choices, taken: Mapping[Key, Choices]) -> bool:
        return _key(choices) not in self._known and _key(choices) not in taken

    def _visit(self, choices: Choices) -> Point:
        """The point of `choices`; one that is known is not evaluated again."""
        return self._known.get(_key(choices)) or self._enter([choices])[0]

    def _enter(self, batch: Sequence[Choices]) -> list[Point]:
        """The points of what the strategy wanted, in the order in which they end."""
        return [
            self._keep(self.study.enter(batch[at], found, seconds))
            for at, found, seconds in self._many(batch)
        ]

    def _one_by_one(self, batch: Sequence[Choices]) -> Iterable[tuple[int, Found, float]]:
        for at, choices in enumerate(batch):
            began = time.monotonic()
            found = self._evaluate(dict(choices))
            yield at, found, time.monotonic() - began

    def _evolve(self, count: int) -> None:
        """Evaluate `count` points that the sampler wants, or what a generation lacks: the next one descends from it.

        A point that is known is entered again, since generations count it.
        """
        population = self.options.population
        lacks = population - len(self.study.points()) % population
        trials: dict[Key, list[Any]] = {}
        for ahead in range(min(count, lacks)):
            trial = self.study.draw(ahead)
            trials.setdefault(_key(trial.params), []).append(trial)
        try:
            for key in [key for key in trials if key in self._known]:
                known = self._known[key]
                self._finish(trials.pop(key), (known.values, known.violations), 0.0)
            keys = list(trials)
            for at, found, seconds in self._many([dict(trials[key][0].params) for key in keys]):
                self._finish(trials.pop(keys[at]), found, seconds)
        except BaseException:
            for trial in itertools.chain.from_iterable(trials.values()):
                self.study.drop(trial)
            raise

    def _finish(self, trials: Sequence[Any], found: Found, seconds: float) -> None:
        """Keep the points of trials with the same choices."""
        for trial in trials:
            self._keep(self.study.tell(trial, found, seconds))

    def _keep(self, point: Point) -> Point:
        self._known.setdefault(_key(point.choices), point)
        self._tell(point)
        return point


def _key(choices: Mapping[str, int]) -> Key:
    return tuple(sorted(choices.items()))
