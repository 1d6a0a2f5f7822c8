"""What quantizing and sparsifying have in common: units, texts, streams, inputs, errors, layer after layer.

Text runs in streams of hidden states: `calibration` through the layers as they are changed, so that each is fitted to
the inputs it will meet; the evaluation text through the `original` layers and through the `changed` ones. Without
text, the matrices are changed one by one. Either way each unit is kept as soon as it is finished (`work.Work`).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from modicum.compress.calibration import Sequences, calibration_sequences, evaluation_sequences
from modicum.compress.source import Source
from modicum.compress.streaming import watching
from modicum.errors import ConfigError, ModicumError
from modicum.models.loading import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from modicum.compress.source import Linear
    from modicum.compress.streaming import Stack
    from modicum.compress.work import Work

    class LayerReport(Protocol):
        """The report of one layer, a dataclass."""

        __dataclass_fields__: ClassVar[dict[str, Any]]

        @property
        def name(self) -> str: ...  # noqa: D102

    #: what is stored of a layer, and its report
    Changed = tuple[Mapping[str, Tensor], LayerReport]
    #: steps done, of how many, and the name of the last
    Progress = Callable[[int, int, str], None]

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


class Accumulator(Protocol):
    """What sums up the inputs of a layer."""

    def add(self, x: Tensor) -> None:
        """Take in the inputs x (…, in)."""
        ...


A = TypeVar("A", bound=Accumulator)


@contextlib.contextmanager
def opened(model: str, output: Path, faults: list[str], job: str) -> Iterator[Source]:
    """The checkpoint of `model`; what is wrong with it joins `faults`, which tell why `job` cannot be done.

    Raises:
        ConfigError: there is no such model, with the faults that were known before.
    """
    try:
        source = Source(model)
    except ModicumError as error:
        if not faults:
            raise
        raise ConfigError(f"cannot {job} {model}: {'; '.join([str(error), *faults])}") from error
    with source:
        if output.resolve() == source.folder.resolve():
            faults.append("the output is the model itself; write to another folder")
        yield source


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

    def notes(self, options: TextOptions) -> list[str]:
        """What is to be said of the calibration text."""
        if self.calibration is None:
            return []
        notes = []
        if not options.calibration:
            notes.append(
                "calibrated on the text that modicum bundles; text like the model's future input (--calibration) is "
                "better"
            )
        if len(self.calibration.ids) < options.sequences:
            notes.append(
                f"calibrated on {len(self.calibration.ids)} sequences of {options.sequence_length} tokens, all that "
                f"the text holds; {options.sequences} were asked for"
            )
        return notes

    def reported(self) -> dict[str, Any]:
        """What a report says of the texts."""
        calibration, evaluation = self.calibration, self.evaluation
        return {
            "calibration": None if calibration is None else calibration.source,
            "calibration_tokens": 0 if calibration is None else calibration.ids.numel(),
            "evaluation": None if evaluation is None else evaluation.source,
        }


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
    change: Callable[[int, dict[str, Tensor]], None],
    progress: Progress,
) -> dict[str, Tensor]:
    """The streams behind the last unit. `change(index, streams)` keeps a unit and leads the streams through its layer.

    Units that the work folder holds already are passed over.
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
        change(index, streams)
        work.save(_STREAMS, streams, index + 1)
        progress(index + 1, len(units), units[index].label)
    return streams


def change_layer(
    stack: Stack,
    index: int,
    unit: Unit,
    streams: dict[str, Tensor],
    make: Callable[[int, torch.device], A],
    change: Callable[[Linear, A | None, nn.Module], Changed],
    work: Work,
) -> None:
    """Change one layer of the model in place, lead all streams through it, and keep it as `unit`.

    `change(linear, inputs, module)` gives `module` its new weight. `inputs` is what `make(in_features, device)` made
    and the calibration text filled, before any module of the layer is changed; None where no text came.
    """
    inside = {linear.name.removeprefix(f"{stack.names[index]}."): linear for linear in unit.linears}
    with stack.layer(index) as layer:
        if "original" in streams:
            stack.advance(index, streams["original"])
        inputs = PerInput(make)
        if "calibration" in streams:
            with watching(layer, list(inside), inputs.see):
                stack.advance(index, streams["calibration"], keep=False)
        done = {
            linear: change(linear, inputs.take(name), layer.get_submodule(name))
            for name, linear in inside.items()
        }
        errors = OutputErrors(stack.source, layer, inside)
        for number, name in enumerate(stream for stream in ("changed", "calibration") if stream in streams):
            with watching(layer, list(inside) if number == 0 else [], errors.see):
                stack.advance(index, streams[name])
    keep(work, unit, done, errors.relative())


def one_by_one(
    units: Sequence[Unit], work: Work, change: Callable[[Linear, None], Changed], progress: Progress
) -> None:
    """Change the matrices of units that the work folder does not hold with `change(linear, None)`, and keep them."""
    progress(0, len(units), "")
    for index, unit in enumerate(units):
        if work.about(unit.name) is None:
            keep(work, unit, {linear: change(linear, None) for linear in unit.linears}, {})
        progress(index + 1, len(units), unit.label)


def keep(work: Work, unit: Unit, done: Mapping[Linear, Changed], errors: Mapping[str, float]) -> None:
    """Put a finished unit into the work folder: tensors, and reports with the output errors of their layers."""
    tensors = {key: tensor for stored, _ in done.values() for key, tensor in stored.items()}
    abouts = [{**asdict(report), "output_error": errors.get(report.name)} for _, report in done.values()]
    work.save(unit.name, tensors, abouts)


def perplexities(
    stack: Stack, texts: Texts, streams: Mapping[str, Tensor], head: Tensor | None = None
) -> dict[str, Any]:
    """Perplexity before and after on the evaluation text, and its tokens; empty without one.

    `head` is the weight of the output head after, where it is another than before.
    """
    if texts.evaluation is None:
        return {}
    ids = texts.evaluation.ids
    return {
        "perplexity_before": perplexity(stack.loss(ids, streams["original"])),
        "perplexity_after": perplexity(stack.loss(ids, streams["changed"], head)),
        "evaluation_tokens": ids.shape[0] * (ids.shape[1] - 1),
    }


def perplexity(loss: float) -> float | None:
    """The perplexity of a mean negative log-likelihood, None where it is no finite number."""
    return math.exp(loss) if loss < 700 else None


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
