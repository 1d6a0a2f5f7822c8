"""What sub-networks cost, from shapes alone: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from peft.tuners.tuners_utils import BaseTunerLayer

from modicum.adapters.elastic import SubNetwork, Switch
from modicum.models.architecture import linear_shape
from modicum.models.families import known_widths

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from modicum.models.families import Width


@dataclass(frozen=True)
class Linear:
    """A linear layer of the super-network."""

    outputs: int
    inputs: int
    bias: bool
    #: largest rank of its adapter, 0 without one
    rank: int = 0


@final
class Costs:
    """The costs of the sub-networks of one model.

    `merged` says whether adapters are folded into the weights, as in an extracted sub-network, or run beside them,
    with k (in + out) numbers each, as LoRA does.
    """

    def __init__(
        self,
        layers: Mapping[str, Linear],
        parts: Sequence[Width],
        parameters: int,
        *,
        merged: bool = True,
        bytes_each: float = 2.0,
        stored: int | None = None,
        cache: int = 0,
    ) -> None:
        """`parameters`: of the base model, tied ones once; `bytes_each`: of a weight that is written.

        `stored`: bytes of a base model that stays as it is, low-bit say; `cache`: of keys and values for one token.
        """
        self.layers, self.merged = dict(layers), merged
        self._parts = {width.name: width for width in parts}
        self._parameters, self._bytes_each, self._cache = parameters, bytes_each, cache
        self._stored = stored

    @classmethod
    def of_model(cls, model: Any, adapter_name: str = "default", *, merged: bool = True) -> Costs:
        """The costs of a PEFT model with an elastic adapter; its head counts as a linear layer."""
        ranks = {name: adapter.rank for name, adapter in Switch(model, adapter_name).adapters.items()}
        layers: dict[str, Linear] = {}
        total, stored, inside = 0, 0, ("\0",)
        seen: set[int] = set()
        base = model.get_base_model()
        for name, module in base.named_modules():
            # a head that is trained in full is there twice
            if name.startswith(inside) or ".modules_to_save." in f".{name}.":
                continue
            bare = module
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
                bare = module.get_base_layer()
            shape = linear_shape(bare)
            if shape is not None:
                bias = getattr(bare, "bias", None) is not None
                layers[name] = Linear(*shape, bias, ranks.get(name, 0))
            held = dict(bare.named_parameters(recurse=False))
            if shape is not None:
                # a quantized weight is no parameter, or a packed one, but as many numbers
                weight = held.get("weight")
                if weight is None or id(weight) not in seen:
                    total += shape[0] * shape[1] - (0 if weight is None else weight.numel())
            total += sum(p.numel() for p in held.values() if id(p) not in seen)
            held |= dict(bare.named_buffers(recurse=False))
            stored += sum(t.nbytes for t in held.values() if id(t) not in seen)
            seen |= {id(t) for t in held.values()}
        return cls(
            layers,
            known_widths(base),
            total,
            merged=merged,
            bytes_each=base.dtype.itemsize,
            stored=None if merged else stored,
            cache=_cache(base.config.get_text_config(), base.dtype.itemsize),
        )

    @classmethod
    def of_shapes(
        cls, model: Any, ranks: Mapping[str, int], *, merged: bool = True, bytes_each: float = 2.0
    ) -> Costs:
        """The costs of a dense base model (on the meta device, say) whose layers get adapters of the given `ranks`.

        `bytes_each`: of a weight in the number type that the model will be loaded in.
        """
        layers = {
            name: Linear(*shape, getattr(module, "bias", None) is not None, ranks.get(name, 0))
            for name, module in model.named_modules()
            if (shape := linear_shape(module))
        }
        total = sum(p.numel() for p in model.parameters())
        stored = round(total * bytes_each) + sum(b.nbytes for b in model.buffers())
        return cls(
            layers,
            known_widths(model),
            total,
            merged=merged,
            bytes_each=bytes_each,
            stored=None if merged else stored,
            cache=_cache(model.config.get_text_config(), bytes_each),
        )

    def parameters(self, sub_network: SubNetwork | None = None) -> int:
        """All numbers of the model that are left, embeddings and norms included, adapters unless merged."""
        removed = sum(self._removed(sub_network).values())
        return self._parameters - removed + self._adapters(sub_network)

    def linear_parameters(self, sub_network: SubNetwork | None = None) -> int:
        """The weights of the linear layers that are left, head included, adapters unless merged."""
        shapes = self._shapes(sub_network)
        return sum(out * inner for out, inner in shapes.values()) + self._adapters(sub_network)

    def macs(self, sub_network: SubNetwork | None = None, tokens: int = 1) -> int:
        """Multiply-accumulates of the linear layers for `tokens` tokens; attention's own products are not counted."""
        return tokens * self.linear_parameters(sub_network)

    def bytes(self, sub_network: SubNetwork | None = None) -> int:
        """Bytes of what is written: all numbers in the dtype of the model, or adapters beside a base as it is."""
        if self._stored is not None:
            return self._stored + round(self._adapters(sub_network) * self._bytes_each)
        return round(self.parameters(sub_network) * self._bytes_each)

    def memory(self, sub_network: SubNetwork | None = None, tokens: int = 1) -> int:
        """Bytes of weights, and of keys and values of `tokens` tokens."""
        chosen = sub_network or SubNetwork()
        heads = [width for width in self._parts.values() if width.kind == "heads"]
        share = 1.0
        if heads:
            left = sum(chosen.widths.get(width.name, width.units) for width in heads)
            share = left / sum(width.units for width in heads)
        return self.bytes(sub_network) + round(tokens * self._cache * share)

    def of(self, name: str, sub_network: SubNetwork | None, tokens: int) -> int:
        """The cost called parameters, macs, bytes or memory."""
        if name in ("macs", "memory"):
            return getattr(self, name)(sub_network, tokens)
        return getattr(self, name)(sub_network)

    def _shapes(self, sub_network: SubNetwork | None) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer that are left."""
        shapes = {name: (layer.outputs, layer.inputs) for name, layer in self.layers.items()}
        for name, units in (sub_network or SubNetwork()).widths.items():
            width = self._parts[name]
            for port in width.outputs:
                rows = sum(stop - start for start, stop in port.runs(units))
                shapes[port.layer] = rows, shapes[port.layer][1]
            for port in width.inputs:
                columns = sum(stop - start for start, stop in port.runs(units))
                shapes[port.layer] = shapes[port.layer][0], columns
        return shapes

    def _removed(self, sub_network: SubNetwork | None) -> dict[str, int]:
        """Weights and biases that are gone, by layer."""
        removed = {}
        for name, (out, inner) in self._shapes(sub_network).items():
            layer = self.layers[name]
            gone = layer.outputs * layer.inputs - out * inner
            removed[name] = gone + (layer.outputs - out if layer.bias else 0)
        return removed

    def _adapters(self, sub_network: SubNetwork | None) -> int:
        if self.merged:
            return 0
        ranks = (sub_network or SubNetwork()).ranks
        return sum(
            ranks.get(name, self.layers[name].rank) * (out + inner)
            for name, (out, inner) in self._shapes(sub_network).items()
        )


def _cache(config: Any, bytes_each: float) -> int:
    """Bytes of the keys and values of one token."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return round(2 * config.num_hidden_layers * groups * head * bytes_each)
