"""The basis of a whole model: built from its weights as a stream, or from the gradients of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from modicum.adapters.basis import Basis, BasisCache, BasisSpec, LayerFactors, layer_factors
from modicum.adapters.config import AdapterConfig
from modicum.errors import ConfigError, DataError, TargetError, listing
from modicum.models.checkpoint import iter_weights, layer_shapes, target_shapes
from modicum.ops.digest import weight_digest
from modicum.ops.lowrank import left_singular_vectors
from modicum.quant.base import format_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from modicum.ops.lowrank import Mode

Targets = AdapterConfig | str | list[str] | tuple[str, ...] | set[str]


def build_basis(
    source: nn.Module | str | Path,
    targets: Targets = "all-linear",
    rank: int | None = None,
    spec: BasisSpec | None = None,
    *,
    task: str = "auto",
    cache: BasisCache | Literal["default"] | None = "default",
    progress: Callable[..., None] | None = None,
) -> Basis:
    """The basis of the targeted layers of a model or of a model folder, one layer after the other.

    `targets` as PEFT's `target_modules`, or an adapter's configuration, which also gives the ranks and the
    kind of basis. A model must hold its unadapted weights; a folder is read one matrix at a time, with the
    module names of the model for `task`. Layers that are in the cache are not computed again, so that an
    interrupted run continues where it stopped. `progress(steps=1, note=name)` is called after each layer.

    Raises:
        ConfigError: no rank, or a rank that exceeds a layer; every such layer is named.
        TargetError: a target matches no linear layer.
    """
    words, options = _matching(targets)
    if isinstance(source, nn.Module):
        shapes = layer_shapes(source, words, **options)
        stream = _model_weights(source, shapes)
    else:
        shapes = target_shapes(source, words, task=task, **options)
        stream = iter_weights(source, words, task=task, **options)
    ranks = _ranks(shapes, targets, rank)
    spec = spec or (targets.basis_spec() if isinstance(targets, AdapterConfig) else None) or BasisSpec()
    layers: dict[str, LayerFactors] = {}
    digests: dict[str, str] = {}
    for name, weight in stream:
        digests[name] = weight_digest(weight)
        layers[name] = layer_factors(weight, ranks[name], spec, name=name, cache=cache, digest=digests[name])
        del weight  # the stream holds one matrix at a time
        if progress is not None:
            progress(1, note=name)
    return Basis(layers, spec, digests)


def gradient_basis(
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    targets: Targets,
    rank: int,
    *,
    steps: int | None = None,
    lr: float = 1e-3,
    update: Literal["sign", "gradient"] = "sign",
    mode: Mode = "fast",
    layers_at_once: int | None = None,
) -> Basis:
    """The basis and initial cores that best approximate the first full fine-tuning update (LoRA-SB).

    The update is ΔW = −lr · sign(G), G the mean loss gradient over the first `steps` batches: the first step
    of Adam, whose moments are G and G², is lr · G/|G|. `update="gradient"` takes −lr · G instead, the first
    step of plain gradient descent. With ΔW ≈ U S Vᵀ at `rank`: u = U, a = Vᵀ, r0 = S (a diagonal). An adapter
    starts with R = r0 / scaling, so that scaling · U R A is the best rank-r part of that update. The result is
    of kind "stored": add it to the cache (`BasisCache().add(basis)`) and name its fingerprint in the adapter's
    configuration.

    Batches are keyword arguments of the model and hold labels. `layers_at_once` bounds the memory of the
    gradients: that many layers per sweep over the batches, all in one sweep by default. The model is left
    as it was, gradients aside, which are cleared.

    Raises:
        DataError: no batch, or a batch gives no loss.
        TargetError: a target matches no linear layer, or its weight takes no gradient (quantized).
    Source: arXiv 2411.19557.
    """
    used = list(batches)[:steps]
    if not used:
        raise DataError("a gradient basis needs at least one batch with labels")
    words, options = _matching(targets)
    shapes = layer_shapes(model, words, **options)
    _ranks(shapes, targets, rank)
    modules = {name: model.get_submodule(name) for name in shapes}
    fixed = [name for name, module in modules.items() if not module.weight.is_floating_point()]
    if fixed:
        raise TargetError(
            f"{listing(fixed)} hold packed weights, which take no gradient; load the model unquantized"
        )
    layers, names = {}, list(shapes)
    group = layers_at_once or len(names)
    for first in range(0, len(names), group):
        chosen = {name: modules[name] for name in names[first : first + group]}
        for name, gradient in _mean_gradients(model, chosen, used).items():
            step = gradient.sign() if update == "sign" else gradient
            layers[name] = _best_factors(step.mul_(-lr), rank, mode)
    return Basis(layers, BasisSpec("stored"), {n: weight_digest(_weight(modules[n])) for n in names})


@torch.no_grad()
def _best_factors(update: Tensor, rank: int, mode: Mode) -> LayerFactors:
    """Factors u = U, a = Vᵀ, r0 = S of the update, with the exact decomposition of UᵀΔW."""
    u = left_singular_vectors(update, rank, mode=mode).u.double()
    p, s, vt = torch.linalg.svd(u.T @ update.double(), full_matrices=False)
    turned = u @ p
    peak = turned.gather(0, turned.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0)
    a = (sign.T * vt).to(torch.float32).contiguous()
    return LayerFactors((turned * sign).to(torch.float32), None, a, s.to(torch.float32))


def _mean_gradients(
    model: Any, modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Mean loss gradient (out, in) of each module's weight, float32 on the CPU; evaluation mode."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    total = {name: torch.zeros(_weight(module).shape) for name, module in modules.items()}
    try:
        model.eval().requires_grad_(requires_grad=False)
        for module in modules.values():
            module.weight.requires_grad_(requires_grad=True)  # pyright: ignore[reportCallIssue]
        for batch in batches:
            moved = {key: v.to(model.device) if isinstance(v, Tensor) else v for key, v in batch.items()}
            with torch.enable_grad():
                loss = model(**moved).loss
                if loss is None:
                    raise DataError("the model returned no loss: every batch needs `labels`")
                loss.backward()
            for name, module in modules.items():
                gradient = module.weight.grad
                if isinstance(gradient, Tensor):
                    total[name] += _oriented(module, gradient).to("cpu", torch.float32) / len(batches)
                module.weight.grad = None  # pyright: ignore[reportArgumentType]
    finally:
        model.train(training)
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None
    return total


def _weight(module: nn.Module) -> Tensor:
    fmt = format_of(module)
    if fmt is None:
        raise TargetError(f"a {type(module).__name__} cannot be adapted; linear layers can")
    return fmt.weight(module)


def _oriented(module: nn.Module, gradient: Tensor) -> Tensor:
    return gradient if isinstance(module, nn.Linear) else gradient.T


def _model_weights(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        yield name, _weight(model.get_submodule(name)).detach()


def _matching(targets: Targets) -> tuple[str | list[str], dict[str, Any]]:
    """(targets, matching options) for `linear_shapes`."""
    if not isinstance(targets, AdapterConfig):
        return (targets if isinstance(targets, str) else list(targets)), {}
    wanted = targets.target_modules or "all-linear"
    return wanted if isinstance(wanted, str) else list(wanted), {
        "exclude": targets.exclude_modules,
        "layers_to_transform": targets.layers_to_transform,
        "layers_pattern": targets.layers_pattern,
        "modules_to_save": targets.modules_to_save,
    }


def _ranks(shapes: Mapping[str, tuple[int, int]], targets: Targets, rank: int | None) -> dict[str, int]:
    if rank is None and not isinstance(targets, AdapterConfig):
        raise ConfigError("a basis needs a rank; give `rank`, or an adapter's configuration as targets")
    ranks = {n: rank if rank is not None else targets.rank_for(n) for n in shapes}  # pyright: ignore[reportAttributeAccessIssue]
    narrow = [f"{name} {shapes[name]}" for name, r in ranks.items() if not 1 <= r <= min(shapes[name])]
    if narrow:
        raise ConfigError(
            f"rank {rank or 'of the configuration'} does not fit {listing(narrow)}; lower it, or leave these layers out"
        )
    return ranks
