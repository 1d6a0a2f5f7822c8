"""What a method is: one adapter on one base layer.

A method file defines a config and one final subclass of `Adapter`. The subclass holds the trained numbers
of one adapter on one layer and says what dense update they stand for. Everything else (PEFT, several
adapters, merging, saving, mixed batches) is built on that.
"""

from __future__ import annotations

import abc
import hashlib
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.adapters.config import AdapterConfig
    from modicum.adapters.elastic import Cut
    from modicum.adapters.site import Site


class Adapter(nn.Module, abc.ABC):
    """One adapter of one method on one base layer; its parameters are exactly the trained numbers."""

    #: the config class of the method
    config_class: ClassVar[type[AdapterConfig]]
    #: the paper, e.g. "arXiv 2405.17604"
    source: ClassVar[str]
    #: the dense update in one line of plain mathematics
    formula: ClassVar[str]
    #: how many tensors train on one layer
    tensors: ClassVar[int] = 1
    #: (q, p) when the update is constant on q×p blocks of the weight, which folds into offsets
    block: tuple[int, int] | None = None
    #: whether the update is whole steps of the grid that the base weight lies on, so that merging changes codes alone
    on_grid: ClassVar[bool] = False
    #: whether the adapter also runs at ranks below its own, as the prefix of its tensors
    elastic: ClassVar[bool] = False
    #: which part of the layer the active sub-network has, None for all of it; the layer heeds it, not the method
    cut: Cut | None = None

    def __init__(self, site: Site, config: AdapterConfig) -> None:
        super().__init__()
        # the site belongs to the layer, not to this adapter: keep it out of state dicts and `.to()`
        object.__setattr__(self, "site", site)
        #: the largest rank, which the tensors have and the scaling is divided by
        self.rank = config.rank_for(site.name)
        #: the rank at which the adapter runs, set by the active sub-network
        self.active_rank = self.rank
        self.scaling = config.alpha_for(site.name) / self.rank
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    site: Site

    @classmethod
    @abc.abstractmethod
    def count(cls, in_features: int, out_features: int, rank: int, config: AdapterConfig) -> int:
        """Trained numbers on a layer of the given shape, in closed form."""

    @classmethod
    def misfit(cls, in_features: int, out_features: int, rank: int, config: AdapterConfig) -> str | None:
        """Why a layer of this shape cannot be adapted with `rank` and `config`; None when it can."""
        del config
        return (
            f"the rank is larger than the layer (r = {rank})"
            if rank > min(in_features, out_features)
            else None
        )

    def generator(self, config: AdapterConfig) -> torch.Generator:
        """The source of this adapter's initial values: the same for the same seed and layer name, on any machine."""
        seed = hashlib.blake2b(f"{config.seed} {self.site.name}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(seed, "little"))

    @abc.abstractmethod
    def delta_weight(self) -> Tensor:
        """The dense update, shape (out, in), float32: the definition of what this adapter does."""

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """`base_output` plus the update applied to `x`, shape (*batch, out).

        The default multiplies with the dense update; methods override it where there is a cheaper way.
        """
        x = self.dropout(x) if self.dropout is not None else x
        return base_output + F.linear(x, self.delta_weight().to(x.dtype)).to(base_output.dtype)

    @classmethod
    def forward_mixed(
        cls, adapters: Sequence[Adapter], rows: Tensor, x: Tensor, base_output: Tensor
    ) -> Tensor:
        """`base_output` plus, on each batch row, the update of that row's adapter.

        `rows` (batch,) indexes `adapters`, −1 is the base model alone. The default runs the adapters one
        after the other on their rows; methods override it where one product serves all rows.
        """
        output = base_output.clone()
        for index, adapter in enumerate(adapters):
            mine = (rows == index).nonzero().squeeze(-1)
            if len(mine):
                output = output.index_copy(0, mine, adapter(x[mine], base_output[mine]))
        return output

    def block_values(self) -> Tensor:
        """The update of each (q, p) block, (out/q, in/p) float32; for methods whose update has a `block`."""
        raise NotImplementedError(f"{type(self).__name__} has no block")

    def moved_steps(self) -> Tensor:
        """By how many steps of the base's grid each weight moves, (out, in) float32; for methods `on_grid`."""
        raise NotImplementedError(f"the update of {type(self).__name__} lies on no grid")

    def lora_factors(self) -> tuple[Tensor, Tensor] | None:
        """Factors (B: (out, k), A: (k, in)) with scaling · B A equal to the update, if it is low-rank."""
        return None
