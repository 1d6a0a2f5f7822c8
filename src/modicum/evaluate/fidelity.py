"""How true a changed model stays to its base on text, without any labels: what compressing or adapting did to it."""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from modicum.errors import ConfigError, DataError, listing
from modicum.evaluate.arms import Arm, adapter_folder, arm_of, device_for, load, made_from
from modicum.evaluate.intervals import CONFIDENCE, Measure
from modicum.evaluate.memory import weight_bytes
from modicum.evaluate.metrics import perplexity
from modicum.evaluate.statistics import paired_bootstrap
from modicum.models.loading import load_tokenizer
from modicum.quant.base import format_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    #: from a tokenizer, token sequences (sequences, length) and what they are of
    Read = Callable[[Any], tuple[Tensor, str]]

#: positions whose logits are in float32 at a time
_CHUNK = 128
#: tokens that the errors of layers are measured on
_MEASURED = 2048


@dataclass(frozen=True)
class LayerError:
    """‖y − ŷ‖ / ‖y‖ of one module's outputs, both given the inputs that the base's module meets in the base."""

    name: str
    #: linear, or block: the module that holds linear layers, such as an attention or an MLP
    kind: str
    error: float


@dataclass(frozen=True)
class Fidelity:
    """A changed model against its base on the same text; intervals are over sequences."""

    model: str
    base: str
    text: str
    sequences: int
    tokens: int
    #: Kullback-Leibler divergence of the model from the base, nats per token
    kl: Measure
    kl_median: float
    kl_p99: float
    kl_max: float
    #: share of tokens at which both find the same next token likeliest
    top1_agreement: Measure
    perplexity: float
    base_perplexity: float
    #: of the model's perplexity to the base's
    perplexity_ratio: Measure
    #: bits of all that linear layers hold (scales and adapters too) per weight of theirs
    bits_per_weight: float
    base_bits_per_weight: float
    #: parameters and buffers as they lie in memory
    weight_bytes: int
    base_weight_bytes: int
    layers: tuple[LayerError, ...]
    notes: tuple[str, ...] = ()


