"""The stages around training that a recipe may have: quantize before it, merge and export after it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from modicum.compress.export import formats
from modicum.compress.quantize_report import QuantizeOptions
from modicum.data.options import Section
from modicum.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: the sections that `modicum run` knows and `modicum tune` does not run
STAGES = ("quantize", "merge", "export")


class MergeOptions(Section):
    """How the trained adapter is folded into the base model."""

    dtype: str = Field("auto", description="auto: what the base is, quantized or not; or a dense dtype.")
    allow_inexact: bool = Field(
        False,
        description="Quantize again what a low-bit base cannot take exactly; exports may round the grid.",
    )


class ElasticOptions(Section):
    """The search space to train, and how sub-networks are drawn."""

    space: str | dict[str, Any] = Field(
        description="A bundled search space (shears, lonas, lonas_bert), a YAML file, or the space itself."
    )
    sampling: Literal["uniform", "sandwich"] = Field(
        "uniform",
        description="uniform: one random sub-network per micro-batch; sandwich: the largest, the smallest and "
        "`samples` random ones.",
    )
    samples: int = Field(
        2, ge=0, description="sandwich: random sub-networks beside the largest and the smallest."
    )
    distill: bool = Field(
        False, description="sandwich: the smaller ones learn the largest one's predictions, not the labels."
    )
    active: Literal["heuristic", "largest", "smallest"] = Field(
        "heuristic",
        description="The sub-network that is evaluated while training and saved as the active one.",
    )


def quantize_options(values: Mapping[str, Any]) -> QuantizeOptions:
    """The options of the section `quantize`, which are those of `modicum quantize`."""
    found = dict(values)
    for name in ("calibration", "exclude"):
        if isinstance(found.get(name), str):
            found[name] = [found[name]]
    if found.get("block") is not None:
        found["block"] = tuple(found["block"])
    if "calibration" in found:
        found["calibration"] = tuple(Path(file) for file in found["calibration"])
    if found.get("eval_text") is not None:
        found["eval_text"] = Path(found["eval_text"])
    if "exclude" in found:
        found["exclude"] = tuple(found["exclude"])
    return QuantizeOptions(**found)


def stage_faults(quantize: Mapping[str, Any] | None, export: Sequence[str]) -> dict[str, str]:
    """What is wrong with the stages, by the path of the option; empty if fine."""
    faults = {}
    known = [field.name for field in dataclasses.fields(QuantizeOptions)]
    for name in quantize or {}:
        if name not in known:
            faults[f"quantize.{name}"] = f"quantize has no option {name!r}{did_you_mean(name, known)}"
    if quantize and not faults:
        try:
            wrong = quantize_options(quantize).faults()
        except (TypeError, ValueError) as error:
            wrong = [str(error)]
        if wrong:
            faults["quantize"] = "quantize: " + "; ".join(wrong)
    for name in export:
        if name not in formats():
            hint = did_you_mean(name, formats())
            faults["export"] = f"no export format {name!r}{hint}; known: {', '.join(formats())}"
    return faults


def ensure_training_alone(recipe: Any, file: Path) -> None:
    """Returns when `recipe` has no stage besides training.

    Raises:
        ConfigError: it has; `modicum run` runs them.
    """
    stages = [name for name in STAGES if getattr(recipe, name)]
    if stages:
        raise ConfigError(
            f"the recipe has the stages {', '.join(stages)}: run it with `modicum run --config {file}`"
        )
