"""What an experiment has found so far, arm by arm, and whether that is enough to end it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from modicum.serve.experiments import guardrails, sequential
from modicum.serve.experiments.sequential import block_sizes
from modicum.serve.experiments.tables import Totals, outcomes, totals

if TYPE_CHECKING:
    import sqlite3

    from modicum.evaluate.intervals import Measure
    from modicum.serve.experiments.design import Arm
    from modicum.serve.experiments.tables import Experiment

Outcome = Literal["better", "worse", "undecided"]
#: the newest answers of an arm from which its percentiles are taken
_NEWEST = 2000


@dataclass(frozen=True)
class Interval:
    """A value, and between what it surely lies: at all times together with chance 1 − α. None: nothing is known."""

    value: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Spread:
    """The middle and the slow end of the newest times, in seconds."""

    p50: float | None
    p95: float | None


@dataclass(frozen=True)
class ArmReport:
    """One arm. `outcome` is a mean over users, 0 … 1; `difference` is the outcome less the control's."""

    label: str
    version: str | None
    weight: float
    control: bool
    users: int
    requests: int
    errors: int
    cancelled: int
    error_rate: Interval
    outcome: Interval
    difference: Interval | None
    #: the least alpha at which the difference would be certain now
    p: float | None
    verdict: Outcome | None
    seconds: Spread
    first_token: Spread
    prompt_tokens: int
    generated_tokens: int
    #: of a shadow: the mean share of an answer up to which it said the same
    agreement: float | None


@dataclass(frozen=True)
class Report:
    """An experiment as of now."""

    name: str
    state: str
    feedback: str
    shadow: bool
    alpha: float
    window: float
    max_users: int
    created: float
    started: float | None
    ended: float | None
    reason: str | None
    winner: str | None
    #: users whose outcome is fixed, and those who have said something in a window that is still open
    rated_users: int
    waiting_users: int
    #: the least alpha at which the shares of users would be other than the weights; small: something is wrong with the
    #: assignment or the counting. None if the weights were changed
    sample_ratio_p: float | None
    #: answers that could not be written down
    lost: int
    arms: tuple[ArmReport, ...]


@dataclass(frozen=True)
class Verdict:
    """Why an experiment ends, and which arm won, if one did."""

    reason: str
    winner: str | None = None


@dataclass(frozen=True)
class Findings:
    """What the outcomes that are fixed say, by label; `place` is the last of them."""

    place: int
    outcome: dict[str, Measure]
    #: of all arms but the control, less the control's
    difference: dict[str, Measure]
    p: dict[str, float]

    @property
    def users(self) -> int:
        """Users whose outcome is fixed."""
        return sum(one.n for one in self.outcome.values())


def findings(db: sqlite3.Connection, experiment: Experiment, known: Findings | None = None) -> Findings:
    """What the outcomes say now, or `known` as long as there are no more since; of a running one, no 1 % more.

    One may look as rarely as one likes, too.
    """
    query = "SELECT coalesce(max(place), 0) FROM users WHERE experiment = ? AND place IS NOT NULL"
    (place,) = db.execute(query, (experiment.id,)).fetchone()
    if known is not None:
        more = place - known.place
        if not more or (experiment.state == "running" and 100 * more <= known.place):
            return known
    design, found = experiment.design, outcomes(db, experiment.id)
    control = found.get(design.control.label, [])
    difference, p = {}, {}
    for arm in () if design.shadow else design.arms[1:]:
        # of the weights that were planned: how outcomes are paired must not depend on them
        sizes, values = block_sizes(design.control.weight, arm.weight), found.get(arm.label, [])
        # as many comparisons with the control as there are other arms share the chance of an error
        others = len(design.arms) - 1
        difference[arm.label] = sequential.difference(control, values, sizes, design.alpha / others)
        p[arm.label] = min(1.0, others * sequential.p_value(control, values, sizes))
    outcome = {arm.label: sequential.mean(found.get(arm.label, []), design.alpha) for arm in design.arms}
    return Findings(place, outcome, difference, p)


def judge(db: sqlite3.Connection, experiment: Experiment, found: Findings) -> Verdict | None:
    """Why the experiment ends now, if it does."""
    return _alarm(db, experiment) or _decision(experiment, found)


def _alarm(db: sqlite3.Connection, experiment: Experiment) -> Verdict | None:
    design, counted = experiment.design, totals(db, experiment.id)
    control = counted.get(design.control.label, Totals())
    for arm in design.arms[1:]:
        seen = counted.get(arm.label, Totals())
        if guardrails.errors(control, seen, design.error_margin) and _met(
            db, experiment, arm, "outcome = 'error'"
        ):
            return Verdict(f"guardrail: {arm.label} fails in {seen.errors} of {seen.requests} requests")
        if guardrails.slowness(seen) and _met(db, experiment, arm, "slow = 1"):
            return Verdict(f"guardrail: {arm.label} is slow in {seen.slow} of {seen.timed} requests")
    return None


