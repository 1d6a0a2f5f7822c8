"""Merging adapters into a base layer: what the updates are constant on decides where the base format takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from modicum.errors import CorruptAdapterError, InexactMergeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from modicum.adapters.contract import Adapter
    from modicum.adapters.site import Site


@torch.no_grad()
def merge(site: Site, adapters: Mapping[str, Adapter]) -> None:
    """Replaces what is merged into the layer of `site` by `adapters` (all of them, by name), in place.

    A dense weight takes any update, rounded once to its dtype. A quantized one with offsets takes updates that
    are constant on blocks, exactly: codes and scales stay bit for bit. The first merge keeps what undoes it.

    Raises:
        InexactMergeError: the format cannot take an update; nothing was changed.
        CorruptAdapterError: the result would hold NaN or infinity; nothing was changed.
    """
    fmt, module = site.format, site.module
    if fmt.foldable:
        _check_foldable(site, adapters)
        updates = [(adapter.block_values(), adapter.block) for adapter in adapters.values()]
        _check_finite(site, adapters, [values for values, _ in updates])
        saved = fmt.snapshot(module) if site.saved is None else site.saved
        if site.saved is not None:
            fmt.restore(module, saved)
        for values, block in updates:
            assert block is not None
            fmt.fold(module, values, block)
        site.saved = saved
        return
    weight = site.weight()
    merged = merge_delta(weight, [adapter.delta_weight() for adapter in adapters.values()])
    _check_finite(site, adapters, [merged])
    saved = fmt.snapshot(module) if site.saved is None else site.saved
    fmt.write(module, merged)
    site.saved = saved


def unmerge(site: Site) -> None:
    """Puts the layer of `site` back to what it was before merging, bit for bit."""
    if site.saved is not None:
        site.format.restore(site.module, site.saved)
        site.saved = None


@torch.no_grad()
def merge_delta(weight: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """The (out, in) weight plus all updates, added in float32 and rounded once to the weight's dtype."""
    total = weight.to(torch.float32)
    for delta in deltas:
        total = total + delta.to(total.device)
    return total.to(weight.dtype)


def _check_foldable(site: Site, adapters: Mapping[str, Adapter]) -> None:
    free = [name for name, adapter in adapters.items() if adapter.block is None]
    if free:
        raise InexactMergeError(
            f"the update of {', '.join(free)} to {site.name} is not constant on blocks, so the offsets of a quantized "
            "weight cannot take it: `modicum merge` writes a dense model (--dtype), or requantizes "
            "(--allow-inexact) and says what that loses. q_bara, qa_hira, qa_lora and qa_blora merge exactly"
        )


def _check_finite(site: Site, adapters: Mapping[str, Adapter], tensors: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise CorruptAdapterError(
            f"merging {', '.join(adapters)} into {site.name} gives NaN or infinite weights; the base model was "
            "left as it was. Check the adapter with `modicum inspect`"
        )
