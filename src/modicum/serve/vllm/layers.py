"""LoRA-XS in the LoRA layers of vLLM: the frozen directions once per layer, one r×r core for each slot.

A layer of vLLM may be several of ours beside each other (q, k, v in one product). With U and A of its slices, slot s of
a token and x (tokens, in):

    y = W x + blockdiag(U₁ … Uₙ) blockdiag(R₁ˢ … Rₙˢ) [A₁; …; Aₙ] x

so a step costs one product with all A, one with the cores of its tokens, and one with all U, whatever the adapters
are. Tokens whose slot holds a plain LoRA, or none, have the zero core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: where a slot has more tokens than this on average, one product for each of its runs is cheaper than gathering
_LONG_RUNS = 8


@dataclass(frozen=True)
class Step:
    """The slots of the tokens of one batch; it serves all steps until the batch changes."""

    #: slot of every token, (tokens,), −1 for the base model; the cores of those with a plain LoRA are zeros
    rows: Tensor
    #: (slot, first, end) of consecutive tokens under a core, or None where cores are gathered for each token
    runs: tuple[tuple[int, int, int], ...] | None
    #: whether any token is under a core
    cores: bool
    #: (slot, first, end) of consecutive tokens under a plain LoRA
    plain: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, slots: Tensor, cores: set[int]) -> Step:
        """The step of `slots` (tokens,), −1 for the base model; `cores`: the slots that hold LoRA-XS adapters."""
        found, lengths = torch.unique_consecutive(slots, return_counts=True)
        runs, place = [], 0
        for slot, length in zip(found.tolist(), lengths.tolist(), strict=True):
            runs.append((slot, place, place + length))
            place += length
        mine = tuple(run for run in runs if run[0] in cores)
        long = place > _LONG_RUNS * len(runs)
        plain = tuple(run for run in runs if run[0] >= 0 and run[0] not in cores)
        return cls(slots.clone(), mine if long else None, bool(mine), plain)


class Cores:
    """The LoRA-XS part of one layer: directions of its slices, and the cores of all slots."""

    def __init__(self, a: Sequence[Tensor], u: Sequence[Tensor], slots: int, like: Tensor) -> None:
        """`a` (k, in) and `u` (out, k) of each slice, as far as they are on this device; `like`: type and device."""
        count, rank = len(a), max(part.shape[0] for part in a)
        widths = [part.shape[0] for part in u]
        self.rank, self.count = rank, count
        self.a = like.new_zeros(count * rank, a[0].shape[1])
        self.u = like.new_zeros(count * rank, sum(widths))
        for n, (inward, outward) in enumerate(zip(a, u, strict=True)):
            first, column = n * rank, sum(widths[:n])
            self.a[first : first + inward.shape[0]] = inward
            self.u[first : first + outward.shape[1], column : column + widths[n]] = outward.T
        #: Rᵀ · scaling of every slot and slice; the last row, which −1 finds, stays zero
        self.stack = like.new_zeros(slots + 1, count, rank, rank)
        self.held: set[int] = set()
        self._gathered: tuple[Step, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """What all of it takes."""
        return sum(part.numel() * part.element_size() for part in (self.a, self.u, self.stack))

    def set(self, slot: int, cores: Sequence[Tensor | None]) -> None:
        """Hold in `slot` the scaled cores of the slices, (r, r) or None, each at most of the layer's rank."""
        self.clear(slot)
        for n, core in enumerate(cores):
            if core is not None:
                self.stack[slot, n, : core.shape[0], : core.shape[1]] = core.T
        self.held.add(slot)

    def clear(self, slot: int) -> None:
        """Hold nothing in `slot`."""
        if slot in self.held:
            self.stack[slot] = 0
            self.held.discard(slot)
        self._gathered = None

    def add(self, x: Tensor, output: Tensor, step: Step) -> None:
        """Adds to `output` (tokens, out), in place, the updates of `x` (tokens, in)."""
        if not self.held:
            return
        z = F.linear(x, self.a)
        if step.runs is None:
            z = torch.matmul(z.view(-1, self.count, 1, self.rank), self._of_tokens(step)).flatten(1)
        else:
            mixed = torch.zeros_like(z)
            for slot, first, end in step.runs:
                part = z[first:end].view(end - first, self.count, self.rank).transpose(0, 1)
                product = torch.bmm(part, self.stack[slot])
                mixed[first:end] = product.transpose(0, 1).flatten(1)
            z = mixed
        output.addmm_(z, self.u)

    def _of_tokens(self, step: Step) -> Tensor:
        # the batch rarely changes between two tokens; a slot that is written anew clears this
        if self._gathered is None or self._gathered[0] is not step:
            self._gathered = step, self.stack[step.rows]
        return self._gathered[1]


def add_plain(layer: Any, x: Tensor, output: Tensor, step: Step) -> None:
    """Adds to `output`, in place, the plain LoRA updates of `x` in a layer of vLLM.

    vLLM's own products on processors gather all factors for each token, and give tokens of the base model those of
    the last slot.
    """
    for slot, first, end in step.plain:
        column = 0
        for a, b, width in zip(layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices, strict=True):
            inner = F.linear(x[first:end], a[slot, 0])
            output[first:end, column : column + width] += F.linear(inner, b[slot, 0])
            column += width
