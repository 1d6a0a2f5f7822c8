"""The stages around training that a recipe may have, in order.

sparsify → reorder → quantize, then training, then search → extract or merge → export.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from modicum.compress.export import formats
from modicum.compress.quantize_report import QuantizeOptions
from modicum.compress.reorder import ReorderOptions
from modicum.compress.sparsify_report import SparsifyOptions
from modicum.data.options import Section
from modicum.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: the sections that `modicum run` knows and `modicum tune` does not run
STAGES = ("sparsify", "reorder", "quantize", "search", "extract", "merge", "export")
#: those before training, with the options that their verbs have
BEFORE: dict[str, Any] = {"sparsify": SparsifyOptions, "reorder": ReorderOptions, "quantize": QuantizeOptions}
#: those after training, which change no number of the run
AFTER = ("search", "extract", "merge", "export")


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


class ExtractOptions(Section):
    """How a sub-network is written as a smaller model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number type of the smaller model; auto: the base model's."
    )


def before_options(stage: str, values: Mapping[str, Any]) -> Any:
    """The options of a stage before training, which are those of its verb."""
    found = dict(values)
    for name in ("calibration", "exclude", "kinds"):
        if name in found:
            listed = [found[name]] if isinstance(found[name], str) else found[name]
            found[name] = tuple(_file(value) if name == "calibration" else value for value in listed)
    if found.get("block") is not None:
        found["block"] = tuple(found["block"])
    if found.get("eval_text") is not None:
        found["eval_text"] = _file(found["eval_text"])
    return BEFORE[stage](**found)


def _file(name: str) -> Path | str:
    """A text file, or the name of a data set on the hub as it is."""
    return name if name.startswith("hub:") else Path(name)


def stage_faults(before: Mapping[str, Mapping[str, Any] | None], export: Sequence[str]) -> dict[str, str]:
    """What is wrong with the stages, by the path of the option; empty if fine."""
    faults = {}
    for stage, values in before.items():
        known = [field.name for field in dataclasses.fields(BEFORE[stage])]
        unknown = {
            f"{stage}.{name}": f"{stage} has no option {name!r}{did_you_mean(name, known)}"
            for name in values or {}
            if name not in known
        }
        faults |= unknown
        if values and not unknown:
            try:
                wrong = before_options(stage, values).faults()
            except (TypeError, ValueError, AttributeError) as error:
                wrong = [str(error)]
            if wrong:
                faults[stage] = f"{stage}: " + "; ".join(wrong)
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
    stages = [name for name in STAGES if getattr(recipe, name) not in (None, [])]
    if stages:
        raise ConfigError(
            f"the recipe has the stages {', '.join(stages)}: run it with `modicum run --config {file}`"
        )
