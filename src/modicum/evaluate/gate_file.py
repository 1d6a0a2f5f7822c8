"""The YAML of `modicum gate`: what a version must keep to, with units.

```yaml
gates:
  - not_worse: {records: runs/new, than: runs/released, by: 1 point}
  - metric: {records: runs/new, metric: perplexity, at_most: 6.5}
  - size: {path: new.modicum, at_most: 60 KB}
  - latency: {bench: times.json, model: small, of: decode, quantile: p95, at_most: 20 ms}
  - same: {records: runs/merged, other: runs/unmerged, tolerance: 1e-4}
  - sparsity: {model: small, at_least: 50 %}
  - parameters: {model: small, at_most: 1.2B}
```
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from modicum.errors import ConfigError, did_you_mean
from modicum.evaluate.intervals import CONFIDENCE

BYTES = {"B": 1.0, **{f"{p}B": 1000.0**k for k, p in enumerate("KMGT", 1)}}
BYTES |= {f"{p}iB": 1024.0**k for k, p in enumerate("KMGT", 1)}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
COUNTS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
SHARES = {"": 1.0, "%": 0.01}
#: by how much a metric may be worse, in the unit that says which metric it is of
MARGINS = {"correct": {"point": 0.01, "points": 0.01}, "loss": {"nats": 1.0}, "perplexity": {"%": 0.01}}
_NUMBER = re.compile(r"\s*([-+]?[\d_,]*\.?\d+(?:[eE][-+]?\d+)?)\s*([A-Za-z%]*)\s*")


def quantity(value: Any, units: dict[str, float]) -> float:
    """The number that a text such as `60 KB` stands for; units in upper or lower case.

    Raises:
        ValueError: no number, or none of the units.
    """
    found = _NUMBER.fullmatch(str(value))
    known = ", ".join(unit for unit in units if unit)
    if isinstance(value, bool) or found is None:
        raise ValueError(f"no number with a unit ({known})")
    factor = {name.lower(): size for name, size in units.items()}.get(found[2].lower())
    if factor is None:
        raise ValueError(f"{f'no unit {found[2]!r}' if found[2] else 'no unit'}; known: {known}")
    return float(found[1].replace("_", "").replace(",", "")) * factor


def _in(units: dict[str, float]) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else quantity(value, units))


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NotWorse(_Options):
    """Records that may be worse than others by a margin at most, at the far end of the interval."""

    records: Path = Field(
        description="Records of the new version: a file, or a folder with one for each task."
    )
    than: Path = Field(description="Records of the version that it is measured against.")
    by: str = Field(description="The margin: `1 point` of correct, `0.02 nats` of loss, `2 %` of perplexity.")
    metric: Literal["correct", "loss", "perplexity"] = Field("correct", description="What is compared.")
    task: str | None = Field(None, description="One task; all together when unset.")
    confidence: float = Field(CONFIDENCE, gt=0, lt=1, description="Confidence of the two-sided interval.")

    @property
    def margin(self) -> float:
        """The margin as a share, in nats, or as a share of the perplexity."""
        return quantity(self.by, MARGINS[self.metric])

    @model_validator(mode="after")
    def _sensible(self) -> NotWorse:
        if self.margin < 0:
            raise ValueError(f"by = {self.by!r}, must not be below 0")
        return self


class _Limits(_Options):
    @model_validator(mode="after")
    def _one_limit(self) -> Any:
        names = [name for name in type(self).model_fields if name.startswith("at_")]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one limit: {' or '.join(names)}")
        return self


class MetricLimit(_Limits):
    """Records whose metric keeps to a limit."""

    records: Path = Field(description="Records: a file, or a folder with one for each task.")
    metric: Literal["correct", "loss", "perplexity"] = Field("correct", description="What is limited.")
    task: str | None = Field(None, description="One task; all together when unset.")
    at_least: Annotated[float | None, _in(SHARES)] = None
    at_most: Annotated[float | None, _in(SHARES)] = None


class Size(_Options):
    """Bytes on the disk of an adapter or a model: a file, or all files of a folder."""

    path: Path
    at_most: Annotated[float, _in(BYTES)] = Field(description="With a unit: B, KB (1000), KiB (1024), MB …")


class LatencyLimit(_Options):
    """Times that `modicum bench --output FILE` has written."""

    bench: Path = Field(description="The JSON file of the bench.")
    model: str | None = Field(None, description="The model's name there; may be unset if it is the only one.")
    of: Literal["prefill", "decode"] = Field("decode", description="Reading the prompt, or one more token.")
    quantile: Literal["median", "p95"] = Field("median", description="Over the turns of the bench.")
    at_most: Annotated[float | None, _in(SECONDS)] = Field(None, description="A time: 20 ms.")
    at_most_times_baseline: float | None = Field(
        None, gt=0, description="A multiple of the baseline's time in the same bench."
    )

    @model_validator(mode="after")
    def _one_limit(self) -> LatencyLimit:
        if (self.at_most is None) == (self.at_most_times_baseline is None):
            raise ValueError("give one limit: at_most or at_most_times_baseline")
        return self


class Same(_Options):
    """Records that must be the same item by item, such as those of a merged and an unmerged model."""

    records: Path
    other: Path
    tolerance: float = Field(
        1e-3, ge=0, description="By which an item's loss, in nats per token, may differ."
    )


class Sparsity(_Options):
    """The share of zeros in the linear layers of a model folder."""

    model: Path
    at_least: Annotated[float, _in(SHARES)]


class Parameters(_Options):
    """The numbers of a model folder."""

    model: Path
    at_most: Annotated[float, _in(COUNTS)] = Field(description="A number: 1.2B, 350M, 5_800_000.")


class Gate(_Options):
    """One gate: a name, if it should have one of its own, and exactly one kind."""

    name: str | None = None
    not_worse: NotWorse | None = None
    metric: MetricLimit | None = None
    size: Size | None = None
    latency: LatencyLimit | None = None
    same: Same | None = None
    sparsity: Sparsity | None = None
    parameters: Parameters | None = None

    @property
    def kind(self) -> str:
        """Which kind of gate this is."""
        return next(name for name in _KINDS if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _one_kind(self) -> Gate:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a gate is exactly one of {', '.join(_KINDS)}; it has {', '.join(given) or 'none'}"
            )
        return self


_KINDS: dict[str, type[BaseModel]] = {
    "not_worse": NotWorse, "metric": MetricLimit, "size": Size, "latency": LatencyLimit, "same": Same,
    "sparsity": Sparsity, "parameters": Parameters,
}  # fmt: skip


class GateFile(_Options):
    """All gates."""

    gates: list[Gate] = Field(min_length=1)


def read_gates(path: str | Path) -> list[Gate]:
    """The gates in the YAML file `path`.

    Raises:
        ConfigError: no such file, no YAML, or everything that is wrong with it.
    """
    file = Path(path).expanduser()
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the gates {file}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: a file of gates is a mapping with the list `gates`")
    try:
        return GateFile.model_validate(values).gates
    except ValidationError as error:
        raise ConfigError("\n".join(f"{file}: {_worded(fault)}" for fault in error.errors())) from error


def _worded(fault: Any) -> str:
    loc = fault["loc"]
    # people count from 1
    where = (
        " ".join(f"gate {part + 1}" if isinstance(part, int) else str(part) for part in loc[1:]) or "gates"
    )
    if fault["type"] == "extra_forbidden":
        kind = _KINDS.get(str(loc[2])) if len(loc) > 3 else Gate if len(loc) > 1 else GateFile
        known = list(kind.model_fields) if kind else []
        return f"{where}: no such option{did_you_mean(str(loc[-1]), known)}; known: {', '.join(known)}"
    if fault["type"] == "missing":
        return f"{where} is missing"
    said = fault["msg"].removeprefix("Value error, ")
    given = "" if isinstance(fault["input"], (dict, list)) else f" = {fault['input']!r}"
    return f"{where}{given}: {said[:1].lower()}{said[1:]}"
