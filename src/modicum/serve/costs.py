"""What tokens cost, and who used how many: prices per 1,000 tokens, and the machine's shared out by work."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import yaml

from modicum.errors import ConfigError, did_you_mean
from modicum.evaluate.resources import Prices, Resources, cost

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

#: what tenants beyond the first ones are called together
OTHER = "other"
#: the kinds of tokens that have a price
KINDS = ("prompt", "cached", "generated")
#: the section of prices per 1,000 tokens
_TOKENS = "per_1000_tokens"


@dataclass(frozen=True)
class Tariff:
    """Prices in one currency: of 1,000 tokens, of the machine, or of both, which then add up."""

    currency: str = ""
    #: of 1,000 tokens: read anew, found in the prefix cache, generated
    prompt: float = 0.0
    cached: float = 0.0
    generated: float = 0.0
    #: of processor and GPU hours and of energy
    machine: Prices | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Tariff:
        """The tariff of a YAML file: what `Prices` has, and `per_1000_tokens`: `prompt`, `cached`, `generated`.

        Cached tokens cost what others of a prompt do unless they have a price of their own.

        Raises:
            ConfigError: everything that is wrong with it, with the nearest right names.
        """
        rest = {name: value for name, value in values.items() if name != _TOKENS}
        per_token = values.get(_TOKENS) or {}
        faults = []
        if not isinstance(per_token, dict):
            faults, per_token = [f"{_TOKENS} = {per_token!r}, must be a mapping of {', '.join(KINDS)}"], {}
        for name, price in per_token.items():
            if name not in KINDS:
                faults.append(
                    f"{_TOKENS} has no {name!r}{did_you_mean(str(name), KINDS)}; known: {', '.join(KINDS)}"
                )
            elif (
                isinstance(price, bool)
                or not isinstance(price, (int, float))
                or not 0 <= price < float("inf")
            ):
                faults.append(f"{_TOKENS}.{name} = {price!r}, must be a number of at least 0")
        machine = None
        try:
            machine = Prices.of(rest)
        except ConfigError as error:
            faults.append(str(error))
        if machine is not None and machine.gb_month is not None:
            faults.append("gb_month: a server does not know what a store takes; `modicum cost` counts it")
        if faults or machine is None:
            raise ConfigError("; ".join(faults))
        prices = {
            name: float(per_token.get(name, per_token.get("prompt", 0.0) if name == "cached" else 0.0))
            for name in KINDS
        }
        hourly = (machine.cpu_hour, machine.gpu_hour, machine.kwh)
        return cls(
            machine.currency,
            **prices,
            machine=machine if any(price is not None for price in hourly) else None,
        )

    @classmethod
    def read(cls, file: Path) -> Tariff:
        """The tariff in a YAML file; a section `prices` serves as well.

        Raises:
            ConfigError: the file is missing, is no YAML, or see `of`.
        """
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"prices cannot be read from {file}: {error}") from error
        if isinstance(values, dict) and isinstance(values.get("prices"), dict):
            values = values["prices"]
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: prices are a mapping, such as `cpu_hour: 0.04` and `currency: EUR`")
        try:
            return cls.of(values)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    def of_tokens(self, *, prompt: int = 0, cached: int = 0, generated: int = 0) -> float:
        """What tokens cost; `cached` are among those of the `prompt`."""
        return ((prompt - cached) * self.prompt + cached * self.cached + generated * self.generated) / 1000


@dataclass
class Usage:
    """What one tenant had since the server started."""

    #: outcome -> how many
    requests: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    #: of these, found in the prefix cache
    cached_tokens: int = 0
    generated_tokens: int = 0
    cost: float = 0.0

    def merge(self, other: Usage) -> None:
        """Returns when everything in `other` is counted here too."""
        for outcome, count in other.requests.items():
            self.requests[outcome] = self.requests.get(outcome, 0) + count
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.generated_tokens += other.generated_tokens
        self.cost += other.cost


def largest(usage: Mapping[str, Usage], most: int) -> dict[str, Usage]:
    """The `most` tenants that cost most (then: had most tokens), and the others together as `OTHER`."""

    def size(one: tuple[str, Usage]) -> tuple[float, int]:
        return -one[1].cost, -one[1].prompt_tokens - one[1].generated_tokens

    ordered = sorted(usage.items(), key=size)
    found = dict(ordered[:most])
    for _, used in ordered[most:]:
        found[OTHER] = merged(found.get(OTHER, Usage()), used)
    return found


def merged(*usage: Usage) -> Usage:
    """All of it together, as one that nothing else changes."""
    total = Usage()
    for one in usage:
        total.merge(one)
    return total


@final
class MachineCost:
    """What the machine has cost since it was last asked, while it is open; nothing without prices of it."""

    def __init__(self, prices: Prices | None) -> None:
        self._prices, self._told = prices, 0.0
        self._used = Resources() if prices is not None else None
        if self._used is not None:
            self._used.__enter__()

    def take(self) -> float:
        """What came on top since the last call."""
        if self._used is None or self._prices is None:
            return 0.0
        amount = cost(self._used.as_dict(), None, self._prices)["amount"]
        more, self._told = max(0.0, amount - self._told), max(amount, self._told)
        return more

    def close(self) -> None:
        """Returns when nothing is measured any more."""
        if self._used is not None:
            self._used.__exit__()
            self._used = None
