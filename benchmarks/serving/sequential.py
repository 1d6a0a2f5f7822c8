"""How often experiments err when one looks at them after every user, and how many users they need.

Simulated users, with the functions that end real experiments. Beside it a z-test at 5 %, looked at after every user
(from the 30th of each arm on) and once at the end.

    python benchmarks/serving/sequential.py [--runs 2000]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.serve.experiments.sequential import FRACTIONS, block_sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

RESULT = Path(__file__).parent / "results" / "sequential.json"
ALPHA = 0.05
#: users of the smaller arm; in one part of the runs at a time
USERS, PART = 2000, 50
FIRST_LOOK = 30


@dataclass(frozen=True)
class Case:
    """Users whose outcomes have a mean that `shift` moves."""

    name: str
    draw: Callable[[np.random.Generator, tuple[int, int], float], NDArray[np.float64]]
    weights: tuple[float, float] = (1, 1)
    shift: float = 0.1


def coins(share: float) -> Any:
    return lambda rng, shape, shift: (rng.random(shape) < share + shift).astype(float)


def scores(rng: np.random.Generator, shape: tuple[int, int], shift: float) -> NDArray[np.float64]:
    """Most are bad, few are very good: beta-distributed with a mean of 0.2."""
    mean = 0.2 + shift
    return rng.beta(1.5 * mean, 1.5 * (1 - mean), shape)


def talkative(rng: np.random.Generator, shape: tuple[int, int], shift: float) -> NDArray[np.float64]:
    """Means of one to many thumbs (geometric, 4 on average) of users who differ in how easily they are pleased."""
    pleased = np.clip(rng.beta(2, 2, shape) + shift, 0, 1)
    count = rng.geometric(0.25, shape)
    return np.round(rng.binomial(count, pleased) / count, 3)


def outcomes_of_few(rng: np.random.Generator, shape: tuple[int, int], shift: float) -> NDArray[np.float64]:
    """Thumbs of users who give ten each, every thumb counted as if it were a user: what must not be done."""
    runs, n = shape
    pleased = np.clip(rng.beta(2, 2, (runs, -(-n // 10))) + shift, 0, 1).repeat(10, 1)[:, :n]
    return (rng.random(shape) < pleased).astype(float)


CASES = (
    Case("thumbs, half of them up", coins(0.5)),
    Case("the same, 9 : 1", coins(0.5), (9, 1)),
    Case("thumbs, 2 % up", coins(0.02), shift=0.02),
    Case("skewed scores", scores),
    Case("users with several thumbs, 3 : 1", talkative, (3, 1)),
    Case("every thumb counted, not every user", outcomes_of_few),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000)
    args = parser.parse_args()
    errors = {case.name: measured(case, args.runs, seed) for seed, case in enumerate(CASES)}
    power = {
        f"{share:g} and {share + shift:g}": needed(share, shift, args.runs // 4, seed)
        for seed, (share, shift) in enumerate([(0.5, 0.2), (0.5, 0.1), (0.5, 0.05), (0.1, 0.05)])
    }
    found = {
        "what": __doc__, "alpha": ALPHA, "runs": args.runs, "users": USERS, "errors": errors, "users_needed": power,
        "table": errors_table(errors, args.runs),
    }  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    needed_ = {"what": __doc__, "users_needed": power, "table": power_table(power, args.runs // 4)}
    RESULT.with_name("sequential_users.json").write_text(
        json.dumps(needed_, indent=1) + "\n", encoding="utf-8"
    )


def measured(case: Case, runs: int, seed: int) -> dict[str, float]:
    """Shares of runs that err: without a difference they declare one, with one their interval leaves it out."""
    rng = np.random.default_rng(seed)
    sizes = block_sizes(*case.weights)
    names = ("declared", "left_out", "z_at_every_look", "z_once")
    wrong = dict.fromkeys(names, 0.0)
    for start in range(0, runs, PART):
        part = min(PART, runs - start)
        control, same, other = (
            case.draw(rng, (part, USERS * size), shift)
            for size, shift in ((sizes[0], 0.0), (sizes[1], 0.0), (sizes[1], case.shift))
        )
        looks = z_values(control, same, sizes)
        limit = NormalDist().inv_cdf(1 - ALPHA / 2)
        found = (
            ever_beyond(differences(control, same, sizes), 0.0).min(1) < USERS,
            ever_beyond(differences(control, other, sizes), truth(case)).min(1) < USERS,
            (np.abs(looks) > limit).any(1),
            np.abs(looks[:, -1]) > limit,
        )
        for name, errs in zip(names, found, strict=True):
            wrong[name] += float(errs.sum()) / runs
    return wrong


def needed(share: float, shift: float, runs: int, seed: int) -> dict[str, float]:
    """Users of an arm until a true difference of shares is declared, and with the number fixed before at 80 % power."""
    rng, limit = (
        np.random.default_rng(100 + seed),
        NormalDist().inv_cdf(1 - ALPHA / 2) + NormalDist().inv_cdf(0.8),
    )
    spread = share * (1 - share) + (share + shift) * (1 - share - shift)
    fixed = math.ceil(limit**2 * spread / shift**2)
    length = 6 * fixed
    first = []
    for start in range(0, runs, 10):
        shape = (min(10, runs - start), length)
        control, treatment = coins(share)(rng, shape, 0.0), coins(share)(rng, shape, shift)
        first.append(ever_beyond(differences(control, treatment, (1, 1)), 0.0)[:, 0])
    stops = np.concatenate(first) + 1
    return {
        "fixed": fixed,
        "median": float(np.median(stops)),
        "p90": float(np.quantile(stops, 0.9)),
        "undecided": float((stops > length).mean()),
    }


def truth(case: Case) -> float:
    """The difference of the means, of very many users (clipping makes it differ from the shift)."""
    rng = np.random.default_rng(999)
    shape = (1, 4_000_000)
    if case.draw in {talkative, outcomes_of_few}:
        return float(case.draw(rng, shape, case.shift).mean() - case.draw(rng, shape, 0.0).mean())
    return case.shift


def differences(
    control: NDArray[np.float64], treatment: NDArray[np.float64], sizes: tuple[int, int]
) -> NDArray[np.float64]:
    blocks = [
        x.reshape(len(x), -1, size).mean(2) for x, size in zip((control, treatment), sizes, strict=True)
    ]
    return blocks[1] - blocks[0]


def ever_beyond(d: NDArray[np.float64], claim: float) -> NDArray[np.int64]:
    """(runs, 2): the first step at which the interval lies above, and below, the claim; past the last one if never."""
    found = []
    for sign in (1, -1):
        x, m = (1 + sign * d) / 2, (1 + sign * claim) / 2
        wealth = np.zeros_like(x)
        for fraction in FRACTIONS:
            wealth += np.exp(np.cumsum(np.log1p(fraction * (x / m - 1)), axis=1)) / len(FRACTIONS)
        beyond = wealth >= 2 / ALPHA
        found.append(np.where(beyond.any(1), beyond.argmax(1), d.shape[1]))
    return np.stack(found, 1)


def z_values(
    control: NDArray[np.float64], treatment: NDArray[np.float64], sizes: tuple[int, int]
) -> NDArray[np.float64]:
    """The statistic of the z-test of two means after every block."""
    found = []
    for x, size in zip((control, treatment), sizes, strict=True):
        n = np.arange(1, x.shape[1] + 1)
        mean = np.cumsum(x, 1) / n
        spread = np.maximum(np.cumsum(x * x, 1) / n - mean**2, 0)
        found.append((mean[:, size - 1 :: size], (spread / n)[:, size - 1 :: size]))
    (low, low_error), (high, high_error) = found
    error = np.sqrt(low_error + high_error)
    z = np.divide(high - low, error, out=np.zeros_like(error), where=error > 0)
    return z[:, FIRST_LOOK:]


def errors_table(found: dict[str, dict[str, float]], runs: int) -> dict[str, Any]:
    columns = [
        "outcomes", "differences declared where none is", "intervals that left out the true one",
        "z-test, looked at every time", "z-test, once",
    ]  # fmt: skip
    return {
        "columns": columns,
        "rows": [[name, *(f"{100 * share:.1f} %" for share in one.values())] for name, one in found.items()],
        "note": f"Shares of {runs:,} simulated experiments that ever err within {USERS:,} users of the smaller arm, "
        f"looked at after every one, at α = {ALPHA:g}. Made by `python benchmarks/serving/sequential.py`.",
    }


def power_table(found: dict[str, dict[str, float]], runs: int) -> dict[str, Any]:
    return {
        "columns": [
            "shares",
            "fixed number, 80 % power",
            "median until declared",
            "90 % are by",
            "undecided at 6 ×",
        ],
        "rows": [
            [name, one["fixed"], int(one["median"]), int(one["p90"]), f"{100 * one['undecided']:.1f} %"]
            for name, one in found.items()
        ],
        "note": f"Users of an arm, {runs:,} simulated experiments each, α = {ALPHA:g}. "
        "Made by `python benchmarks/serving/sequential.py`.",
    }


if __name__ == "__main__":
    main()