def _decision(experiment: Experiment, found: Findings) -> Verdict | None:
    control, verdicts = experiment.design.control.label, {}
    for label, one in found.difference.items():
        verdicts[label] = _verdict(one)
    better = [label for label, verdict in verdicts.items() if verdict == "better"]
    if better:
        winner = max(better, key=lambda label: found.difference[label].value)
        return Verdict(f"{winner} is better than {control}", winner)
    if verdicts and all(verdict == "worse" for verdict in verdicts.values()):
        return Verdict(f"no arm is as good as {control}", control)
    if found.users >= experiment.design.max_users:
        return Verdict(f"undecided after {experiment.design.max_users} users")
    return None


def report(db: sqlite3.Connection, experiment: Experiment, found: Findings, lost: int = 0) -> Report:
    """What is known of the experiment now."""
    design, counted = experiment.design, totals(db, experiment.id)
    query = "SELECT arm, count(*) FROM users WHERE experiment = ? GROUP BY arm"
    users = dict(db.execute(query, (experiment.id,)).fetchall())
    waiting = "SELECT count(*) FROM users WHERE experiment = ? AND place IS NULL AND rated IS NOT NULL"
    arms = tuple(
        _arm(db, experiment, arm, found, counted.get(arm.label, Totals()), users.get(arm.label, 0))
        for arm in experiment.arms
    )
    same = experiment.arms == design.arms and not design.shadow
    return Report(
        name=experiment.name, state=experiment.state, feedback=design.feedback, shadow=design.shadow,
        alpha=design.alpha, window=design.window, max_users=design.max_users, created=experiment.created,
        started=experiment.started, ended=experiment.ended, reason=experiment.reason, winner=experiment.winner,
        rated_users=found.users, waiting_users=db.execute(waiting, (experiment.id,)).fetchone()[0],
        sample_ratio_p=_sample_ratio(design.arms, users) if same else None, lost=lost, arms=arms,
    )  # fmt: skip


def _arm(
    db: sqlite3.Connection, experiment: Experiment, arm: Arm, found: Findings, seen: Totals, users: int
) -> ArmReport:
    difference = found.difference.get(arm.label)
    query = (
        "SELECT seconds, first FROM exposures WHERE experiment = ? AND arm = ? AND outcome = 'ok' "
        "ORDER BY id DESC LIMIT ?"
    )
    times = db.execute(query, (experiment.id, arm.label, _NEWEST)).fetchall()
    counts = [seen.requests - seen.errors, seen.errors]
    return ArmReport(
        label=arm.label, version=arm.version, weight=arm.weight, control=arm.label == experiment.design.control.label,
        users=users, requests=seen.requests, errors=seen.errors, cancelled=seen.cancelled,
        error_rate=_interval(sequential.weighted_mean([0.0, 1.0], counts, experiment.design.alpha)),
        outcome=_interval(found.outcome[arm.label]),
        difference=None if difference is None else _interval(difference), p=found.p.get(arm.label),
        verdict=None if difference is None else _verdict(difference),
        seconds=_spread([seconds for seconds, _ in times]),
        first_token=_spread([first for _, first in times if first is not None]),
        prompt_tokens=seen.prompt, generated_tokens=seen.generated,
        agreement=seen.agreement / seen.compared if seen.compared else None,
    )  # fmt: skip


def _verdict(difference: Measure) -> Outcome:
    assert difference.low is not None
    assert difference.high is not None
    return "better" if difference.low > 0 else "worse" if difference.high < 0 else "undecided"


def _met(db: sqlite3.Connection, experiment: Experiment, arm: Arm, what: str) -> bool:
    query = (
        "SELECT count(*) FROM (SELECT DISTINCT user FROM exposures WHERE experiment = ? AND arm = ? "  # noqa: S608
        f"AND {what} LIMIT ?)"
    )
    return db.execute(query, (experiment.id, arm.label, guardrails.USERS)).fetchone()[0] >= guardrails.USERS


def _sample_ratio(arms: tuple[Arm, ...], users: dict[str, int]) -> float | None:
    """min(1, 1 / Bayes factor) of counts against the weights, with a Dirichlet prior around them.

    Source: M. Lindon, A. Malek, "Anytime-valid inference for multinomial count data", NeurIPS 2022.
    """
    total = sum(arm.weight for arm in arms)
    shares = {arm.label: arm.weight / total for arm in arms if arm.weight > 0}
    if any(label not in shares for label in users):
        return 0.0
    strength, log = 100.0 * len(shares), 0.0
    for label, share in shares.items():
        n = users.get(label, 0)
        log += math.lgamma(strength * share + n) - math.lgamma(strength * share) - n * math.log(share)
    count = sum(users.values())
    log += math.lgamma(strength) - math.lgamma(strength + count)
    return min(1.0, math.exp(-log)) if log > -700 else 1.0


def _interval(found: Measure) -> Interval:
    value = None if math.isnan(found.value) else found.value
    return Interval(value, found.low, found.high, found.n)


def _spread(times: list[float]) -> Spread:
    if not times:
        return Spread(None, None)
    middle, slow = (float(q) for q in np.quantile(times, [0.5, 0.95]))
    return Spread(middle, slow)
