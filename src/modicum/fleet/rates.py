"""How fast a fleet was, as measured: seconds of a unit of work, what a token takes in memory, a record in the store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError
from modicum.evaluate.intervals import CONFIDENCE, t_quantile

if TYPE_CHECKING:
    from collections.abc import Mapping

#: what is measured in seconds of one: tokens of both kinds of passes together, or of each, users, adapters, or steps
UNITS = {
    "all_tokens": "cohorts",
    "tokens": "training",
    "look_tokens": "held-out and test rows",
    "users": "reading rows",
    "adapters": "storing",
    "steps": "cohorts",
}


@dataclass(frozen=True)
class Rate:
    """How long work takes: samples of how much there was, and of the seconds it took."""

    work: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def each(self) -> float:
        """Seconds of one unit: all seconds over all work."""
        return math.fsum(self.seconds) / math.fsum(self.work)

    @property
    def error(self) -> float | None:
        """Standard error of `each`, that of a ratio of two sums (Cochran 1977, §6.4); None for a single sample."""
        n, each = len(self.work), self.each
        if n < 2:
            return None
        squares = math.fsum((s - each * w) ** 2 for w, s in zip(self.work, self.seconds, strict=True))
        return math.sqrt(n / (n - 1) * squares) / math.fsum(self.work)


@dataclass(frozen=True)
class Measured:
    """How fast a fleet was, on which machine; what was not measured is None."""

    #: where this comes from, and what was trained
    what: str
    model: str
    method: str
    ranks: tuple[int, ...]
    device: str
    threads: int
    tokens_per_pass: int
    cohort_size: int
    #: unit (see `UNITS`) -> how long it takes
    rates: dict[str, Rate]
    #: of adapters that were trained, the share that was stored
    stored: float = 1.0
    #: seconds until a process can train
    start: float | None = None
    #: bytes of one token in a pass as tensors, by which jobs size passes; and by how much it made the process grow
    token_bytes: int | None = None
    token_grown: float | None = None
    #: bytes of the base model as it is for cohorts, and of all else in the process before its first pass
    base_bytes: int | None = None
    process_bytes: int | None = None
    #: bytes of a record beyond its numbers, and of index and log for it
    container_bytes: float | None = None
    index_bytes: float | None = None
    #: what the numbers above depend on and a plan may have otherwise
    early_stopping: int | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Measured:
        """What a plan wrote as JSON under `measured`.

        Raises:
            ConfigError: that is something else.
        """
        try:
            rates = {
                name: Rate(tuple(map(float, one["work"])), tuple(map(float, one["seconds"])))
                for name, one in values["rates"].items()
            }
            lists: dict[str, Any] = {name: tuple(values[name]) for name in ("ranks", "notes")}
            found = cls(**{**values, **lists, "rates": rates})
            usable = bool(rates) and all(name in UNITS and rate.each > 0 for name, rate in rates.items())
            usable &= min(found.threads, found.tokens_per_pass, found.cohort_size) >= 1
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ConfigError(
                f"no measured fleet ({type(error).__name__}: {error}); take the folder of a job, or what "
                "`modicum plan --fleet … --measure 30 --json` wrote"
            ) from error
        if not usable:
            raise ConfigError(
                f"a measured fleet has seconds of {', '.join(UNITS)}, not of {', '.join(rates)}"
            )
        return found

    def parts(self, amounts: Mapping[str, float]) -> dict[str, float]:
        """Seconds by part of the work, for amounts of it by unit."""
        return {UNITS[name]: rate.each * amounts[name] for name, rate in self.rates.items()}

    def spread(self, amounts: Mapping[str, float]) -> float | None:
        """Half the 95 % interval of the sum of `parts`, in seconds; None where something was measured only once.

        Student's t, with degrees of freedom by Welch and Satterthwaite.
        """
        variances = []
        for name, rate in self.rates.items():
            if amounts[name] and rate.error is None:
                return None
            variances.append(((amounts[name] * (rate.error or 0.0)) ** 2, len(rate.work) - 1))
        total = math.fsum(variance for variance, _ in variances)
        if not total:
            return 0.0
        freedom = total**2 / math.fsum(one**2 / n for one, n in variances if one)
        return t_quantile((1 + CONFIDENCE) / 2, max(1, int(freedom))) * math.sqrt(total)
