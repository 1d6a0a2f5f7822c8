"""Training a super-network: another sub-network for every micro-batch, drawn outside the forward pass.

The draw depends on seed, step and micro-batch alone: it is the same on all processes, after a restart, and when
activations are recomputed.

Sources: uniform sampling as in Shears, arXiv 2404.10934; the sandwich rule and distillation in place of
arXiv 1903.05134.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any, final

import torch
from torch.nn import functional as F

from modicum.adapters.elastic import SubNetwork, Switch
from modicum.data.encoded import IGNORED
from modicum.search.space import SearchSpace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from modicum.search.space import Choices
    from modicum.train.stages import ElasticOptions

_TINY = 1e-12


@final
class ElasticTraining:
    """The sub-networks of a model in training; the Trainer asks it around every micro-batch."""

    def __init__(self, model: Any, options: ElasticOptions, seed: int) -> None:
        """Fit the search space to the adapted `model` and activate the sub-network that is evaluated.

        Raises:
            ConfigError: the method is not elastic, or the space does not fit.
        """
        self.options, self._seed = options, seed
        self._switch = Switch(model)
        self.space = SearchSpace.of_model(options.space, model)
        model.peft_config["default"].search_space = self.space.spec.model_dump(exclude_unset=True)
        self._resting = self.space.sub_network(self.space.named(options.active))
        #: the sub-network whose turn it is, None outside training
        self.running: SubNetwork | None = None
        self._turn = (0, 1)
        self._taught: Tensor | None = None
        self.rest()

    def rest(self) -> None:
        """Activate the sub-network that is evaluated and saved."""
        self.running, self._taught = None, None
        self._switch.activate(self._resting)

    def drawn(self, step: int, micro: int) -> list[Choices]:
        """The sub-networks of one micro-batch."""
        text = f"{self._seed} {step} {micro}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        if self.options.sampling == "uniform":
            return [self.space.sample(generator)]
        random = [self.space.sample(generator) for _ in range(self.options.samples)]
        return [self.space.largest(), self.space.smallest(), *random]

    @contextlib.contextmanager
    def micro_batch(self, step: int, micro: int) -> Iterator[Iterator[SubNetwork]]:
        """Gives the sub-networks of a micro-batch one after the other, each active until the next one is asked for."""
        try:
            yield self._each(self.drawn(step, micro))
        finally:
            self.rest()

    def loss(self, loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """This sub-network's share of the micro-batch's loss, from its own `loss` and `logits`."""
        place, count = self._turn
        if self.options.distill and self.options.sampling == "sandwich":
            if place == 0:
                self._taught = logits.detach()
            else:
                assert self._taught is not None
                own, taught = _cross_entropy(logits, labels), _divergence(logits, self._taught, labels)
                # in the units of the loss whose place it takes, whatever that was divided by
                loss = taught * (loss.detach() / own.detach().clamp_min(_TINY))
        return loss / count

    def _each(self, drawn: list[Choices]) -> Iterator[SubNetwork]:
        for place, choices in enumerate(drawn):
            self.running = self.space.sub_network(choices)
            self._turn = place, len(drawn)
            self._switch.activate(self.running)
            yield self.running


def _counted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions (n, classes) float32 and labels (n,) that the loss counts."""
    if logits.ndim == labels.ndim + 1 and labels.ndim > 1:  # tokens predict their successor
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    kept = labels != IGNORED
    return logits[kept].float(), labels[kept]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(*_counted(logits, labels))


def _divergence(logits: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy against the predictions `taught`, mean over counted labels."""
    own, _ = _counted(logits, labels)
    wanted, _ = _counted(taught, labels)
    return F.cross_entropy(own, wanted.softmax(-1))
