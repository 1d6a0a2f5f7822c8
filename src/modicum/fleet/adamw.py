"""AdamW for a stack of adapters: each has its own steps, moments, rate and gradient norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

#: PyTorch's (and the Trainer's) own
BETAS = (0.9, 0.999)
EPSILON = 1e-8

Scheduler = Literal["linear", "cosine", "constant"]


@final
class StackedAdamW:
    """AdamW on the rows of `values` (N, P), changed in place; only rows that step are touched.

    Loshchilov and Hutter, arXiv 1711.05101, in the order of operations of `torch.optim.AdamW`, so that a row becomes
    what it becomes there. Takes 8 bytes per number beside the 4 of `values`.
    """

    def __init__(self, values: Tensor, *, weight_decay: float = 0.0) -> None:
        self.values, self.weight_decay = values, weight_decay
        self.mean = torch.zeros_like(values)
        self.square = torch.zeros_like(values)
        #: how often each row has stepped
        self.steps = torch.zeros(len(values), dtype=torch.long)

    def step(self, slots: Sequence[int], gradient: Tensor, rates: Sequence[float]) -> None:
        """Returns when the rows `slots` have stepped along `gradient` (K, P) with their own `rates`."""
        chosen = torch.tensor(slots)
        self.steps[chosen] += 1
        # in double precision on the processor, as PyTorch has it for a step that is a plain number
        count = self.steps[chosen].double()
        rate = torch.tensor(rates, dtype=torch.float64)
        first, second = 1 - BETAS[0] ** count, (1 - BETAS[1] ** count).sqrt()
        size, root, kept = (
            column.to(gradient.device, gradient.dtype)[:, None]
            for column in (rate / first, second, 1 - rate * self.weight_decay)
        )
        rows = Rows(slots, gradient.device)
        values, mean, square = (rows.of(stack) for stack in (self.values, self.mean, self.square))
        if self.weight_decay:
            values.mul_(kept)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        change = square.sqrt().div_(root).add_(EPSILON)
        torch.div(mean, change, out=change)
        values.sub_(change.mul_(size))
        for stack, part in ((self.values, values), (self.mean, mean), (self.square, square)):
            rows.put(stack, part)


@final
class Rows:
    """Some rows of stacks: a view where they follow each other, else a copy."""

    def __init__(self, slots: Sequence[int], device: torch.device) -> None:
        first, last = slots[0], slots[-1]
        self._run = list(slots) == list(range(first, last + 1))
        self._span = slice(first, last + 1)
        self._index = None if self._run else torch.tensor(slots, device=device)

    def of(self, stack: Tensor) -> Tensor:
        """The rows of `stack`."""
        return stack[self._span] if self._index is None else stack.index_select(0, self._index)

    def put(self, stack: Tensor, part: Tensor) -> None:
        """Returns when `stack` has `part` in these rows."""
        if self._index is not None:
            stack.index_copy_(0, self._index, part)


def clip_(gradient: Tensor, most: float) -> Tensor:
    """The norm (K,) of each row of `gradient`, which is scaled in place to at most `most`; 0: never.

    The same as `torch.nn.utils.clip_grad_norm_` on each row alone.
    """
    norms = torch.linalg.vector_norm(gradient, dim=1)
    if most:
        gradient.mul_((most / (norms + 1e-6)).clamp_max(1.0)[:, None])
    return norms


def rate_at(step: int, steps: int, peak: float, scheduler: Scheduler, warmup: float) -> float:
    """The learning rate of step `step`, counted from 0, of `steps`: up over ⌈warmup · steps⌉, then by the scheduler.

    Transformers' schedules: linear to zero, half a cosine to zero, or constant.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * step / max(1, rising)
    done = (step - rising) / max(1, steps - rising)
    factor = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}[scheduler]
    return peak * max(0.0, factor)
