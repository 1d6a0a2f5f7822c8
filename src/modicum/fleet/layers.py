"""A base layer under many adapters at once: each row of a batch gets the update of its own adapter.

What all adapters share (the base layer, the frozen directions) is one product over the whole batch. What they do not
share is one batched product: the rows of an adapter lie next to each other, and its numbers are read once for them.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, cast, final

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from modicum.adapters.layer import AdapterLinear
from modicum.errors import ConfigError
from modicum.methods.lora_xs import LoraXS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Turn:
    """Which adapters the running pass is for, and their numbers; shared by all layers of a model.

    `open` before the forward pass, `close` behind it; while it is closed, layers are those of the base model.
    """

    def __init__(self) -> None:
        #: trained numbers of the K adapters of the pass, by name in records: (K, *shape)
        self.values: Mapping[str, Tensor] = {}
        #: of LoRA: alpha / r of each row's adapter, (rows,)
        self.scaling = torch.empty(0)
        self._rows = self._adapters = self._most = 0
        self._places: Tensor | None = None

    @property
    def is_open(self) -> bool:
        """Whether rows have adapters now."""
        return self._adapters > 0

    def open(
        self,
        values: Mapping[str, Tensor],
        counts: Sequence[int],
        scalings: Sequence[float],
        device: torch.device,
    ) -> None:
        """From now on the first counts[0] rows of a batch belong to the first adapter, and so on."""
        self.values = values
        of_rows = [scaling for scaling, count in zip(scalings, counts, strict=True) for _ in range(count)]
        self.scaling = torch.tensor(of_rows, device=device)
        self._rows, self._adapters, self._most = sum(counts), len(counts), max(counts)
        self._places = None
        if min(counts) < self._most:
            places = [at * self._most + k for at, count in enumerate(counts) for k in range(count)]
            self._places = torch.tensor(places, device=device)

    def close(self) -> None:
        """From now on all rows belong to the base model."""
        self.values, self._places = {}, None
        self._adapters = 0

    def product(self, z: Tensor, weights: Tensor) -> Tensor:
        """Each row of `z` (rows, …, in) times the matrix (out, in) of its adapter, (rows, …, out)."""
        inner, outer = z.shape[-1], weights.shape[1]
        if self._places is None:
            grouped = z.reshape(self._adapters, -1, inner)
            return torch.bmm(grouped, weights.transpose(1, 2)).view(*z.shape[:-1], outer)
        # as many rows for each adapter, the missing ones zero: they cost less here than a product per row would
        grid = z.new_zeros(self._adapters * self._most, *z.shape[1:]).index_copy(0, self._places, z)
        found = torch.bmm(grid.view(self._adapters, -1, inner), weights.transpose(1, 2))
        return found.view(-1, *z.shape[1:-1], outer).index_select(0, self._places)

    def check(self, x: Tensor, name: str) -> None:
        """Refuse an input that is not one row of the batch after the other.

        Raises:
            ConfigError: the layer sees something else, e.g. the tokens that were sent to one expert.
        """
        if x.shape[0] != self._rows:
            raise ConfigError(
                f"{name} is given {x.shape[0]} rows where the batch has {self._rows}: layers that do not see whole "
                "rows (experts) cannot be trained in a cohort; leave them out with target_modules or exclude_modules"
            )


class Update(nn.Module, abc.ABC):
    """What the adapters of a method add to the output of one base layer; abstract."""

    @abc.abstractmethod
    def forward(self, x: Tensor, base_output: Tensor, turn: Turn) -> Tensor:
        """`base_output` plus the update of each row's adapter, (rows, …, out)."""


