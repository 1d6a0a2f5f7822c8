"""What algorithms have in common that go through a model layer by layer: units, texts, streams, inputs, errors.

Text runs in streams of hidden states: `calibration` through the layers as they are changed, so that each is fitted to
the inputs it will meet; the evaluation text through the `original` layers and through the `changed` ones.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from modicum.compress.calibration import Sequences, calibration_sequences, evaluation_sequences
from modicum.errors import ModicumError
from modicum.models.loading import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from modicum.compress.source import Linear, Source
    from modicum.compress.streaming import Stack
    from modicum.compress.work import Work

    class TextOptions(Protocol):
        """The options that say which text is run."""

        @property
        def calibration(self) -> Sequence[Path | str]: ...  # noqa: D102
        @property
        def sequences(self) -> int: ...  # noqa: D102
        @property
        def sequence_length(self) -> int: ...  # noqa: D102
        @property
        def eval_text(self) -> Path | str | None: ...  # noqa: D102
        @property
        def eval_sequences(self) -> int: ...  # noqa: D102


#: tokens that output errors are measured on
MEASURED = 2048
_STREAMS = "streams"


@dataclass(frozen=True)
class Unit:
    """Layers that are finished, and kept, together."""

    #: name of its file
    name: str
    #: shown in progress
    label: str
    linears: list[Linear]


@dataclass
class Texts:
    """The token sequences of a run."""

    calibration: Sequences | None = None
    evaluation: Sequences | None = None

    def enter(self, stack: Stack, most: int | None = None) -> dict[str, Tensor]:
        """The hidden states of all streams in front of the first layer, of at most `most` sequences each."""
        wanted = {"calibration": self.calibration, "original": self.evaluation}
        ids = {name: sequences.ids[:most] for name, sequences in wanted.items() if sequences is not None}
        streams = dict(zip(ids, stack.enter(*ids.values()), strict=True))
        if "original" in streams:
            streams["changed"] = streams["original"].clone()
        return streams


def units_of(linears: list[Linear], stack: list[str]) -> list[Unit]:
    """One unit for each layer of a stack; without a stack, one for each matrix."""
    if not stack:
        return [Unit(f"matrix-{index:05d}", linear.name, [linear]) for index, linear in enumerate(linears)]
    return [
        Unit(f"layer-{index:05d}", name, [linear for linear in linears if linear.name.startswith(f"{name}.")])
        for index, name in enumerate(stack)
    ]


def read_texts(
    source: Source, options: TextOptions, faults: list[str], *, calibrate: bool, evaluate: bool
) -> Texts:
    """The texts that are asked for as tokens of the model; what is wrong with them joins `faults`."""
    texts, length = Texts(), options.sequence_length
    longest = _longest(source)
    if longest is not None and length > longest:
        faults.append(f"sequence_length = {length}, the model takes at most {longest} tokens")
    try:
        tokenizer = load_tokenizer(str(source.folder))
    except ModicumError as error:
        faults.append(str(error))
        return texts
    if length < 2 or options.sequences < 1 or options.eval_sequences < 0:
        return texts
    try:
        if calibrate:
            texts.calibration = calibration_sequences(
                options.calibration, tokenizer, options.sequences, length
            )
    except ModicumError as error:
        faults.append(str(error))
    try:
        if evaluate:
            texts.evaluation = evaluation_sequences(
                options.eval_text, tokenizer, options.eval_sequences, length
            )
    except ModicumError as error:
        faults.append(str(error))
    there = source.config.get_text_config().vocab_size
    most = max((int(found.ids.max()) for found in (texts.calibration, texts.evaluation) if found), default=0)
    if most >= there:
        faults.append(
            f"the tokenizer makes ids up to {most}, the model knows {there}: they do not belong together"
        )
    return texts


def identity(source: Source, options: Mapping[str, Any], texts: Texts) -> dict[str, Any]:
    """What has to be the same for a run to resume."""
    digests = {
        f"{name} tokens": None if found is None else hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()
        for name, found in (("calibration", texts.calibration), ("evaluation", texts.evaluation))
    }
    files = {file.name: file.stat().st_size for file in sorted(set(source.files.values()))}
    return {**options, **digests, "weight files": files, "model config": source.raw}


def go_through(
    stack: Stack,
    texts: Texts,
    units: Sequence[Unit],
    work: Work,
    change: Callable[[int, nn.Module, dict[str, Tensor]], None],
    progress: Callable[[int, int, str], None],
) -> dict[str, Tensor]:
    """The streams behind the last layer. `change(index, layer, streams)` leads them through one and keeps its unit.

    Layers that the work folder holds already are passed over.
    """
    following = work.about(_STREAMS)
    if following is None:
        streams, following = texts.enter(stack), 0
    else:
        streams = {name: tensor.clone() for name, tensor in work.tensors(_STREAMS).items()}
        # one sequence more, for what the model gives its layers beside the hidden states
        texts.enter(stack, 1)
    progress(following, len(units), "")
    for index in range(following, len(units)):
        with stack.layer(index) as layer:
            change(index, layer, streams)
        work.save(_STREAMS, streams, index + 1)
        progress(index + 1, len(units), units[index].label)
    return streams


def perplexities(stack: Stack, texts: Texts, streams: Mapping[str, Tensor]) -> dict[str, Any]:
    """Perplexity before and after on the evaluation text, and its tokens; empty without one."""
    if texts.evaluation is None:
        return {}
    ids = texts.evaluation.ids
    return {
        "perplexity_before": perplexity(stack.loss(ids, streams["original"])),
        "perplexity_after": perplexity(stack.loss(ids, streams["changed"])),
        "evaluation_tokens": ids.shape[0] * (ids.shape[1] - 1),
    }


def perplexity(loss: float) -> float | None:
    """The perplexity of a mean negative log-likelihood, None where it is no finite number."""
    return math.exp(loss) if loss < 700 else None


class Accumulator(Protocol):
    """What sums up the inputs of a layer."""

    def add(self, x: Tensor) -> None:
        """Take in the inputs x (…, in)."""
        ...


A = TypeVar("A", bound=Accumulator)


class PerInput(Generic[A]):
    """One accumulator for each input of a layer; modules that are given the same tensor share it."""

    def __init__(self, make: Callable[[int, torch.device], A]) -> None:
        self._make = make
        self._of: dict[str, A] = {}
        self._owner: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def see(self, name: str, x: Tensor) -> None:
        """Take in an input of the module `name`."""
        if name not in self._owner:
            shared = self._last is not None and self._last[1] is x
            self._owner[name] = self._last[0] if shared and self._last else name
            if not shared:
                self._of[name] = self._make(x.shape[-1], x.device)
        if self._owner[name] == name:
            self._of[name].add(x)
            self._last = name, x

    def take(self, name: str) -> A | None:
        """The accumulator of the module `name`, None if it never ran."""
        owner = self._owner.get(name)
        return None if owner is None else self._of[owner]


class OutputErrors:
    """‖(W − Ŵ) X‖ and ‖W X‖ of the changed modules of a layer, summed over the first inputs they meet."""

    def __init__(self, source: Source, layer: nn.Module, linears: Mapping[str, Linear]) -> None:
        self._source, self._layer, self._linears = source, layer, linears
        self._rows = dict.fromkeys(linears, 0)
        self._sums = {name: [0.0, 0.0] for name in linears}

    def see(self, name: str, x: Tensor) -> None:
        """Take in an input of the module `name`."""
        if self._rows[name] >= MEASURED:
            return
        x = x.reshape(-1, x.shape[-1])
        self._rows[name] += x.shape[0]
        linear: Linear = self._linears[name]
        weight = self._source.weight(linear).float()
        changed: Any = self._layer.get_submodule(name).weight
        for place, matrix in enumerate((weight - (changed.T if linear.transposed else changed), weight)):
            self._sums[name][place] += float((x @ matrix.T).square().sum(dtype=torch.float64))

    def relative(self) -> dict[str, float]:
        """The relative error of each layer that saw an input, by its name in the model."""
        return {
            self._linears[name].name: math.sqrt(error / whole)
            for name, (error, whole) in self._sums.items()
            if whole > 0 and math.isfinite(error / whole)
        }


def _longest(source: Source) -> int | None:
    """How many tokens the model takes, None if it does not say."""
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    for name, module in source.model.named_modules():
        # RoBERTa counts positions from behind the padding's
        if (
            longest
            and name.endswith("position_embeddings")
            and getattr(module, "padding_idx", None) is not None
        ):
            return longest - module.padding_idx - 1
    return longest
