"""A sub-network as a model of its own: a smaller dense checkpoint with the adapter merged in.

    W' = (W + scaling · ΔW)[rows, columns],    rounded once

with ΔW at the active rank and the rows and columns of the units that are left. What was written is loaded again and
run on the same text as the super-network before anyone sees it.
"""

from __future__ import annotations

import copy
import hashlib
import math
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from modicum.adapters.elastic import Cut, SubNetwork, Switch
from modicum.adapters.layer import AdapterLinear
from modicum.adapters.merge_report import TOLERANCES, logits_of, relative_error
from modicum.data import bundled
from modicum.errors import ConfigError, InexactMergeError, did_you_mean, listing
from modicum.models.families import unwrapped, widths
from modicum.models.loading import EMBEDDED, quiet_transformers, resolve
from modicum.models.subnetwork import is_ours, is_transposed, kept, narrowed, smaller_class
from modicum.ops.digest import weight_digest
from modicum.quant.base import format_of
from modicum.quant.spec import DTYPES
from modicum.store.atomic import write_folder
from modicum.store.state import AdapterState

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from peft import PeftModel
    from torch import Tensor

_KNOWN = ("auto", *DTYPES)
#: bundled texts that logits are compared on
_TEXTS = 16


@dataclass(frozen=True)
class Extracted:
    """What an extraction wrote, and how far it is from the super-network with that sub-network active."""

    output: Path
    #: files written, with their bytes
    files: dict[str, int]
    model_class: str
    #: whether Transformers alone loads the folder; else `import modicum` has to come first
    stock: bool
    dtype: str
    parameters_before: int
    parameters: int
    #: weights of linear layers, the output head included, embeddings and biases not
    linear_before: int
    linear: int
    #: units left by width, those of full width left out
    widths: dict[str, int]
    #: rank of the update that was merged, by layer
    ranks: dict[str, int]
    choices: dict[str, int]
    #: tokens (or, for a classifier, rows) whose logits were compared
    tokens: int
    #: ‖difference‖ / ‖logits‖ over all of them
    logit_error: float
    rms_difference: float
    max_difference: float
    #: the largest `logit_error` that rounding explains
    tolerance: float