def measure_fidelity(
    model: str,
    read: Read,
    *,
    base: str | None = None,
    adapter: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 4,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Fidelity:
    """The fidelity of `model` (with `adapter`, unmerged) to `base`: unset, what the model was made from.

    `model`: a folder (dense, sparse, quantized, extracted), a hub name, 'embedded', or a PEFT folder that names its
    base model. `read` makes token sequences with the base's tokenizer.

    Raises:
        ConfigError: no such model, none that it was made from, another tokenizer, too long sequences.
        DataError: no text.
    """
    place = device_for(dtype, device)
    arm = arm_of(model)
    if adapter is not None:
        arm = Arm(f"{model} + {adapter}", model, str(adapter_folder(Path(adapter)) or adapter))
    original = base or made_from(arm)
    if original is None:
        raise ConfigError(f"nothing says what {model} was made from: name it with --base")
    tokenizer = load_tokenizer(original)
    _check_tokenizer(arm.model, original, tokenizer)
    ids, text = read(tokenizer)
    ours, theirs = load(arm, dtype, place), load(Arm(original, original), dtype, place)
    return fidelity(
        ours, theirs, ids, names=(arm.name, original), text=text, batch_size=batch_size, seed=seed, advance=advance
    )  # fmt: skip


def fidelity(
    model: Any,
    base: Any,
    ids: Tensor,
    *,
    names: tuple[str, str] = ("model", "base"),
    text: str = "",
    batch_size: int = 4,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> Fidelity:
    """The fidelity of `model` to `base`, both in memory on one device, on the sequences `ids` (sequences, length).

    KL(base ‖ model) = Σ p (ln p − ln q) for each token but the last of a sequence. The errors of layers are measured
    on the first sequences, about 2048 tokens: of linear layers that have their shape in both models, and of the blocks
    that hold linear layers. Where channels were put in another order, linear layers differ and their block does not.

    Raises:
        ConfigError: other vocabularies, sequences longer than a model takes, or one object given twice.
        DataError: logits that are not finite.
    """
    _check_sequences(model, base, ids, names)
    n, length = ids.shape
    columns = {name: np.zeros((n, length - 1)) for name in ("kl", "same", "loss", "base_loss")}
    pairs = _pairs(base, _inner(model))
    errors = {name: [0.0, 0.0] for name in pairs}
    device = next(base.parameters()).device
    with torch.no_grad(), _evaluating(model, base):
        for at in range(0, n, batch_size):
            batch = ids[at : at + batch_size].to(device)
            with ExitStack() as hooks:
                if at * length < _MEASURED:
                    hooks.enter_context(_watching(base, pairs, errors))
                right = base(input_ids=batch, use_cache=False).logits
            left = model(input_ids=batch, use_cache=False).logits
            for start in range(0, length - 1, _CHUNK):
                span = slice(start, min(start + _CHUNK, length - 1))
                found = _tokens(left[:, span], right[:, span], batch[:, span.start + 1 : span.stop + 1])
                for name, values in found.items():
                    columns[name][at : at + len(batch), span] = values.double().cpu().numpy()
            if advance is not None:
                advance(len(batch))
    return Fidelity(
        *names,
        text=text,
        sequences=n,
        tokens=n * (length - 1),
        **_summary(columns, confidence, seed),
        bits_per_weight=_bits(_inner(model), base),
        base_bits_per_weight=_bits(base, base),
        weight_bytes=weight_bytes(model),
        base_weight_bytes=weight_bytes(base),
        layers=tuple(
            LayerError(name, "block" if format_of(base.get_submodule(name)) is None else "linear", error)
            for name, (apart, whole) in errors.items()
            if whole > 0 and math.isfinite(error := math.sqrt(apart / whole))
        ),
        notes=_notes(base, pairs),
    )


def _tokens(left: Tensor, right: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """KL, agreement and both losses of each token, (batch, positions)."""
    q, p = left.float().log_softmax(-1), right.float().log_softmax(-1)
    # a token that the base excludes (-inf) adds nothing, whatever the model thinks of it
    terms = (p.exp() * (p - q)).masked_fill(p == -math.inf, 0.0)
    return {
        "kl": terms.sum(-1).clamp(min=0),
        "same": p.argmax(-1) == q.argmax(-1),
        "loss": -q.gather(-1, targets[..., None])[..., 0],
        "base_loss": -p.gather(-1, targets[..., None])[..., 0],
    }


def _summary(columns: dict[str, Any], confidence: float, seed: int) -> dict[str, Any]:
    kl, tokens = columns["kl"], columns["kl"].shape[1]
    broken = sum(int((~np.isfinite(columns[name])).sum()) for name in ("kl", "loss", "base_loss"))
    if broken:
        raise DataError(f"logits that are not finite at {broken} places: one of the models is broken")

    def over_sequences(values: Any, transform: Callable[[float], float] = float) -> Measure:
        # the tokens of one sequence depend on each other, so whole sequences are drawn
        sums, weights = values.sum(1), np.full(len(values), float(tokens))
        return paired_bootstrap(sums, weights, confidence=confidence, seed=seed, transform=transform)

    return {
        "kl": over_sequences(kl),
        "kl_median": float(np.median(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "kl_max": float(kl.max()),
        "top1_agreement": over_sequences(columns["same"]),
        "perplexity": perplexity(float(columns["loss"].mean())),
        "base_perplexity": perplexity(float(columns["base_loss"].mean())),
        "perplexity_ratio": over_sequences(columns["loss"] - columns["base_loss"], perplexity),
    }


def _inner(model: Any) -> Any:
    """The Transformers model inside a PEFT model, whose modules have their names in the base."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _linears(base: nn.Module) -> list[str]:
    return [name for name, module in base.named_modules() if format_of(module) is not None]


def _pairs(base: nn.Module, model: nn.Module) -> dict[str, nn.Module]:
    """The model's counterparts of linear layers of the base that have its shape, and of the blocks that hold any."""
    there = dict(model.named_modules())
    pairs: dict[str, nn.Module] = {}
    for name in _linears(base):
        block = name.rpartition(".")[0]
        if block and block in there:
            pairs[block] = there[block]
        if name in there and _shape(there[name]) == _shape(base.get_submodule(name)):
            pairs[name] = there[name]
    return pairs


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer, adapted or not; None of anything else."""
    layer: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    known = format_of(layer)
    return None if known is None else known.shape(layer)


@contextmanager
def _watching(base: nn.Module, pairs: dict[str, nn.Module], errors: dict[str, list[float]]) -> Iterator[None]:
    """Adds ‖y − ŷ‖² and ‖y‖² of each pair to `errors` when its module in `base` runs."""

    def hook(name: str) -> Callable[..., None]:
        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            del module
            ours = pairs[name](*args, **kwargs)
            wanted, found = (part[0] if isinstance(part, tuple) else part for part in (output, ours))
            errors[name][0] += float((wanted.float() - found.float()).square().sum(dtype=torch.float64))
            errors[name][1] += float(wanted.float().square().sum(dtype=torch.float64))

        return compare

    handles = [base.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    """Models in evaluation mode, put back afterwards."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, was in zip(models, training, strict=True):
            model.train(was)


def _bits(model: Any, base: nn.Module) -> float:
    """Bits of all tensors in the linear layers of `model`, those that `base` has too, per weight.

    A head that is the embedding again counts as embedding.
    """
    there, embedding = dict(model.named_modules()), id(model.get_input_embeddings().weight)
    layers = [there[name] for name in _linears(base) if name in there and _shape(there[name]) is not None]
    layers = [layer for layer in layers if embedding not in map(id, layer.parameters())]
    weights = sum(math.prod(_shape(layer) or ()) for layer in layers)
    tensors = {id(t): t.nbytes for layer in layers for t in (*layer.parameters(), *layer.buffers())}
    return 8 * sum(tensors.values()) / weights if weights else math.nan


def _notes(base: nn.Module, pairs: dict[str, nn.Module]) -> tuple[str, ...]:
    other = [name for name in _linears(base) if name not in pairs]
    if not other:
        return ()
    return (f"linear layers of another shape, compared by their blocks alone: {listing(other)}",)


def _check_sequences(model: Any, base: Any, ids: Tensor, names: tuple[str, str]) -> None:
    faults = []
    if _inner(model) is base:
        faults.append(f"{names[0]} and {names[1]} are one model in memory; load it twice")
    sizes = [each.config.get_text_config().vocab_size for each in (_inner(model), base)]
    if sizes[0] != sizes[1]:
        faults.append(
            f"{names[0]} knows {sizes[0]} tokens and {names[1]} {sizes[1]}; divergences need one vocabulary"
        )
    if ids.ndim != 2 or ids.shape[1] < 2 or not len(ids):
        faults.append(f"sequences of shape {tuple(ids.shape)}, must be (sequences, 2 or more tokens)")
    elif int(ids.max()) >= min(sizes):
        faults.append(f"the tokenizer makes ids up to {int(ids.max())}, the models know {min(sizes)}")
    for each, name in zip((_inner(model), base), names, strict=True):
        longest = getattr(each.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and ids.shape[-1] > longest:
            faults.append(f"{name} takes sequences of up to {longest} tokens, not {ids.shape[-1]}")
    if faults:
        raise ConfigError("cannot compare: " + "; ".join(faults))


def _check_tokenizer(model: str, base: str, tokenizer: Any) -> None:
    """Refuses a model whose folder has a tokenizer of another vocabulary."""
    try:
        own = load_tokenizer(model)
    except ConfigError:
        # exports and cut-out models may lie without one; sizes are compared later
        return
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{model} and {base} have other tokenizers: their tokens cannot be compared one by one"
        )
