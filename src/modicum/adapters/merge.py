"""Merging adapters into a base layer: what the updates are like decides where the base format takes them.

A dense weight takes any update, rounded once. A quantized one with offsets takes updates that are constant on
blocks in its offsets, one with whole steps through 0 takes updates of whole steps in its codes; both exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from modicum.errors import CorruptAdapterError, InexactMergeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from modicum.adapters.contract import Adapter
    from modicum.adapters.site import Site

#: where updates go: into a dense weight, into offsets, into codes
Way = Literal["dense", "fold", "recode"]
#: values (out/q, in/p) and (q, p) for the offsets, or whole steps (out, in) and None for the codes
ExactUpdate: TypeAlias = "tuple[Tensor, tuple[int, int] | None]"


@torch.no_grad()
def merge(site: Site, adapters: Mapping[str, Adapter]) -> None:
    """Replaces what is merged into the layer of `site` by `adapters` (all of them, by name), in place.

    The first merge keeps what undoes it.

    Raises:
        InexactMergeError: the base cannot take the updates without a loss, or they run cut; nothing was changed.
        CorruptAdapterError: the result would hold NaN or infinity; nothing was changed.
    """
    check_whole(site, adapters)
    fmt, module, chosen = site.format, site.module, way(site, adapters)
    if chosen is None:
        raise _refusal(site, adapters)
    if chosen == "dense":
        merged = merge_delta(site.weight(), [adapter.delta_weight() for adapter in adapters.values()])
        _check_finite(site, adapters, [merged])
        site.saved = fmt.snapshot(module) if site.saved is None else site.saved
        fmt.write(module, merged)
        return
    updates = exact_updates(site, adapters, chosen)
    present = fmt.snapshot(module, codes=chosen == "recode")
    if site.saved is not None:
        fmt.restore(module, site.saved)
    try:
        take(site, module, updates)
    except InexactMergeError:
        fmt.restore(module, present)
        raise
    site.saved = present if site.saved is None else site.saved


def way(site: Site, adapters: Mapping[str, Adapter]) -> Way | None:
    """Where the layer of `site` takes the updates of `adapters`; None: nowhere without a loss."""
    fmt = site.format
    if fmt.mergeable:
        return "dense"
    if fmt.foldable and all(adapter.block is not None for adapter in adapters.values()):
        return "fold"
    return "recode" if fmt.recodable and all(adapter.on_grid for adapter in adapters.values()) else None


def check_whole(site: Site, adapters: Mapping[str, Adapter]) -> None:
    """Refuses adapters that run as part of a narrower sub-network."""
    if any(adapter.cut for adapter in adapters.values()):
        raise InexactMergeError(
            f"{site.name} runs as part of a narrower sub-network, which a merged weight cannot show: write "
            "it with `modicum extract`, or activate one of full width"
        )


def _refusal(site: Site, adapters: Mapping[str, Adapter]) -> InexactMergeError:
    names = [name for name, adapter in adapters.items() if adapter.block is None] or list(adapters)
    return InexactMergeError(
        f"the low-bit weight of {site.name} ({site.format.name}) cannot take the update of {', '.join(names)} "
        "exactly: it is not constant on blocks, or the format has no offsets. `modicum merge` writes a dense model "
        "(--dtype), or requantizes (--allow-inexact) and says what that loses. On a base from `modicum quantize` "
        "q_bara, qa_hira, qa_lora, qa_blora and qa_sparse_peft merge exactly"
    )


@torch.no_grad()
def exact_updates(site: Site, adapters: Mapping[str, Adapter], chosen: Way) -> list[ExactUpdate]:
    """What `take` puts into offsets or codes.

    Raises:
        CorruptAdapterError: an update holds NaN or infinity.
    """
    if chosen == "fold":
        updates = [(adapter.block_values(), adapter.block) for adapter in adapters.values()]
    else:
        # together, since only the sum has to stay on the grid
        moved = [adapter.moved_steps() for adapter in adapters.values()]
        updates: list[ExactUpdate] = [(torch.stack(moved).sum(0) if len(moved) > 1 else moved[0], None)]
    _check_finite(site, adapters, [values for values, _ in updates])
    return updates


@torch.no_grad()
def take(site: Site, module: nn.Module, updates: Sequence[ExactUpdate]) -> None:
    """Puts `updates` into `module`, which is the unmerged layer of `site` or a copy of it, in place.

    Raises:
        InexactMergeError: together they lead beyond the grid.
    """
    for values, block in updates:
        if block is None:
            site.format.recode(module, values)
        else:
            site.format.fold(module, values, block)


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


def _check_finite(site: Site, adapters: Mapping[str, Adapter], tensors: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise CorruptAdapterError(
            f"merging {', '.join(adapters)} into {site.name} gives NaN or infinite weights; the base model was "
            "left as it was. Check the adapter with `modicum inspect`"
        )
