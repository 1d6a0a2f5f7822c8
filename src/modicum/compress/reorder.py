"""The units of every width in the order of their importance, most important first; the model computes the same.

    importance of unit u = √ E‖W_u x_u‖²

W_u are the columns of the consumer (an MLP's down projection, the attention's output projection) that take the unit's
outputs x_u: what the unit adds to the residual stream. Without text: the norms of the unit's weights multiplied.
Sub-networks are prefixes, so that what they leave out first is then what matters least.

A permutation of the producers' rows and the same one of the consumers' columns cancel out. Heads go in whole groups
that share keys and values, and their inner order stays, which rotary positions need.
"""

from __future__ import annotations

import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modicum.adapters.merge_report import TOLERANCES, relative_error
from modicum.compress.calibration import calibration_sequences
from modicum.compress.layerwise import opened
from modicum.compress.source import Source
from modicum.compress.writing import write_shards
from modicum.errors import ConfigError, InexactMergeError, did_you_mean, not_among, too_low
from modicum.models.architecture import read_config
from modicum.models.families import widths
from modicum.models.loading import load_tokenizer, quiet_transformers
from modicum.models.subnetwork import is_transposed
from modicum.store.atomic import write_folder, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from modicum.compress.calibration import Sequences
    from modicum.models.families import Port, Width

KINDS = ("mlp", "heads")
IMPORTANCES = ("activations", "weights")
REPORT = "reorder_report.json"
#: of the units of a width, for which the report says how much of all importance they hold
SHARES = (0.25, 0.5, 0.75, 0.9)
#: sequences that the logits are compared on
_COMPARED = 8


@dataclass(frozen=True)
class ReorderOptions:
    """What is put in order, and by what. `faults()` says what is wrong, all of it."""

    #: mlp (channels), heads (groups of heads that share keys and values)
    kinds: tuple[str, ...] = KINDS
    #: activations: what units contribute on text; weights: products of norms
    importance: str = "activations"
    #: text files or `hub:NAME` data sets to measure on; the bundled task without
    calibration: tuple[Path | str, ...] = ()
    sequences: int = 64
    #: tokens in a sequence
    sequence_length: int = 256

    def faults(self) -> list[str]:
        """What is wrong with the options by themselves; empty if fine."""
        faults = [
            f"kinds: {kind!r}{did_you_mean(kind, KINDS)}, must be among {', '.join(KINDS)}"
            for kind in self.kinds
            if kind not in KINDS
        ]
        if not self.kinds:
            faults.append(f"kinds is empty; there are {', '.join(KINDS)}")
        faults += not_among("importance", self.importance, IMPORTANCES)
        faults += too_low(self, {"sequences": 1, "sequence_length": 2})
        return faults


@dataclass(frozen=True)
class ReorderedWidth:
    """One width before and after."""

    name: str
    kind: str
    units: int
    #: part of all importance that the first units hold, for each of `SHARES`
    before: list[float]
    after: list[float]


@dataclass(frozen=True)
class ReorderReport:
    """What a reordering wrote."""

    model: str
    output: str
    #: where the text came from that importance and logits were measured on
    text: str
    importance: str
    shares: tuple[float, ...]
    widths: list[ReorderedWidth]
    #: of the logits (of hidden states, for a model without a head) of the folder as written
    tokens: int
    max_difference: float
    #: ‖difference‖ / ‖logits‖
    logit_error: float


def reorder_model(
    model: str, output: str | Path, options: ReorderOptions | None = None, *, overwrite: bool = False
) -> ReorderReport:
    """The report of reordering `model` (a folder, a hub name or 'embedded') into the new folder `output`.

    Weights keep their values bit for bit, only places change. The folder as written is run against the original
    before it appears.

    Raises:
        ConfigError: the model, the options or the output will not do; everything that is wrong.
        DataError: the text will not do.
        InexactMergeError: the logits changed by more than the order of summation explains; nothing was written.
    """
    options, target = options or ReorderOptions(), Path(output).expanduser()
    faults = options.faults()
    if target.exists() and not overwrite:
        faults.append(f"{target} exists already; choose another name or pass --overwrite")
    if getattr(read_config(model), "quantization_config", None):
        faults.append(
            "it is quantized, and its scales belong to columns in their order: reorder the original first"
        )
    if faults:
        raise ConfigError(f"cannot reorder {model}: {'; '.join(faults)}")
    with opened(model, target, faults, "reorder") as source:
        chosen, text = _planned(model, source, options, faults)
        original = _loaded(source, source.folder)
        importance = _importance(original, chosen, text.ids, options.importance)
        orders = {name: scores.argsort(descending=True, stable=True) for name, scores in importance.items()}
        expected = _outputs(original, text.ids[:_COMPARED])
        del original
        found: list[ReorderReport] = []

        def fill(folder: Path) -> None:
            _write(source, folder, _moved(source, chosen, orders))
            error, largest = _compared(_outputs(_loaded(source, folder), text.ids[:_COMPARED]), expected)
            report = ReorderReport(
                model=model,
                output=str(output),
                text=text.source,
                importance=options.importance,
                shares=SHARES,
                widths=[_reported(width, importance[width.name], orders[width.name]) for width in chosen],
                tokens=text.ids[:_COMPARED].numel(),
                max_difference=largest,
                logit_error=error,
            )
            write_text(folder / REPORT, json.dumps(asdict(report), indent=2) + "\n")
            found.append(report)

        write_folder(target, fill)
    return found[0]


def check_reorder(model: str, options: ReorderOptions) -> None:
    """Returns when `model` can be reordered, as far as its shapes and the text tell.

    Raises:
        ConfigError, DataError: as `reorder_model` does.
    """
    with Source(model) as source:
        _planned(model, source, options, [])


