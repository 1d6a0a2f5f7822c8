"""What a quantization will do, and everything that speaks against it, found out before anything is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from modicum.compress.layerwise import Texts, Unit, read_texts, units_of
from modicum.compress.quantize_report import LayerReport, QuantizeOptions
from modicum.compress.streaming import head_name, layer_names
from modicum.errors import ModicumError, TargetError, listing
from modicum.models.architecture import linear_shapes, parse_targets
from modicum.models.checkpoint import layer_shapes
from modicum.quant.spec import divisors

if TYPE_CHECKING:
    from modicum.compress.source import Linear, Source


@dataclass
class Plan:
    """The layers, texts and faults of a quantization."""

    options: QuantizeOptions
    linears: list[Linear]
    units: list[Unit]
    #: linear layers that stay as they are
    dense: list[str]
    #: whether decoder layers are run one after the other
    streamed: bool
    texts: Texts = field(default_factory=Texts)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: Source, options: QuantizeOptions) -> Plan:
        """The plan for a source; its `faults` are to be heeded."""
        faults: list[str] = []
        names, dense = _chosen(source, options, faults)
        linears = []
        try:
            linears = source.linears(names)
        except ModicumError as error:
            faults.append(str(error))
        stack = layer_names(source.model)
        streamed = bool(stack) and (options.evaluate or options.algorithm == "gptq")
        units = units_of(linears, stack if streamed else [])
        if streamed:
            # the output head, where it was asked for, comes behind the layers
            inside = {linear.name for unit in units for linear in unit.linears}
            units += [Unit("head", linear.name, [linear]) for linear in linears if linear.name not in inside]
        plan = cls(options, linears, units, dense, streamed, faults=faults)
        plan.faults += _faults_of_shapes(linears, options, head_name(source.model))
        if not stack:
            kind = type(source.model).__name__
            if options.algorithm == "gptq":
                plan.faults.append(
                    f"gptq needs a causal language model, whose decoder layers it runs text through; {kind} is none: "
                    "use the algorithm mse or rtn"
                )
            if options.eval_text is not None:
                plan.faults.append(f"{kind} is no causal language model: there is no perplexity to evaluate")
            elif options.evaluate:
                plan.notes.append("no perplexity: the model is no causal language model")
        if streamed:
            gptq = options.algorithm == "gptq"
            plan.texts = read_texts(source, options, faults, calibrate=gptq, evaluate=options.evaluate)
        plan.notes += plan.texts.notes(options)
        return plan

    def layers(self) -> list[LayerReport]:
        """The layers as they will be stored."""
        return [LayerReport.planned(linear.name, linear.shape, self.options.spec) for linear in self.linears]

    def faults_of_weights(self, source: Source) -> list[str]:
        """The layers whose weights are not finite; reads all weights."""
        wrong = source.not_finite(self.linears)
        return [f"NaN or infinite weights in {listing(wrong)}"] if wrong else []


def _chosen(source: Source, options: QuantizeOptions, faults: list[str]) -> tuple[list[str], list[str]]:
    """The names of the layers to quantize, and of the linear layers that stay."""
    model = source.model
    every = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    stack = tuple(f"{name}." for name in layer_names(model))
    if stack:
        inside = {name for name in every if name.startswith(stack)}
    else:
        inside = set()
        try:
            inside = set(layer_shapes(model)) & set(every)
        except TargetError as error:
            faults.append(str(error))
    excluded: set[str] = set()
    for pattern in options.exclude:
        try:
            excluded |= set(linear_shapes(model, parse_targets([pattern])))
        except TargetError as error:
            faults.append(f"exclude: {error}")
    if options.head:
        inside |= _head(model, every, excluded, faults)
    chosen = [name for name in every if name in inside - excluded]
    transposed = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    if transposed and not chosen:
        faults.append(
            f"the layers of {type(model).__name__} are transposed Conv1D modules ({listing(transposed, 3)}), which no "
            "quantized folder can hold; only nn.Linear layers are quantized"
        )
    elif not chosen:
        faults.append("no linear layer is left to quantize")
    return chosen, [name for name in every if name not in set(chosen)]


def _head(model: Any, every: list[str], excluded: set[str], faults: list[str]) -> set[str]:
    """The name of the output head, alone in a set; empty where it cannot be quantized."""
    head, tied = head_name(model), getattr(model, "all_tied_weights_keys", None) or {}
    if head not in every:
        faults.append(
            f"head: {type(model).__name__} has no output head over a vocabulary; leave --head out"
            if head is None
            else f"head: {head} is no plain nn.Linear; leave --head out"
        )
    elif f"{head}.weight" in {*tied, *tied.values()}:
        faults.append(
            f"head: {head} is tied to the embedding, which has to stay as it is. Leave --head out, or untie it in a "
            f"copy of the model: {head}.weight = nn.Parameter({head}.weight.detach().clone()), tie_word_embeddings = "
            "false in its configuration, save_pretrained"
        )
    elif head in excluded:
        faults.append(f"--head asks for {head}, --exclude leaves it out; drop one of them")
    else:
        return {head}
    return set()


def _faults_of_shapes(linears: list[Linear], options: QuantizeOptions, head: str | None) -> list[str]:
    """The layers that the blocks do not divide, and the sizes that would divide all."""
    faults = []
    for axis, (size, what) in enumerate(zip(options.spec.block, ("outputs", "inputs"), strict=True)):
        if size < 1:
            continue
        wrong = [f"{linear.name} ({linear.shape[axis]})" for linear in linears if linear.shape[axis] % size]
        if wrong:
            fitting = divisors(math.gcd(*(linear.shape[axis] for linear in linears)))
            # the head is left out by not asking for it
            others = any(linear.name != head and linear.shape[axis] % size for linear in linears)
            out = "leave those layers out with --exclude" if others else "leave --head out"
            faults.append(
                f"{'groups' if axis else 'blocks'} of {size} {what} do not divide {listing(wrong, 3)}; sizes that "
                f"divide all layers: {fitting}; or {out}"
            )
    return faults
