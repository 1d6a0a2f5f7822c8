"""What merging an adapter costs: the same real tokens through the unmerged and the merged model.

A merged weight is rounded to the base model's dtype. bfloat16 keeps 8 bits of a weight, and an update smaller
than the last of them is lost; low-bit codes lose far more. So the error is set against two things: the logits,
and the adapter's own effect on them.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from modicum.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from peft import PeftModel
    from torch import Tensor, nn

#: relative error of the logits that rounding a weight to this dtype may cause
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
#: share of the adapter's effect that a merge may lose
LARGEST_LOSS = 0.25


@dataclass(frozen=True)
class LayerError:
    """How far the merged layer is from the unmerged one on the same inputs: ‖difference‖ / ‖output‖."""

    name: str
    error: float


@dataclass(frozen=True)
class MergeReport:
    """How far the merged model is from the unmerged one."""

    #: what the merged weights are rounded to
    dtype: str
    #: tokens (or, for a classifier, rows) that were compared
    tokens: int
    #: ‖merged - unmerged‖ / ‖unmerged‖ over all logits
    logit_error: float
    #: the largest difference of a logit
    max_difference: float
    #: share of tokens whose most likely answer is the same
    same_answer: float
    #: ‖unmerged - base‖ / ‖unmerged‖: what the adapter does
    effect: float
    #: ‖merged - unmerged‖ / ‖unmerged - base‖: the share of that which the merge loses
    lost: float
    #: the layers that lose most, worst first
    worst_layers: tuple[LayerError, ...]
    tolerance: float

    @property
    def exact(self) -> bool:
        """Whether the error is no more than rounding to `dtype` has to cost, and the adapter is still there."""
        return self.logit_error <= self.tolerance and self.lost <= LARGEST_LOSS


@torch.no_grad()
def merge_error(
    model: PeftModel,
    batch: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    *,
    merged_layers: Mapping[str, nn.Module] | None = None,
    kept: str | None = None,
    worst: int = 5,
) -> MergeReport:
    """How the merged model would differ from `model` on `batch` (what the model's forward takes).

    The merged weights are rounded to `dtype` (by default they keep the base's) and put back afterwards; the
    computation stays in the model's own dtype, so only the rounding shows when that is float32. `merged_layers`
    are what the adapted layers (by their name in `model`) would become where merging in place will not do, as
    with quantized bases, and `kept` says in words what they are stored as.

    Raises:
        ConfigError: the model carries merged adapters already, or nothing that can be merged.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    if not layers or any(layer.merged for layer in layers.values()):
        raise ConfigError(
            "the merge error needs a model with an unmerged adapter; call unmerge_adapter() first"
        )
    training = model.training
    model.eval()
    found: list[LayerError] = []
    with _measuring(layers, dtype, found, merged_layers):
        unmerged = logits_of(model, batch)
    with model.disable_adapter():
        base = logits_of(model, batch)
    with _merged(layers.values(), dtype) if merged_layers is None else _replaced(model, merged_layers):
        merged = logits_of(model, batch)
    model.train(training)
    kept = kept or str(dtype or _weight(next(iter(layers.values()))).dtype).removeprefix("torch.")
    error, effect = (merged - unmerged).norm().item(), (unmerged - base).norm().item()
    found.sort(key=lambda layer: -layer.error)
    return MergeReport(
        dtype=kept,
        tokens=len(unmerged),
        logit_error=relative_error(merged, unmerged),
        max_difference=(merged - unmerged).abs().max().item(),
        same_answer=(merged.argmax(-1) == unmerged.argmax(-1)).float().mean().item(),
        effect=relative_error(base, unmerged),
        lost=error / effect if effect else 0.0,
        worst_layers=tuple(found[:worst]),
        tolerance=TOLERANCES.get(kept, TOLERANCES["float32"]),
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; ‖found‖ where nothing but zeros is expected."""
    return (found - expected).norm().item() / (expected.norm().item() or 1.0)


@torch.no_grad()
def logits_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits in float64, (tokens, classes), without those of padding."""
    logits = model(**batch).logits.double()
    mask = batch.get("attention_mask")
    if logits.dim() == 3 and mask is not None:
        return logits[mask.bool()]
    return logits.reshape(-1, logits.shape[-1])


@contextmanager
def _merged(layers: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """While open, `layers` are merged and rounded to `dtype`; afterwards their weights are what they were."""
    kept = [(layer, _weight(layer).data.clone()) for layer in layers]
    try:
        for layer, _ in kept:
            layer.merge()
            weight = _weight(layer).data
            if dtype is not None and weight.is_floating_point():
                weight.copy_(weight.to(dtype))
        yield
    finally:
        for layer, before in kept:
            if layer.merged:
                layer.unmerge()
            # PEFT unmerges by subtracting, which rounds
            _weight(layer).data.copy_(before)


@contextmanager
def _replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, `layers` stand in the places of the modules of these names."""
    kept = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        yield
    finally:
        for name, layer in kept.items():
            model.set_submodule(name, layer)


@contextmanager
def _measuring(
    layers: Mapping[str, Any],
    dtype: torch.dtype | None,
    found: list[LayerError],
    merged_layers: Mapping[str, nn.Module] | None,
) -> Iterator[None]:
    """While open, every layer that runs is compared with what it becomes when merged."""

    def compare(name: str, layer: Any, inputs: tuple, keywords: dict, output: Tensor) -> None:
        if merged_layers is not None:
            merged = merged_layers[name](*inputs, **keywords)
        else:
            with _merged([layer], dtype):
                merged = layer.get_base_layer()(*inputs, **keywords)
        error = relative_error(merged.double(), output.double())
        found.append(LayerError(name.removeprefix("base_model.model."), error))

    def hook(name: str) -> Any:
        return lambda layer, inputs, keywords, output: compare(name, layer, inputs, keywords, output)

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weight(layer: Any) -> Any:
    return layer.get_base_layer().weight