def _planned(
    model: str, source: Source, options: ReorderOptions, faults: list[str]
) -> tuple[list[Width], Sequences]:
    """The widths that are put in order, and the text to judge them by; `faults` are those that are known already."""
    chosen = [width for width in widths(source.model) if width.kind in options.kinds]
    if not chosen:
        faults.append(f"it has no {' or '.join(options.kinds)} that can be moved")
    if faults:
        raise ConfigError(f"cannot reorder {model}: {'; '.join(faults)}")
    tokenizer, length = load_tokenizer(model), options.sequence_length
    return chosen, calibration_sequences(options.calibration, tokenizer, options.sequences, length)


def _loaded(source: Source, folder: Path) -> Any:
    with quiet_transformers():
        return type(source.model).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _outputs(model: Any, ids: Tensor) -> Tensor:
    """Logits, or hidden states where there is no head, float64."""
    return torch.cat([model(input_ids=row[None])[0].double() for row in ids])


@torch.no_grad()
def _importance(model: Any, chosen: Sequence[Width], ids: Tensor, kind: str) -> dict[str, Tensor]:
    """The importance (units,) of each width by name."""
    if kind == "weights":
        return {width.name: _weight_importance(model, width) for width in chosen}
    grams = {width.name: torch.zeros(()) for width in chosen}
    with _watching(model, chosen, grams):
        for row in ids:
            model(input_ids=row[None])
    tokens = ids.numel()
    result = {}
    for width in chosen:
        # (units, out, n) and (units, n, n)
        consumer = _units(_rows(model, width.inputs[0].layer).T, width.inputs[0], 0, width.units).transpose(
            1, 2
        )
        energy = ((consumer @ (grams[width.name] / tokens)) * consumer).sum((1, 2))
        result[width.name] = energy.clamp(min=0).sqrt()
    return result


@contextmanager
def _watching(model: Any, chosen: Sequence[Width], grams: dict[str, Tensor]) -> Iterator[None]:
    """While open, the second moments (units, n, n) of each unit's outputs are added up over all tokens."""

    def hook(width: Width) -> Any:
        def see(_: Any, inputs: tuple) -> None:
            x = _units(inputs[0].float().flatten(0, -2).T, width.inputs[0], 0, width.units)
            grams[width.name] = grams[width.name] + x @ x.transpose(1, 2)

        return see

    handles = [model.get_submodule(w.inputs[0].layer).register_forward_pre_hook(hook(w)) for w in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight_importance(model: Any, width: Width) -> Tensor:
    """Products of norms: of all producers of channels; of the values alone for heads, which the weights pass on."""
    consumer = width.inputs[0]
    score = _units(_rows(model, consumer.layer).T, consumer, 0, width.units).norm(dim=(1, 2))
    parts = [(port, part) for port in width.outputs for part in range(len(port.parts))]
    for port, part in parts if width.kind == "mlp" else parts[-1:]:
        score = score * _units(_rows(model, port.layer), port, part, width.units).norm(dim=(1, 2))
    return score


def _rows(model: Any, layer: str) -> Tensor:
    """The weight of a layer as (out, in), float32."""
    module = model.get_submodule(layer)
    weight = module.weight.detach().float()
    return weight.T if is_transposed(module) else weight


def _units(tensor: Tensor, port: Port, part: int, units: int) -> Tensor:
    """One part of a tensor (rows, columns) as (units, rows of a unit, columns)."""
    start, size = port.parts[part]
    return tensor[start : start + units * size].reshape(units, size, -1)


def _moved(source: Source, chosen: Sequence[Width], orders: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the checkpoint whose rows or columns have new places, by key."""
    moved: dict[str, Tensor] = {}
    for width in chosen:
        for port, side in [(port, 0) for port in width.outputs] + [(port, 1) for port in width.inputs]:
            turned = is_transposed(source.model.get_submodule(port.layer))
            index = _index(port, orders[width.name])
            for part in ("weight", "bias"):
                key = source.key(f"{port.layer}.{part}")
                if key is None or (part == "bias" and side == 1):
                    continue
                dim = 0 if part == "bias" else side ^ turned
                moved[key] = moved.get(key, source.tensor(key)).index_select(dim, index).contiguous()
    return moved


def _index(port: Port, order: Tensor) -> Tensor:
    """Where each row (column) of the reordered layer was before."""
    runs = [start + order[:, None] * size + torch.arange(size) for start, size in port.parts]
    return torch.cat([run.flatten() for run in runs])


def _write(source: Source, folder: Path, moved: dict[str, Tensor]) -> None:
    write_shards(
        folder, {key: moved[key] if key in moved else source.tensor(key) for key in sorted(source.files)}
    )
    write_text(folder / "config.json", json.dumps(source.raw, indent=2, ensure_ascii=False) + "\n")
    for file in source.beside():
        shutil.copyfile(file, folder / file.name)


def _compared(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """‖difference‖ / ‖expected‖ and the largest difference.

    Raises:
        InexactMergeError: more than the order of summation explains.
    """
    error = relative_error(found, expected)
    if not error <= TOLERANCES["float32"]:
        raise InexactMergeError(
            f"the reordered model's outputs differ by {error:.2%}, which the order of summation does not explain. "
            "Nothing was written"
        )
    return error, (found - expected).abs().max().item()


def _reported(width: Width, importance: Tensor, order: Tensor) -> ReorderedWidth:
    def held(scores: Tensor) -> list[float]:
        first = [max(1, math.ceil(share * width.units)) for share in SHARES]
        return [(scores[:count].sum() / scores.sum()).item() for count in first]

    return ReorderedWidth(width.name, width.kind, width.units, held(importance), held(importance[order]))
