"""The order of training rows: a function of seed and epoch alone, whatever happened before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import Sampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

#: batches that are sorted by length together: enough to save padding, few enough to stay random
_POOL = 50


class EpochSampler(Sampler[int]):
    """A shuffled order for every epoch, the same in every process and after every restart.

    With `lengths`, rows of similar length share a batch of `batch_size`; pools of batches stay shuffled.
    """

    def __init__(
        self, size: int, seed: int, *, lengths: Sequence[int] | None = None, batch_size: int = 1
    ) -> None:
        self.epoch = 0
        self._size, self._seed = size, seed
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._batch_size = batch_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the epoch `epoch`, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self._seed, self.epoch))
        order = random.permutation(self._size)
        if self._lengths is not None:
            pool = _POOL * self._batch_size
            parts = [order[at : at + pool] for at in range(0, self._size, pool)]
            ordered = np.concatenate(
                [part[np.argsort(-self._lengths[part], kind="stable")] for part in parts]
            )
            full = self._size // self._batch_size * self._batch_size
            batches = ordered[:full].reshape(-1, self._batch_size)
            # the batches themselves in random order; a last, smaller one stays last
            order = np.concatenate([batches[random.permutation(len(batches))].reshape(-1), ordered[full:]])
        yield from order.tolist()
