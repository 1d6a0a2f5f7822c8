"""Low-bit models in the formats of other engines: one file per engine, found by its name.

A file defines `PRECISION` (what its number types round), `SUFFIX` (empty where it writes a folder) and

* `check(source)`: raises when the engine's library is absent or it cannot take this model at all;
* `fit(source, name, allow_inexact)` → `Fit`: the weight of one low-bit layer as the engine will hold it;
* `write(source, target, fit)`: the file or folder, from such fits.

Every layer is fitted and compared with the model's own weight before anything is written. A fit is *exact* when
the engine computes with the same codes and differs by the rounding of its number types alone; *inexact* when it
moves the grid, as an integer zero-point does, or when numbers leave the range of their type. Inexact exports
are refused unless they are asked for.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modicum.compress.export._fit import Fit
from modicum.compress.export._source import LowBit, Source
from modicum.errors import ConfigError, InexactMergeError, did_you_mean
from modicum.store.atomic import write_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["ExportedModel", "Fit", "LayerError", "export_model", "formats"]

#: an update of this size, relative to the weight, is what adapters usually learn (1 to 3 %)
TYPICAL_UPDATE = 0.02
#: rounding to float16 costs a tenth of this; more means that numbers left the range of their type
_ROUNDING = 0.005
_WORST = 5


@dataclass(frozen=True)
class LayerError:
    """How far one layer of an export is from the model's."""

    name: str
    home: str
    exact: bool
    #: ‖engine's weight − weight‖ / ‖weight‖
    weight_error: float


@dataclass(frozen=True)
class ExportedModel:
    """What an export wrote, or would have, and how far the engine's weights are from the model's."""

    format: str
    output: Path
    #: files written, with their bytes
    files: dict[str, int]
    #: whether every layer keeps its codes and grid up to `precision`
    exact: bool
    #: the number types that round
    precision: str
    #: over the low-bit layers, relative to each layer's weight
    max_weight_error: float
    mean_weight_error: float
    #: what the largest error is of an update of 2 % of the weight, which is what an adapter learns
    max_update_error: float
    worst_layers: tuple[LayerError, ...]
    notes: tuple[str, ...]
    dry_run: bool = False


def formats() -> tuple[str, ...]:
    """The names of the formats, as `export_model` takes them."""
    names = (info.name for info in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in names if not name.startswith("_")))


def export_model(
    model: Any,
    tokenizer: Any,
    output: str | os.PathLike,
    fmt: str,
    allow_inexact: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> ExportedModel:
    """What was written: `model` with `tokenizer` in the format `fmt`; a dry run fits every layer and stops there.

    Raises:
        ConfigError: unknown format, the output exists, or the engine has no place for this model.
        InexactMergeError: some layer would be moved off its grid; nothing was written.
        MissingExtraError: the engine's library is not installed.
    """
    engine = _engine(fmt)
    target = Path(output)
    if engine.SUFFIX and not target.suffix:
        target = target.with_suffix(engine.SUFFIX)
    _check_free(target, bool(engine.SUFFIX), overwrite)
    source = Source(model, tokenizer)
    engine.check(source)
    errors, notes = _measured(source, engine, allow_inexact)
    if not allow_inexact and not all(error.exact for error in errors):
        raise InexactMergeError(_refusal(fmt, errors))
    files: dict[str, int] = {}
    if not dry_run:
        write = _write_file if engine.SUFFIX else write_folder
        write(
            target,
            lambda place: engine.write(source, place, lambda name: engine.fit(source, name, allow_inexact)),
        )
        files = {target.name: target.stat().st_size} if target.is_file() else _sizes(target)
    worst = sorted(errors, key=lambda error: -error.weight_error)
    values = [error.weight_error for error in errors]
    largest = max(values, default=0.0)
    return ExportedModel(
        format=fmt,
        output=target,
        files=files,
        exact=all(error.exact for error in errors),
        precision=engine.PRECISION,
        max_weight_error=largest,
        mean_weight_error=sum(values) / max(1, len(values)),
        max_update_error=largest / TYPICAL_UPDATE,
        worst_layers=tuple(worst[:_WORST]),
        notes=notes,
        dry_run=dry_run,
    )


@torch.no_grad()
def _measured(
    source: Source, engine: ModuleType, allow_inexact: bool
) -> tuple[list[LayerError], tuple[str, ...]]:
    errors, notes = [], Counter[str]()
    for name in source.low_bit:
        weight, fit = source.weight(name), engine.fit(source, name, allow_inexact)
        assert isinstance(weight, LowBit)
        wanted = weight.decoded()
        off = float((fit.decoded - wanted).norm() / wanted.norm().clamp_min(1e-30))
        errors.append(LayerError(name, fit.home, fit.exact and off <= _ROUNDING, off))
        notes[fit.note] += 1
    del notes[""]
    return errors, tuple(f"{count} of {len(errors)} layers: {note}" for note, count in notes.items())


def _refusal(fmt: str, errors: list[LayerError]) -> str:
    inexact = sorted((e for e in errors if not e.exact), key=lambda error: -error.weight_error)
    shown = ", ".join(f"{e.name} {e.weight_error:.2%}" for e in inexact[:3])
    worst = inexact[0].weight_error
    return (
        f"{fmt} cannot hold {len(inexact)} of {len(errors)} low-bit layers on their own grid; {inexact[0].home} would "
        f"change their weights by up to {worst:.2%} ({shown}), {worst / TYPICAL_UPDATE:.1f} times an adapter's usual "
        f"update of {TYPICAL_UPDATE:.0%}. Choose a format with float offsets (gguf, onnx, openvino), or pass "
        "--allow-inexact. Nothing was written"
    )


def _engine(fmt: str) -> ModuleType:
    if fmt not in formats():
        raise ConfigError(f"no format {fmt!r}{did_you_mean(fmt, formats())}; known: {', '.join(formats())}")
    return importlib.import_module(f"{__name__}.{fmt.replace('-', '_')}")


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def _check_free(target: Path, is_file: bool, overwrite: bool) -> None:
    if not target.exists() or (not is_file and target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"{target} exists already; choose another output or pass --overwrite")
    # replacing a folder deletes all of it, so it has to look like an export
    if is_file != target.is_file() or not (is_file or (target / "config.json").is_file()):
        raise ConfigError(f"{target} is no earlier export, so it is not replaced; choose another output")


def _write_file(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a file aside, flush it, and rename it to `path`, replacing what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        aside = Path(folder) / path.name
        fill(aside)
        with aside.open("rb") as stream:
            os.fsync(stream.fileno())
        aside.replace(path)
