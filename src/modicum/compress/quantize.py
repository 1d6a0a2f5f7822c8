"""From a checkpoint folder to a quantized one, with one decoder layer in memory at a time.

Causal language models are streamed (`layerwise.go_through`): the calibration sequences pass through the layers that
are quantized already, so that each layer is fitted to the inputs it will meet. The output head, where it is asked
for, is fitted to what comes out behind the last layer. Other models, and runs that need no text, go matrix by
matrix. Finished layers are kept beside the output (`work.Work`), from where a run resumes.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from modicum._version import __version__
from modicum.compress.bitsandbytes import faults_of, quantize_with_bitsandbytes
from modicum.compress.layerwise import (
    MEASURED,
    OutputErrors,
    PerInput,
    change_layer,
    go_through,
    identity,
    keep,
    one_by_one,
    opened,
    perplexities,
)
from modicum.compress.quantize_plan import Plan
from modicum.compress.quantize_report import (
    FOREIGN,
    LayerReport,
    QuantizationReport,
    QuantizeOptions,
    bits_of,
)
from modicum.compress.rounding import Rounded, rounded
from modicum.compress.streaming import Stack, watching
from modicum.compress.work import Work
from modicum.compress.writing import write_folder
from modicum.errors import ConfigError
from modicum.ops.affine import Grid, decode, pack, unpack
from modicum.ops.gptq import Hessian
from modicum.quant.huggingface import AffineConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from modicum.compress.layerwise import Unit
    from modicum.compress.source import Linear, Source


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
    with opened(model, work.output, faults, "quantize") as source:
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
        work.begin(identity(source, options.as_json(), plan.texts), resume=resume)
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
        plan = self.plan
        if not plan.streamed:
            one_by_one(plan.units, self.work, self._quantized, self.progress)
            return {}
        stack = Stack(self.source)

        def change(index: int, streams: dict[str, Tensor]) -> None:
            unit = plan.units[index]
            if index < len(stack.names):
                change_layer(stack, index, unit, streams, Hessian, self._quantized, self.work)
            else:
                self._head(unit, stack, streams)

        streams = go_through(stack, plan.texts, plan.units, self.work, change, self.progress)
        head = len(plan.units) > len(stack.names) and plan.texts.evaluation is not None
        return perplexities(stack, plan.texts, streams, self._stored_weight(plan.units[-1]) if head else None)

    def reports(self, unit: Unit) -> list[LayerReport]:
        """The reports of a finished unit."""
        return [LayerReport.read(about) for about in self.work.about(unit.name)]

    def _head(self, unit: Unit, stack: Stack, streams: dict[str, Tensor]) -> None:
        """Quantize the output head; its inputs are what the final norm makes of the finished hidden states."""
        (linear,), texts = unit.linears, self.plan.texts
        hessians, module = PerInput(Hessian), stack.model.get_submodule(linear.name)
        if texts.calibration is not None:
            with watching(stack.model, [linear.name], hessians.see):
                stack.loss(texts.calibration.ids, streams["calibration"])
        done = {linear: self._quantized(linear, hessians.take(linear.name), module)}
        errors = OutputErrors(self.source, stack.model, {linear.name: linear})
        text, hidden = (
            texts.evaluation or texts.calibration,
            streams.get("changed", streams.get("calibration")),
        )
        if text is not None and hidden is not None:
            few = -(-MEASURED // text.ids.shape[1])
            with watching(stack.model, [linear.name], errors.see):
                stack.loss(text.ids[:few], hidden, module.weight)
        keep(self.work, unit, done, errors.relative())

    def _stored_weight(self, unit: Unit) -> Tensor:
        """The weight that the only layer of a finished unit has."""
        (linear,), spec, stored = unit.linears, self.options.spec, self.work.tensors(unit.name)
        grid = Grid(stored[f"{linear.stored}.scales"], stored.get(f"{linear.stored}.offsets"))
        codes = unpack(stored[f"{linear.stored}.codes"], spec.bits, linear.shape[1])
        return decode(codes, grid, spec.bits, spec.block)

    def _quantized(
        self, linear: Linear, inputs: Hessian | None, module: nn.Module | None = None
    ) -> tuple[dict[str, Tensor], LayerReport]:
        """What is stored of a layer, and its report; `module` gets the quantized weight."""
        started, spec, weight = time.monotonic(), self.options.spec, self.source.weight(linear).float()
        try:
            found = rounded(weight, None if inputs is None else inputs.matrix(), self.options)
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


def _stored(linear: Linear, bits: int, found: Rounded) -> dict[str, Tensor]:
    tensors = {
        "codes": pack(found.codes, bits),
        "scales": found.grid.scales,
        "offsets": found.grid.offsets,
        "residuals": found.residuals,
    }
    return {f"{linear.stored}.{name}": tensor for name, tensor in tensors.items() if tensor is not None}


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
        notes=plan.notes,
        modicum_version=__version__,
        **plan.texts.reported(),
        **measured,
    )
