"""From a checkpoint folder to a quantized one, with one decoder layer in memory at a time.

Causal language models are streamed (`streaming.Stack`): the calibration sequences pass through the layers that
are quantized already, so that each layer is fitted to the inputs it will meet; the evaluation text runs in two
streams, one through the original layers and one through the quantized ones. The output head, where it is asked
for, is fitted to what comes out behind the last layer. Other models, and runs that need no
text, go matrix by matrix. Finished layers are kept beside the output (`work.Work`), from where a run resumes.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from modicum._version import __version__
from modicum.compress.bitsandbytes import faults_of, quantize_with_bitsandbytes
from modicum.compress.quantize_plan import Plan, Texts, Unit
from modicum.compress.quantize_report import (
    FOREIGN,
    LayerReport,
    QuantizationReport,
    QuantizeOptions,
    bits_of,
    perplexity,
)
from modicum.compress.rounding import Rounded, rounded
from modicum.compress.source import Linear, Source
from modicum.compress.streaming import Stack, watching
from modicum.compress.work import Work
from modicum.compress.writing import write_folder
from modicum.errors import ConfigError, ModicumError
from modicum.ops.affine import Grid, decode, pack, unpack
from modicum.ops.gptq import Hessian
from modicum.quant.huggingface import AffineConfig

if TYPE_CHECKING:
    from collections.abc import Callable

#: tokens that output errors are measured on
_MEASURED = 2048
_STREAMS = "streams"


def quantize_model(
    model: str,
    output: str | Path,
    options: QuantizeOptions | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> QuantizationReport:
    """The report of quantizing `model` (a folder, a hub name or 'embedded') into the new folder `output`.

    `output` appears only when it is complete. An unfinished run leaves `OUTPUT.partial`, with which `resume` goes
    on. With `dry_run` the report is the plan, and nothing is written. `progress(done, total, name)` is called before
    the first layer and after each.

    Raises:
        ConfigError: the model, the options, the texts or the output will not do; everything that is wrong.
        CorruptAdapterError: the weights are damaged.
    """
    started = time.monotonic()
    options, work = options or QuantizeOptions(), Work(Path(output).expanduser())
    foreign = options.algorithm in FOREIGN
    faults = options.faults() + (faults_of(options) if foreign else [])
    fault = work.fault(resume=resume and not foreign, overwrite=overwrite, resumable=not foreign)
    faults += [fault] if fault else []
    try:
        source = Source(model)
    except ModicumError as error:
        if not faults:
            raise
        raise ConfigError(f"cannot quantize {model}: {'; '.join([str(error), *faults])}") from error
    with source:
        if work.output.resolve() == source.folder.resolve():
            faults.append("the output is the model itself; write to another folder")
        if foreign:
            report = quantize_with_bitsandbytes(source, options, work, model, faults, dry_run=dry_run)
            if not dry_run:
                work.publish()
            return report
        plan = Plan.of(source, options)
        faults += plan.faults
        if not dry_run:
            faults += plan.faults_of_weights(source)
        if faults:
            raise ConfigError(f"cannot quantize {model}: {'; '.join(faults)}")
        if dry_run:
            return _report(model, output, plan, plan.layers(), source, dry_run=True)
        work.begin(_identity(source, plan), resume=resume)
        job = _Job(source, plan, work, progress or (lambda *_: None))
        measured = job.run()
        layers = [layer for unit in plan.units for layer in job.reports(unit)]
        report = _report(
            model, output, plan, layers, source, **measured, seconds=round(time.monotonic() - started, 3)
        )
        write_folder(source, work, plan, _config(plan), report)
        work.publish()
    return report


@final
class _Job:
    """The layers of a plan, one after the other."""

    def __init__(
        self, source: Source, plan: Plan, work: Work, progress: Callable[[int, int, str], None]
    ) -> None:
        self.source, self.plan, self.work, self.progress = source, plan, work, progress
        self.options = plan.options

    def run(self) -> dict[str, Any]:
        """Quantize what is not finished yet; what was measured on the evaluation text."""
        if self.plan.streamed:
            return self._stream()
        self.progress(0, len(self.plan.units), "")
        for index, unit in enumerate(self.plan.units):
            if self.work.about(unit.name) is None:
                self._keep(unit.name, {linear: self._quantized(linear, None) for linear in unit.linears}, {})
            self.progress(index + 1, len(self.plan.units), unit.label)
        return {}

    def reports(self, unit: Unit) -> list[LayerReport]:
        """The reports of a finished unit."""
        return [LayerReport.read(about) for about in self.work.about(unit.name)]

    def _stream(self) -> dict[str, Any]:
        stack, texts = Stack(self.source), self.plan.texts
        following = self.work.about(_STREAMS)
        if following is None:
            streams, following = _entered(stack, texts), 0
        else:
            streams = {name: tensor.clone() for name, tensor in self.work.tensors(_STREAMS).items()}
            # one sequence more, for what the model gives its layers beside the hidden states
            _entered(stack, texts, 1)
        total = len(self.plan.units)
        self.progress(following, total, "")
        for index in range(following, total):
            unit = self.plan.units[index]
            if index < len(stack.names):
                with stack.layer(index) as layer:
                    self._layer(index, layer, stack, streams)
            else:
                self._head(unit, stack, streams)
            self.work.save(_STREAMS, streams, index + 1)
            self.progress(index + 1, total, unit.label)
        if texts.evaluation is None:
            return {}
        ids = texts.evaluation.ids
        head = self._stored_weight(self.plan.units[-1]) if total > len(stack.names) else None
        return {
            "perplexity_before": perplexity(stack.loss(ids, streams["original"])),
            "perplexity_after": perplexity(stack.loss(ids, streams["quantized"], head)),
            "evaluation_tokens": ids.shape[0] * (ids.shape[1] - 1),
        }

    def _layer(self, index: int, layer: nn.Module, stack: Stack, streams: dict[str, Tensor]) -> None:
        """Quantize one decoder layer in place and lead all streams through it."""
        unit, prefix = self.plan.units[index], f"{stack.names[index]}."
        inside = {linear.name.removeprefix(prefix): linear for linear in unit.linears}
        if "original" in streams:
            stack.advance(index, streams["original"])
        hessians = _Hessians()
        if self.options.algorithm == "gptq":
            with watching(layer, list(inside), hessians.see):
                stack.advance(index, streams["calibration"], keep=False)
        done: dict[Linear, tuple[dict[str, Tensor], LayerReport]] = {}
        for name, linear in inside.items():
            done[linear] = self._quantized(linear, hessians.take(name), layer.get_submodule(name))
        errors = _OutputErrors(self.source, layer, inside)
        for number, name in enumerate(stream for stream in ("quantized", "calibration") if stream in streams):
            with watching(layer, list(inside) if number == 0 else [], errors.see):
                stack.advance(index, streams[name])
        self._keep(unit.name, done, errors.relative())

    def _head(self, unit: Unit, stack: Stack, streams: dict[str, Tensor]) -> None:
        """Quantize the output head; its inputs are what the final norm makes of the finished hidden states."""
        (linear,), texts = unit.linears, self.plan.texts
        hessians, module = _Hessians(), stack.model.get_submodule(linear.name)
        if texts.calibration is not None:
            with watching(stack.model, [linear.name], hessians.see):
                stack.loss(texts.calibration.ids, streams["calibration"])
        done = {linear: self._quantized(linear, hessians.take(linear.name), module)}
        errors = _OutputErrors(self.source, stack.model, {linear.name: linear})
        text, hidden = (
            texts.evaluation or texts.calibration,
            streams.get("quantized", streams.get("calibration")),
        )
        if text is not None and hidden is not None:
            few = -(-_MEASURED // text.ids.shape[1])
            with watching(stack.model, [linear.name], errors.see):
                stack.loss(text.ids[:few], hidden, module.weight)
        self._keep(unit.name, done, errors.relative())

    def _stored_weight(self, unit: Unit) -> Tensor:
        """The weight that the only layer of a finished unit has."""
        (linear,), spec, stored = unit.linears, self.options.spec, self.work.tensors(unit.name)
        grid = Grid(stored[f"{linear.stored}.scales"], stored.get(f"{linear.stored}.offsets"))
        codes = unpack(stored[f"{linear.stored}.codes"], spec.bits, linear.shape[1])
        return decode(codes, grid, spec.bits, spec.block)

    def _quantized(
        self, linear: Linear, hessian: Tensor | None, module: nn.Module | None = None
    ) -> tuple[dict[str, Tensor], LayerReport]:
        """What is stored of a layer, and its report; `module` gets the quantized weight."""
        started, spec, weight = time.monotonic(), self.options.spec, self.source.weight(linear).float()
        try:
            found = rounded(weight, hessian, self.options)
        except ConfigError as error:
            raise ConfigError(f"{linear.name}: {error}") from error
        value = decode(found.codes, found.grid, spec.bits, spec.block)
        lost, whole = (
            float(torch.linalg.vector_norm(m, dtype=torch.float64)) for m in (weight - value, weight)
        )
        zeros = weight == 0
        if module is not None:
            module.weight = nn.Parameter(value, requires_grad=False)
        about = {
            **asdict(LayerReport.planned(linear.name, linear.shape, spec)),
            "weight_error": lost / whole if whole else 0.0,
            "zeros": int(zeros.sum()),
            "sparsity": float(zeros.float().mean()),
            "zeros_kept": int((zeros & (value == 0)).sum()),
            "seconds": round(time.monotonic() - started, 4),
        }
        return _stored(linear, spec.bits, found), LayerReport.read(about)

    def _keep(
        self,
        name: str,
        done: dict[Linear, tuple[dict[str, Tensor], LayerReport]],
        errors: dict[str, float],
    ) -> None:
        tensors = {key: tensor for stored, _ in done.values() for key, tensor in stored.items()}
        abouts = [{**asdict(report), "output_error": errors.get(report.name)} for _, report in done.values()]
        self.work.save(name, tensors, abouts)


class _Hessians:
    """One Hessian for each input of a layer; modules that are given the same tensor share it."""

    def __init__(self) -> None:
        self._of: dict[str, Hessian] = {}
        self._owner: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def see(self, name: str, x: Tensor) -> None:
        """Take in an input of the module `name`."""
        if name not in self._owner:
            shared = self._last is not None and self._last[1] is x
            self._owner[name] = self._last[0] if shared and self._last else name
            if not shared:
                self._of[name] = Hessian(x.shape[-1], x.device)
        if self._owner[name] == name:
            self._of[name].add(x)
            self._last = name, x

    def take(self, name: str) -> Tensor | None:
        """The Hessian of the module `name`, None if it never ran."""
        owner = self._owner.get(name)
        return None if owner is None else self._of[owner].matrix()


class _OutputErrors:
    """‖(W − Ŵ) X‖ and ‖W X‖ of the quantized modules of a layer, summed over the first inputs they meet."""

    def __init__(self, source: Source, layer: nn.Module, linears: dict[str, Linear]) -> None:
        self._source, self._layer, self._linears = source, layer, linears
        self._rows = dict.fromkeys(linears, 0)
        self._sums = {name: [0.0, 0.0] for name in linears}

    def see(self, name: str, x: Tensor) -> None:
        """Take in an input of the module `name`."""
        if self._rows[name] >= _MEASURED:
            return
        x = x.reshape(-1, x.shape[-1])
        self._rows[name] += x.shape[0]
        weight = self._source.weight(self._linears[name]).float()
        quantized: Any = self._layer.get_submodule(name).weight
        for place, matrix in enumerate((weight - quantized, weight)):
            self._sums[name][place] += float((x @ matrix.T).square().sum(dtype=torch.float64))

    def relative(self) -> dict[str, float]:
        """The relative error of each layer that saw an input, by its name in the model."""
        return {
            self._linears[name].name: math.sqrt(error / whole)
            for name, (error, whole) in self._sums.items()
            if whole > 0 and math.isfinite(error / whole)
        }


def _entered(stack: Stack, texts: Texts, most: int | None = None) -> dict[str, Tensor]:
    """The hidden states of all streams in front of the first layer."""
    wanted = {"calibration": texts.calibration, "original": texts.evaluation}
    ids = {name: sequences.ids[:most] for name, sequences in wanted.items() if sequences is not None}
    streams = dict(zip(ids, stack.enter(*ids.values()), strict=True))
    if "original" in streams:
        streams["quantized"] = streams["original"].clone()
    return streams


def _stored(linear: Linear, bits: int, found: Rounded) -> dict[str, Tensor]:
    tensors = {
        "codes": pack(found.codes, bits),
        "scales": found.grid.scales,
        "offsets": found.grid.offsets,
        "residuals": found.residuals,
    }
    return {f"{linear.stored}.{name}": tensor for name, tensor in tensors.items() if tensor is not None}


def _identity(source: Source, plan: Plan) -> dict[str, Any]:
    """What has to be the same for a run to resume."""
    digests = {
        name: None if found is None else hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()
        for name, found in (
            ("calibration tokens", plan.texts.calibration),
            ("evaluation tokens", plan.texts.evaluation),
        )
    }
    files = {file.name: file.stat().st_size for file in sorted(set(source.files.values()))}
    return {**plan.options.as_json(), **digests, "weight files": files, "model config": source.raw}


def _config(plan: Plan) -> dict[str, Any]:
    spec = plan.options.spec
    return AffineConfig(
        bits=spec.bits,
        block=spec.block,
        zero_point=spec.zero_point,
        scale_dtype=spec.scale_dtype,
        offset_dtype=spec.offset_dtype,
        residuals=spec.residuals,
        algorithm=plan.options.algorithm,
        modules_to_not_convert=plan.dense,
    ).to_dict()


def _report(
    model: str,
    output: str | Path,
    plan: Plan,
    layers: list[LayerReport],
    source: Source,
    **measured: Any,
) -> QuantizationReport:
    sizes = {key: (tensor.numel(), tensor.nbytes) for key in source.files for tensor in [source.tensor(key)]}
    replaced = [linear.key for linear in plan.linears]
    before = sum(size for _, size in sizes.values())
    calibration, evaluation = plan.texts.calibration, plan.texts.evaluation
    return QuantizationReport(
        model=model,
        output=str(output),
        options=plan.options.as_json(),
        bits_per_weight=bits_of(layers),
        quantized_weights=sum(sizes[key][0] for key in replaced),
        kept_weights=sum(count for key, (count, _) in sizes.items() if key not in set(replaced)),
        bytes_before=before,
        bytes_after=before - sum(sizes[key][1] for key in replaced) + sum(layer.bytes for layer in layers),
        layers=layers,
        zeros=sum(layer.zeros for layer in layers),
        zeros_kept=sum(layer.zeros_kept for layer in layers),
        calibration=None if calibration is None else calibration.source,
        calibration_tokens=0 if calibration is None else calibration.ids.numel(),
        evaluation=None if evaluation is None else evaluation.source,
        notes=plan.notes,
        modicum_version=__version__,
        **measured,
    )