def extract(
    model: PeftModel,
    output: str | os.PathLike,
    *,
    tokenizer: Any,
    sub_network: SubNetwork | None = None,
    dtype: str = "auto",
    texts: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Extracted:
    """What was written: a sub-network of `model` as a dense checkpoint for `from_pretrained`, tokenizer included.

    Without `sub_network` the active one. The adapter is merged at its active ranks, in float32, and rounded once to
    `dtype`; `auto` keeps the model's. `model` is left as it was. The logits on `texts` (bundled text without) are
    compared before the output appears.

    Raises:
        ConfigError: the output exists, the sub-network does not fit, the base is quantized, or the adapter is not ours.
        InexactMergeError: the checkpoint differs from the super-network by more than rounding; nothing was written.
    """
    target = Path(output).expanduser()
    name = _check(model, target, dtype, overwrite=overwrite)
    wanted = model.dtype if dtype == "auto" else DTYPES[dtype]
    with _active(model, name, sub_network) as chosen:
        small_class, config = (
            smaller_class(model, chosen.widths) if chosen.widths else _same_class(unwrapped(model))
        )
        ranks = {layer: adapter.active_rank for layer, adapter in _adapters(model, name).items()}
        config.modicum = _about(model, name, chosen, ranks)
        with torch.device("meta"):
            empty = small_class(config).to(wanted)
            whole_class, whole_config = _same_class(unwrapped(model))
            whole = whole_class(whole_config)
        batch = _tokens(tokenizer, texts, model.device)
        expected = logits_of(model, batch)
        cuts = kept(model, chosen.widths) if chosen.widths else {}
        found: dict[str, Any] = {}

        def fill(folder: Path) -> None:
            _write(folder, empty, _state(model, name, cuts, wanted), unwrapped(model))
            tokenizer.save_pretrained(folder)
            (folder / "README.md").write_text(_card(small_class, config), encoding="utf-8")
            found.update(_measured(folder, small_class, model, batch, expected, wanted))

        write_folder(target, fill)
    before, after = _sizes(whole), _sizes(empty)
    return Extracted(
        output=target,
        files={path.name: path.stat().st_size for path in sorted(target.iterdir())},
        model_class=small_class.__name__,
        stock=not is_ours(small_class),
        dtype=str(wanted).removeprefix("torch."),
        parameters_before=before[0],
        parameters=after[0],
        linear_before=before[1],
        linear=after[1],
        widths=dict(chosen.widths),
        ranks=ranks,
        choices=dict(chosen.choices),
        **found,
    )


def _check(model: PeftModel, target: Path, dtype: str, *, overwrite: bool) -> str:
    """The name of the active adapter; refuses whatever cannot be extracted, all of it at once."""
    root, faults = unwrapped(model), []
    if dtype not in _KNOWN:
        faults.append(f"no dtype {dtype!r}{did_you_mean(dtype, _KNOWN)}; known: {', '.join(_KNOWN)}")
    if target.exists() and not overwrite:
        faults.append(f"{target} exists already; choose another output or pass --overwrite")
    source = Path(root.config.name_or_path or "/").expanduser()
    if target.exists() and source.exists() and target.resolve() == source.resolve():
        faults.append("the output is the base model itself; write to another folder")
    if len(model.active_adapters) != 1:
        faults.append(f"{len(model.active_adapters)} adapters are active; activate one of them")
    layers = {n: m for n, m in root.named_modules() if isinstance(m, BaseTunerLayer)}
    foreign = [n for n, m in layers.items() if not isinstance(m, AdapterLinear)]
    if foreign:
        faults.append(
            f"{listing(foreign)} carry an adapter that is not modicum's; `modicum merge` folds it in"
        )
    if any(layer.merged for layer in layers.values()):
        faults.append("adapters are merged at present; call unmerge_adapter() first")
    packed = [
        name.removesuffix(".base_layer")
        for name, module in root.named_modules()
        if (fmt := format_of(module)) is not None and not fmt.mergeable
    ]
    if packed:
        faults.append(
            f"{listing(packed, 3)} are quantized, which cannot be cut or merged exactly: train and extract on the "
            "dense model it came from and run `modicum quantize` on the result. For a sub-network of full width, "
            "`modicum merge` keeps the base quantized"
        )
    if faults:
        raise ConfigError(f"cannot extract: {'; '.join(faults)}")
    return model.active_adapters[0]


@contextmanager
def _active(model: PeftModel, name: str, chosen: SubNetwork | None) -> Iterator[SubNetwork]:
    """While open, `chosen` (None: what is active) runs, in evaluation mode; afterwards what ran before."""
    saved = getattr(model.peft_config[name], "sub_network", None)
    before = None if saved is None else SubNetwork.read(saved)
    chosen = _completed(model, chosen or before or SubNetwork())
    training = model.training
    switch = Switch(model, name) if chosen.ranks or chosen.cuts or before else None
    try:
        model.eval()
        if switch is not None:
            switch.activate(chosen)
        yield chosen
    finally:
        model.train(training)
        if switch is not None:
            switch.activate(before)


def _completed(model: PeftModel, chosen: SubNetwork) -> SubNetwork:
    """The sub-network with the cuts that its widths imply, without those of full width.

    Raises:
        ConfigError: a width is not there, or the cuts are others.
    """
    cuts: dict[str, Cut] = {}
    units: dict[str, int] = {}
    if chosen.widths:
        kept(model, chosen.widths)
        for width in widths(model):
            left = chosen.widths.get(width.name, width.units)
            cuts |= width.cuts(left)
            units |= {width.name: left} if left < width.units else {}
    if chosen.cuts and dict(chosen.cuts) != cuts:
        raise ConfigError("the cuts of this sub-network are not those of its widths; leave the cuts out")
    return replace(chosen, cuts=cuts, widths=units)


def _adapters(model: PeftModel, name: str) -> dict[str, Any]:
    return {
        layer: module.adapters[name]
        for layer, module in unwrapped(model).named_modules()
        if isinstance(module, AdapterLinear) and name in module.adapters
    }


@torch.no_grad()
def _state(model: PeftModel, name: str, cuts: Mapping[str, Cut], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the small model by their names in Transformers, adapter merged, in `dtype`."""
    root = unwrapped(model)
    layers = {n: m for n, m in root.named_modules() if isinstance(m, AdapterLinear)}
    wrappers = {n: m for n, m in root.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)}
    inside = tuple(f"{n}." for n in (*layers, *wrappers))
    shared: dict[Any, Tensor] = {}
    state = {}
    for key, tensor in root.state_dict().items():
        if not key.startswith(inside):
            # tied weights stay one tensor, which is saved once
            identity = (tensor.data_ptr(), tensor.shape)
            state[key] = shared.setdefault(identity, _cast(tensor, dtype))
    for layer, module in layers.items():
        base: Any = module.get_base_layer()
        cut = cuts.get(layer, Cut())
        for part, tensor in base.named_parameters():
            merged, turned = tensor, part == "weight" and is_transposed(base)
            if part == "weight" and name in module.adapters:
                delta = module.get_delta_weight(name).to(tensor.device)
                merged = tensor.float() + (delta.T if turned else delta)
            state[f"{layer}.{part}"] = _cast(narrowed(part, merged, cut, transposed=turned), dtype)
    for path, wrapper in wrappers.items():
        full: Any = wrapper
        own = full.adapter_state_dict(name, full.state_dict()) or full.original_module.state_dict()
        state |= {f"{path}.{part}": _cast(tensor, dtype) for part, tensor in own.items()}
    return state


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _same_class(root: Any) -> tuple[Any, Any]:
    config = copy.deepcopy(root.config)
    config.architectures = [type(root).__name__]
    return type(root), config


def _about(model: PeftModel, name: str, chosen: SubNetwork, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The `modicum` entry of config.json: which sub-network of what this is."""
    config: Any = model.peft_config[name]
    state = AdapterState.of(model, name)
    digests = [f"{key} {weight_digest(tensor)}" for key, tensor in sorted(state.tensors.items())]
    return {
        "sub_network": replace(chosen, ranks=ranks, cuts={}).as_dict(),
        "base_model": _named(unwrapped(model).config.name_or_path),
        "base_fingerprint": config.base_fingerprint,
        # of the trained numbers rounded to bfloat16, so that every file format of one adapter has the same
        "adapter_digest": hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest(),
    }


def _named(path: str) -> str | None:
    # where the package is installed says nothing to others
    return EMBEDDED if path == resolve(EMBEDDED) else path or None


def _write(folder: Path, empty: Any, state: Mapping[str, Tensor], root: Any) -> None:
    """Weights and configuration of the small model, as Transformers writes them."""
    if empty.can_generate():
        empty.generation_config = root.generation_config
    with quiet_transformers():
        empty.save_pretrained(folder, state_dict=dict(state))


def _card(small_class: type, config: Any) -> str:
    """The README of the folder: what it is and what loading it takes."""
    card = (
        f"---\nlibrary_name: transformers\n---\n\nA sub-network of {config.modicum['base_model'] or 'a model'} with "
        "its adapter merged in, written by `modicum extract`. The entry `modicum` of config.json says which one.\n"
    )
    if is_ours(small_class):
        card += (
            "\nIts transformer layers have widths of their own, which no class of Transformers has: `pip install "
            "modicum`, and `import modicum` before Transformers loads it.\n"
        )
    return card


def _measured(
    folder: Path,
    small_class: Any,
    model: PeftModel,
    batch: Mapping[str, Tensor],
    expected: Tensor,
    wanted: torch.dtype,
) -> dict[str, Any]:
    """How the logits of what was written differ from `expected`.

    Raises:
        InexactMergeError: by more than rounding.
    """
    with quiet_transformers():
        implementation = unwrapped(model).config._attn_implementation  # noqa: SLF001 - it has no public name
        small, info = small_class.from_pretrained(
            folder, dtype=model.dtype, attn_implementation=implementation, output_loading_info=True
        )
    logits = logits_of(small.eval().to(model.device), batch)
    error, difference = relative_error(logits, expected), logits - expected
    rounding = {str(dtype).removeprefix("torch.") for dtype in (wanted, model.dtype)}
    tolerance = max(TOLERANCES[dtype] for dtype in rounding)
    if not error <= tolerance or info["missing_keys"]:
        raise InexactMergeError(
            f"the smaller model's logits differ from the super-network's by {error:.2%} (tolerance {tolerance:.2%}), "
            "which rounding does not explain; extract with --dtype float32, or choose another sub-network. Nothing "
            "was written"
        )
    return {
        "tokens": len(expected),
        "logit_error": error,
        "rms_difference": difference.square().mean().sqrt().item(),
        "max_difference": difference.abs().max().item(),
        "tolerance": tolerance,
    }


def _tokens(
    tokenizer: Any, texts: Sequence[str] | None, device: torch.device, length: int = 128
) -> dict[str, Tensor]:
    texts = bundled.texts("notes", "test")[:_TEXTS] if texts is None else list(texts)
    encoded = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Numbers of all parameters, and of the weights of linear layers."""
    linear = (math.prod(fmt.shape(m)) for m in model.modules() if (fmt := format_of(m)) is not None)
    return sum(parameter.numel() for parameter in model.parameters()), sum(linear)
