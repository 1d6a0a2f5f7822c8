"""From a checkpoint folder to one with zeros among its weights, with one layer in memory at a time.

Wanda streams the model (`layerwise.go_through`): the calibration sequences pass through the layers that are sparse
already, so that the scores of each layer belong to the inputs it will meet. All matrices of one decoder or encoder
layer are scored on its inputs as they are before any of them is changed, as in the paper. Magnitude streams only to
evaluate, and goes matrix by matrix otherwise. Finished layers are kept beside the output (`work.Work`), from where
a run resumes.

Source: Sun et al., arXiv 2306.11695.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from modicum._version import __version__
from modicum.compress.layerwise import OutputErrors, PerInput, go_through, identity, perplexities
from modicum.compress.source import Linear, Source
from modicum.compress.sparsify_plan import Plan
from modicum.compress.sparsify_report import REPORT, LayerReport, SparsifyOptions, SparsityReport
from modicum.compress.streaming import Stack, watching
from modicum.compress.work import Work
from modicum.compress.writing import write_folder
from modicum.errors import ConfigError, ModicumError, listing
from modicum.ops.sparsity import InputNorms, magnitude_scores, mask, mask_n_m, wanda_scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from modicum.compress.layerwise import Unit


def sparsify_model(
    model: str,
    output: str | Path,
    options: SparsifyOptions | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> SparsityReport:
    """The report of zeroing weights of `model` (a folder, a hub name or 'embedded') into the new folder `output`.

    `output` is a dense model like the original, in the same types, and appears only when it is complete. An
    unfinished run leaves `OUTPUT.partial`, with which `resume` goes on. With `dry_run` the report is the plan, and
    nothing is written. `progress(done, total, name)` is called before the first layer and after each.

    Raises:
        ConfigError: the model, the options, the texts or the output will not do; everything that is wrong.
        CorruptAdapterError: the weights are damaged.
    """
    started = time.monotonic()
    options, work = options or SparsifyOptions(), Work(Path(output).expanduser())
    faults = options.faults()
    fault = work.fault(resume=resume, overwrite=overwrite, resumable=True)
    faults += [fault] if fault else []
    try:
        source = Source(model)
    except ModicumError as error:
        if not faults:
            raise
        raise ConfigError(f"cannot sparsify {model}: {'; '.join([str(error), *faults])}") from error
    with source:
        if work.output.resolve() == source.folder.resolve():
            faults.append("the output is the model itself; write to another folder")
        plan = Plan.of(source, options)
        faults += plan.faults
        if not dry_run:
            faults += plan.faults_of_weights(source)
        if faults:
            raise ConfigError(f"cannot sparsify {model}: {'; '.join(faults)}")
        if dry_run:
            return _report(model, output, plan, plan.layers(), source, dry_run=True)
        work.begin(identity(source, options.as_json(), plan.texts), resume=resume)
        job = _Job(source, plan, work, progress or (lambda *_: None))
        measured = job.run()
        layers = [layer for unit in plan.units for layer in job.reports(unit)]
        report = _report(
            model, output, plan, layers, source, **measured, seconds=round(time.monotonic() - started, 3)
        )
        write_folder(source, work, plan, None, report, REPORT)
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
        """Sparsify what is not finished yet; what was measured on the evaluation text."""
        plan = self.plan
        if plan.streamed:
            stack = Stack(self.source)
            streams = go_through(
                stack,
                plan.texts,
                plan.units,
                self.work,
                lambda index, layer, streams: self._layer(index, layer, stack, streams),
                self.progress,
            )
            return perplexities(stack, plan.texts, streams)
        self.progress(0, len(plan.units), "")
        for index, unit in enumerate(plan.units):
            if self.work.about(unit.name) is None:
                self._keep(unit, {linear: self._sparse(linear, None) for linear in unit.linears}, {})
            self.progress(index + 1, len(plan.units), unit.label)
        return {}

    def reports(self, unit: Unit) -> list[LayerReport]:
        """The reports of a finished unit."""
        return [LayerReport.read(about) for about in self.work.about(unit.name)]

    def _layer(self, index: int, layer: nn.Module, stack: Stack, streams: dict[str, Tensor]) -> None:
        """Sparsify one layer of the model in place and lead all streams through it."""
        unit, prefix = self.plan.units[index], f"{stack.names[index]}."
        inside = {linear.name.removeprefix(prefix): linear for linear in unit.linears}
        if "original" in streams:
            stack.advance(index, streams["original"])
        inputs = PerInput(InputNorms)
        if "calibration" in streams:
            with watching(layer, list(inside), inputs.see):
                stack.advance(index, streams["calibration"], keep=False)
        done = {}
        for name, linear in inside.items():
            done[linear] = self._sparse(linear, inputs.take(name), layer.get_submodule(name))
        errors = OutputErrors(self.source, layer, inside)
        for number, name in enumerate(stream for stream in ("changed", "calibration") if stream in streams):
            with watching(layer, list(inside) if number == 0 else [], errors.see):
                stack.advance(index, streams[name])
        self._keep(unit, done, errors.relative())

    def _sparse(
        self, linear: Linear, inputs: InputNorms | None, module: nn.Module | None = None
    ) -> tuple[Tensor, LayerReport]:
        """What is stored of a layer, and its report; `module` gets the sparse weight."""
        started, weight = time.monotonic(), self.source.weight(linear)
        sparse = weight.masked_fill(~self._mask(linear, weight, inputs), 0)
        value, whole = sparse.float(), weight.float()
        norms = [float(torch.linalg.vector_norm(m, dtype=torch.float64)) for m in (whole - value, whole)]
        if module is not None:
            module.weight = nn.Parameter(value.T if linear.transposed else value, requires_grad=False)
        report = LayerReport(
            linear.name,
            linear.shape,
            (sparse.numel() - int(torch.count_nonzero(sparse))) / sparse.numel(),
            "magnitude" if inputs is None else "wanda",
            weight_error=norms[0] / norms[1] if norms[1] else 0.0,
            seconds=round(time.monotonic() - started, 4),
        )
        return (sparse.T if linear.transposed else sparse).contiguous(), report

    def _mask(self, linear: Linear, weight: Tensor, inputs: InputNorms | None) -> Tensor:
        """Which weights stay, (out, in)."""
        if inputs is None:
            scores = magnitude_scores(weight)
        else:
            norms = inputs.norms()
            if not bool(torch.isfinite(norms).all()):
                raise ConfigError(f"{linear.name}: the calibration inputs hold NaN or infinite numbers")
            scores = wanda_scores(weight, norms)
        if self.options.n_m is not None:
            return mask_n_m(scores, *self.options.n_m)
        per = "layer" if self.options.compared == "layer" else "row"
        return mask(scores, self.plan.ratios[linear.name], per)

    def _keep(
        self, unit: Unit, done: dict[Linear, tuple[Tensor, LayerReport]], errors: dict[str, float]
    ) -> None:
        tensors = {linear.key: tensor for linear, (tensor, _) in done.items()}
        abouts = [{**asdict(report), "output_error": errors.get(report.name)} for _, report in done.values()]
        self.work.save(unit.name, tensors, abouts)


def _report(
    model: str,
    output: str | Path,
    plan: Plan,
    layers: list[LayerReport],
    source: Source,
    **measured: Any,
) -> SparsityReport:
    sizes = {key: source.tensor(key).numel() for key in source.files}
    changed = {linear.key for linear in plan.linears}
    weights = sum(math.prod(layer.shape) for layer in layers)
    calibration, evaluation = plan.texts.calibration, plan.texts.evaluation
    unseen = [layer.name for layer in layers if layer.algorithm != plan.options.algorithm]
    notes = [f"no calibration text reached {listing(unseen)}: zeroed by magnitude"] if unseen else []
    return SparsityReport(
        model=model,
        output=str(output),
        options=plan.options.as_json(),
        sparsity=sum(layer.sparsity * math.prod(layer.shape) for layer in layers) / weights,
        weights=weights,
        kept_weights=sum(size for key, size in sizes.items() if key not in changed),
        layers=layers,
        calibration=None if calibration is None else calibration.source,
        calibration_tokens=0 if calibration is None else calibration.ids.numel(),
        evaluation=None if evaluation is None else evaluation.source,
        notes=[*plan.notes, *notes],
        modicum_version=__version__,
        **measured,
    )
