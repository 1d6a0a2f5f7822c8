"""What a sparsification will do, and everything that speaks against it, found out before anything is written."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.compress.layerwise import Texts, Unit, read_texts, units_of
from modicum.compress.source import WITHOUT_TEXT
from modicum.compress.sparsify_report import LayerReport, SparsifyOptions
from modicum.compress.streaming import behind_names, layer_names, stack_names
from modicum.errors import ConfigError, ModicumError, TargetError, did_you_mean, listing
from modicum.models.architecture import linear_shape, linear_shapes, parse_targets
from modicum.models.checkpoint import layer_shapes
from modicum.ops.sparsity import count

if TYPE_CHECKING:
    from modicum.compress.source import Linear, Source


@dataclass
class Plan:
    """The layers, texts and faults of a sparsification."""

    options: SparsifyOptions
    linears: list[Linear]
    #: share of zeros by the layer's name
    ratios: dict[str, float]
    units: list[Unit]
    #: whether layers are run one after the other
    streamed: bool
    texts: Texts = field(default_factory=Texts)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: Source, options: SparsifyOptions) -> Plan:
        """The plan for a source, beside `options.faults()`; its `faults` are to be heeded."""
        faults: list[str] = []
        names, linears = _chosen(source.model, options, faults), []
        try:
            linears = source.linears(names)
        except ModicumError as error:
            faults.append(str(error))
        ratios = _ratios(source.model, names, options, faults)
        stack, wanda = stack_names(source.model), options.algorithm == "wanda"
        evaluate = options.evaluate and bool(layer_names(source.model))
        streamed = bool(stack) and (evaluate or wanda)
        units = units_of(linears, stack if streamed else [])
        plan = cls(options, linears, ratios, units, streamed, faults=faults)
        plan._check_model(source, stack)
        if streamed:
            plan.texts = read_texts(source, options, faults, calibrate=wanda, evaluate=evaluate)
        if options.evaluate and not evaluate:
            plan.notes.append("no perplexity: the model is no causal language model")
        plan.notes += plan.texts.notes(options)
        return plan

    def layers(self) -> list[LayerReport]:
        """The layers as they will be stored."""
        return [
            LayerReport(
                linear.name,
                linear.shape,
                self._zeros(linear) / math.prod(linear.shape),
                self.options.algorithm,
            )
            for linear in self.linears
        ]

    def faults_of_weights(self, source: Source) -> list[str]:
        """The layers whose weights are not finite; reads all weights."""
        wrong = source.not_finite(self.linears)
        return [f"NaN or infinite weights in {listing(wrong)}"] if wrong else []

    def _zeros(self, linear: Linear) -> int:
        out, inner = linear.shape
        ratio = self.ratios[linear.name]
        if self.options.pattern is None and self.options.compared == "layer":
            return count(out * inner, ratio)
        return out * count(inner, ratio)

    def _check_model(self, source: Source, stack: list[str]) -> None:
        """What the model cannot do joins the faults."""
        model, options = source.model, self.options
        kind = type(model).__name__
        if options.algorithm == "wanda" and not stack:
            self.faults.append(
                f"wanda runs text through layer after layer of a decoder or an encoder, which {kind} has no stack of: "
                "use the algorithm magnitude"
            )
        if options.eval_text is not None and not layer_names(model):
            self.faults.append(f"{kind} is no causal language model: there is no perplexity to evaluate")
        missing = source.absent(model, skip=tuple(f"{name}." for name in behind_names(model)))
        if self.streamed and missing:
            self.faults.append(
                f"{source.folder} does not store {listing(missing)} the way {kind} holds it (some models join or split "
                f"tensors on loading), so that no text can be run through it. {WITHOUT_TEXT}"
            )
        try:
            m = (options.n_m or (1, 1))[1]
        except ConfigError:
            return
        wrong = [f"{linear.name} ({linear.shape[1]})" for linear in self.linears if linear.shape[1] % m]
        if wrong:
            self.faults.append(
                f"runs of {m} inputs (pattern {options.pattern}) do not divide {listing(wrong, 3)}; leave those layers "
                "out with exclude, or choose an M that divides them"
            )


def _chosen(model: Any, options: SparsifyOptions, faults: list[str]) -> list[str]:
    """The names of the layers to sparsify, in the order of the model."""
    every = [name for name, module in model.named_modules() if linear_shape(module)]
    stack = tuple(f"{name}." for name in stack_names(model))
    if stack:
        inside = {name for name in every if name.startswith(stack)}
    else:
        behind = tuple(f"{name}." for name in behind_names(model))
        try:
            inside = {name for name in layer_shapes(model) if not f"{name}.".startswith(behind or ("\0",))}
        except TargetError as error:
            faults.append(str(error))
            return []
    excluded: set[str] = set()
    for pattern in options.exclude:
        excluded |= _matching(model, pattern, "exclude", faults)
    chosen = [name for name in every if name in inside - excluded]
    if not chosen:
        faults.append("no linear layer is left to sparsify")
    return chosen


def _ratios(model: Any, names: list[str], options: SparsifyOptions, faults: list[str]) -> dict[str, float]:
    """The share of zeros of each of the layers called `names`; the last pattern that matches a layer counts."""
    try:
        ratios = dict.fromkeys(names, float(options.ratio))
    except ConfigError:  # a wrong pattern is among the faults of the options
        return {}
    for pattern, ratio in options.ratios.items():
        matching = _matching(model, pattern, "ratios", faults)
        if matching and not matching & set(names):
            faults.append(
                f"ratios: {pattern!r} matches {listing(sorted(matching), 3)}, which stays as it is: only the linear "
                "layers of the stack that are not excluded are sparsified"
            )
        ratios |= dict.fromkeys((name for name in names if name in matching), float(ratio))
    return ratios


def _matching(model: Any, pattern: str, what: str, faults: list[str]) -> set[str]:
    """The linear layers that a pattern names as PEFT's do; that there is none joins the faults."""
    try:
        return set(linear_shapes(model, parse_targets([pattern])))
    except re.error as error:
        faults.append(f"{what}: {pattern!r} is no regular expression: {error}")
    except TargetError as error:
        # the error knows the endings; a longer name is compared with whole names
        names = list(linear_shapes(model, ".*"))
        hint = did_you_mean(pattern, names) if "." in pattern and "did you mean" not in str(error) else ""
        faults.append(f"{what}: {error}{hint}")
    return set()
