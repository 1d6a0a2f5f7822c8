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
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from modicum._version import __version__
from modicum.compress.layerwise import change_layer, go_through, identity, one_by_one, opened, perplexities
from modicum.compress.sparsify_plan import Plan
from modicum.compress.sparsify_report import REPORT, LayerReport, SparsifyOptions, SparsityReport
from modicum.compress.streaming import Stack
from modicum.compress.work import Work
from modicum.compress.writing import write_folder
from modicum.errors import ConfigError, listing
from modicum.ops.sparsity import InputNorms, magnitude_scores, mask, mask_n_m, wanda_scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from modicum.compress.layerwise import Unit
    from modicum.compress.source import Linear, Source


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
    with opened(model, work.output, faults, "sparsify") as source:
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
        if not plan.streamed:
            one_by_one(plan.units, self.work, self._sparse, self.progress)
            return {}
        stack = Stack(self.source)

        def change(index: int, streams: dict[str, Tensor]) -> None:
            change_layer(stack, index, plan.units[index], streams, InputNorms, self._sparse, self.work)

        streams = go_through(stack, plan.texts, plan.units, self.work, change, self.progress)
        return perplexities(stack, plan.texts, streams)

    def reports(self, unit: Unit) -> list[LayerReport]:
        """The reports of a finished unit."""
        return [LayerReport.read(about) for about in self.work.about(unit.name)]

    def _sparse(
        self, linear: Linear, inputs: InputNorms | None, module: nn.Module | None = None
    ) -> tuple[dict[str, Tensor], LayerReport]:
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
        return {linear.key: (sparse.T if linear.transposed else sparse).contiguous()}, report

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
        notes=[*plan.notes, *notes],
        modicum_version=__version__,
        **plan.texts.reported(),
        **measured,
    )
