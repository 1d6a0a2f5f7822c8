"""A cohort: N adapters on one base model, as the rows of one stack of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch.nn import functional as F

from modicum.data.encoded import IGNORED, Collator
from modicum.fleet.adamw import Rows, StackedAdamW, clip_
from modicum.fleet.base import stacked
from modicum.fleet.passes import multiple_on

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from modicum.data.encoded import Encoded
    from modicum.fleet.base import FleetBase
    from modicum.fleet.passes import Pass


@dataclass(frozen=True)
class Stepped:
    """What a step found, one value for each adapter of its pass."""

    #: loss before the step, and norm of the gradient before clipping; not finite where training has diverged
    losses: list[float]
    norms: list[float]


@final
class Cohort:
    """The adapters of N users while they train; `values` (N, P) float32 are all their numbers.

    A row is laid out as the values of a record are, so that the numbers of layer l are the slice (N, r, r) of it,
    and a finished adapter is a row.
    """

    def __init__(self, base: FleetBase, ranks: Sequence[int], *, weight_decay: float = 0.0) -> None:
        """Adapters that have not learnt anything yet, of the given ranks."""
        self.base, self.ranks = base, tuple(ranks)
        self.values = stacked(base, ranks)
        self._layout = base.widest.record.layout
        self._sizes = [int(size) for size in self._layout.offsets[1:] - self._layout.offsets[:-1]]
        self._pad = Collator(base.tokenizer.pad_token_id, multiple=multiple_on(base.device.type))
        self._optimizer: StackedAdamW | None = None
        self._weight_decay = weight_decay
        self._scalings = [base.kinds[rank].scaling for rank in self.ranks]

    @property
    def optimizer(self) -> StackedAdamW:
        """The optimizer's state, made with the first step."""
        if self._optimizer is None:
            self._optimizer = StackedAdamW(self.values, weight_decay=self._weight_decay)
        return self._optimizer

    def numbers(self, name: str) -> Tensor:
        """The numbers of the tensor `name` of all adapters, (N, *shape), a view."""
        at = self._layout.names.index(name)
        start, shape = int(self._layout.offsets[at]), self._layout.shapes[at]
        return self.values[:, start : start + self._sizes[at]].view(-1, *shape)

    def step(self, one: Pass, data: Mapping[int, Encoded], rates: Sequence[float], most: float) -> Stepped:
        """What was found while every adapter of the pass made one step on its rows, with its own rate.

        The loss of an adapter is the mean over its own counted tokens (or rows), and its gradient is scaled to a
        norm of at most `most`, so that nothing depends on who else is in the pass. An adapter whose gradient is not
        finite stays as it is.
        """
        rows = Rows(one.slots, self.base.device)
        values = rows.of(self.values).detach().requires_grad_()
        with torch.enable_grad():
            sums, counts = self._losses(one, data, values)
            losses = sums / counts.clamp_min(1)
            (gradient,) = torch.autograd.grad(losses.sum(), values)
        with torch.no_grad():
            norms = clip_(gradient, most)
            fine = torch.isfinite(norms) & torch.isfinite(losses)
            if bool(fine.all()):
                self.optimizer.step(one.slots, gradient, rates)
            elif bool(fine.any()):
                kept = fine.nonzero().flatten().tolist()
                slots = [one.slots[at] for at in kept]
                self.optimizer.step(slots, gradient[fine], [rates[at] for at in kept])
        return Stepped(losses.tolist(), norms.tolist())

    @torch.no_grad()
    def measure(
        self, one: Pass, data: Mapping[int, Encoded], *, base_only: bool = False
    ) -> list[list[float]]:
        """Of each adapter of the pass: summed loss, what it was counted over, and how much of that was guessed right.

        Counted are tokens, or rows of a classifier. `base_only`: what the base model says without any adapter.
        """
        values = None if base_only else Rows(one.slots, self.base.device).of(self.values)
        logits, labels = self._logits(one, data, values)
        sums, counts = self._summed(one, logits, labels)
        hits = logits.argmax(-1) == labels
        right = self._by_adapter(one, hits.reshape(len(labels), -1).sum(1).float())
        return torch.stack([sums, counts, right], 1).double().tolist()

    def _losses(self, one: Pass, data: Mapping[int, Encoded], values: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = self._logits(one, data, values)
        return self._summed(one, logits, labels)

    def _logits(self, one: Pass, data: Mapping[int, Encoded], values: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits and what they should say: (rows, tokens, words) and (rows, tokens), or (rows, classes) and (rows,)."""
        features = [data[slot][row] for slot, rows in zip(one.slots, one.rows, strict=True) for row in rows]
        batch = {name: part.to(self.base.device) for name, part in self._pad(features).items()}
        labels = batch.pop("labels")
        turn, extra = self.base.turn, {"use_cache": False} if self.base.task == "causal_lm" else {}
        try:
            if values is not None:
                scalings = [self._scalings[slot] for slot in one.slots]
                turn.open(self._parts(values), one.counts, scalings, self.base.device)
            logits: Any = self.base.model(**batch, **extra).logits
        finally:
            turn.close()
        if self.base.task == "causal_lm":
            labels = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        return logits.float(), labels

    def _parts(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split(self._sizes, 1)
        layout = zip(self._layout.names, self._layout.shapes, parts, strict=True)
        return {name: part.view(-1, *shape) for name, shape, part in layout}

    def _summed(self, one: Pass, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed loss of each adapter, and what it is summed over."""
        losses = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="none"
        )
        counted = (labels != IGNORED).reshape(len(labels), -1).sum(1).float()
        return self._by_adapter(one, losses.view(len(labels), -1).sum(1)), self._by_adapter(one, counted)

    def _by_adapter(self, one: Pass, of_rows: Tensor) -> Tensor:
        """Values (rows,) added up for each adapter, (K,)."""
        counts = one.counts
        if min(counts) == max(counts):
            return of_rows.view(len(counts), -1).sum(1)
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(of_rows.device)
        return of_rows.new_zeros(len(counts)).index_add(0, owners, of_rows)