@final
class CoreUpdate(Update):
    """LoRA-XS: y = y₀ + scaling · U Rᵤ (A x), where R (K, r, r) is all that differs between users u.

    A x is read from the output, Uᵀ (y₀ − bias), or from the input, whichever is narrower; see `methods.lora_xs`.
    """

    def __init__(self, layer: AdapterLinear, adapter: LoraXS, name: str) -> None:
        super().__init__()
        basis, site, rank = adapter.basis, layer.site, adapter.rank
        self.name, self.scaling, self.diagonal = f"{name}.R", adapter.scaling, adapter.diagonal
        dtype = site.dtype if site.dtype.is_floating_point else torch.float32
        ut = basis.ut[:rank].to(dtype)
        a = cast("Tensor", basis.a)[:rank].to(dtype) if adapter.reads_input else None
        bias = site.bias
        shift = None if bias is None or a is not None else -(ut @ bias.detach().to(dtype))
        part = None
        if not adapter.use_sigma:
            sigma = cast("Tensor", basis.sigma)[:rank]
            part = sigma.clamp_min(sigma.new_tensor(torch.finfo(torch.float32).tiny).sqrt()).to(dtype)
        for key, value in (("ut", ut), ("a", a), ("shift", shift), ("sigma", part)):
            self.register_buffer(key, value, persistent=False)

    ut: Tensor
    a: Tensor | None
    shift: Tensor | None
    sigma: Tensor | None

    def forward(self, x: Tensor, base_output: Tensor, turn: Turn) -> Tensor:
        """`base_output` plus the update of each row's core."""
        dtype = base_output.dtype
        z = self._inner(x.to(dtype), base_output)
        cores = turn.values[self.name]
        z = turn.product(z, (torch.diag_embed(cores) if self.diagonal else cores).to(dtype))
        # addmm adds the update in the same pass that computes it, and scales it without a copy of all cores
        flat = base_output.reshape(-1, base_output.shape[-1])
        z = z.reshape(-1, z.shape[-1])
        return torch.addmm(flat, z, self.ut, alpha=self.scaling).view(base_output.shape)

    def _inner(self, x: Tensor, base_output: Tensor) -> Tensor:
        """A x, (rows, …, r), from the input or from the output."""
        a = self.a
        z = F.linear(base_output, self.ut, self.shift) if a is None else F.linear(x, a)
        return z if self.sigma is None else z / self.sigma


@final
class FactorUpdate(Update):
    """LoRA: y = y₀ + scalingᵤ · Bᵤ Aᵤ x. Lower ranks are padded with zeros, whose gradients are zero."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.a, self.b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"

    def forward(self, x: Tensor, base_output: Tensor, turn: Turn) -> Tensor:
        """`base_output` plus the update of each row's factors."""
        a, b = turn.values[self.a], turn.values[self.b]
        # as PEFT: the factors stay in float32 whatever the base model is in
        z = turn.product(x.to(a.dtype), a)
        z = turn.product(z * turn.scaling.view(-1, *[1] * (z.ndim - 1)), b)
        return base_output + z.to(base_output.dtype)


@final
class CohortLinear(nn.Module):
    """A base layer, and the update of each row's adapter while a pass is open."""

    def __init__(self, base_layer: nn.Module, update: Update, turn: Turn, name: str) -> None:
        super().__init__()
        self.base_layer, self.update, self.name = base_layer, update, name
        # shared by all layers, so it is no part of this one
        object.__setattr__(self, "turn", turn)

    turn: Turn

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, which some models look at for its type."""
        return cast("Tensor", self.base_layer.weight)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with each row's update, (rows, …, out)."""
        output = self.base_layer(x, *args, **kwargs)
        if not self.turn.is_open:
            return output
        self.turn.check(x, self.name)
        return self.update(x, output, self.turn)


def put_cohort_layers(model: nn.Module, adapter_name: str = "default") -> Turn:
    """What opens and closes passes of `model`, whose adapted layers were replaced in place.

    `model` is a base model with one LoRA-XS or plain LoRA adapter on it, which says what trains and is taken off.

    Raises:
        ConfigError: an adapter of another kind.
    """
    turn = Turn()
    adapted = [(n, m) for n, m in model.named_modules() if isinstance(m, (AdapterLinear, LoraLayer))]
    for name, layer in adapted:
        model.set_submodule(name, _cohort_layer(name, layer, adapter_name, turn))
    model.requires_grad_(False)
    return turn


def _cohort_layer(name: str, layer: Any, adapter_name: str, turn: Turn) -> CohortLinear:
    if isinstance(layer, LoraLayer):
        update: Update = FactorUpdate(name)
    else:
        adapter = layer.adapters[adapter_name]
        if not isinstance(adapter, LoraXS):
            raise ConfigError(
                f"{layer.method} has no cohort form: cohorts train lora_xs, or lora at a higher cost"
            )
        update = CoreUpdate(layer, adapter, name)
    return CohortLinear(layer.base_layer, update, turn, name)
