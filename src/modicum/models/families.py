"""Which layers form a width: the channels of an MLP, or the attention heads of one transformer layer.

A width has units. Its producers give one run of outputs per unit, its consumers take one run of inputs per unit,
and nothing else of the model sees them, so that the first n units alone are a smaller model of the same kind.
Attention heads are counted in key/value heads, with the query heads that share them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError
from modicum.quant.base import format_of

if TYPE_CHECKING:
    from torch import nn

    from modicum.adapters.elastic import Cut, Runs

#: what the model types of `models.subnetwork` begin with
OURS = "modicum_"


@dataclass(frozen=True)
class Port:
    """Where the units of a width are in one layer: its rows where it produces them, its columns where it takes them."""

    #: module name in the model
    layer: str
    #: for each part of the weight: where it starts, and the rows (columns) of one unit
    parts: tuple[tuple[int, int], ...]

    def runs(self, units: int) -> Runs:
        """The rows (columns) of the first `units` units: (start, start + units · size) for each part."""
        return tuple((start, start + units * size) for start, size in self.parts)


@dataclass(frozen=True)
class Width:
    """Layers of one transformer layer that become narrower together."""

    #: name of the transformer layer + ".mlp" or ".heads"
    name: str
    #: mlp or heads
    kind: str
    #: index of the transformer layer
    block: int
    #: channels, or key/value heads with the query heads that share them
    units: int
    #: what one unit counts as for users: 1 channel, or the query heads of one key/value head
    size: int
    outputs: tuple[Port, ...]
    inputs: tuple[Port, ...]
    #: whether the stock module runs when its producers give fewer outputs; else only the consumers are cut in forward
    cuts_outputs: bool

    def cuts(self, units: int) -> dict[str, Cut]:
        """What each layer runs where `units` units are left, by layer; empty at full width.

        Raises:
            ConfigError: the width has no such number of units.
        """
        from modicum.adapters.elastic import Cut

        if not 1 <= units <= self.units:
            raise ConfigError(f"{self.name} has 1 to {self.units} units, not {units}")
        if units == self.units:
            return {}
        cuts = {port.layer: Cut(outputs=port.runs(units)) for port in self.outputs if self.cuts_outputs}
        return cuts | {port.layer: Cut(inputs=port.runs(units)) for port in self.inputs}


@dataclass(frozen=True)
class Layout:
    """How the models of one family name the layers of a transformer layer."""

    family: str
    #: `model_type` of the configurations with this layout
    model_types: tuple[str, ...]
    #: last name of the list of transformer layers
    blocks: str
    #: the attention module, and its attribute with the numbers per head
    attention: str
    head_size: str
    #: query, key and value; one name where they are one layer
    heads: tuple[str, ...]
    heads_out: str
    #: layers that give the channels of the MLP, and how many parts each has
    channels: tuple[str, ...]
    channels_parts: int
    channels_out: str
    #: whether the attention module runs with fewer heads than it was built for
    cuts_heads: bool = True


_LAYOUTS = (
    Layout(
        "llama",
        (
            *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "granite"),
            *("olmo", "olmo2", "olmo3"),
        ),
        "layers",
        "self_attn",
        "head_dim",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        1,
        "mlp.down_proj",
    ),
    Layout(
        "phi3",
        ("phi3",),
        "layers",
        "self_attn",
        "head_dim",
        ("self_attn.qkv_proj",),
        "self_attn.o_proj",
        ("mlp.gate_up_proj",),
        2,
        "mlp.down_proj",
        cuts_heads=False,
    ),
    Layout(
        "phi",
        ("phi",),
        "layers",
        "self_attn",
        "head_dim",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.dense",
        ("mlp.fc1",),
        1,
        "mlp.fc2",
    ),
    Layout(
        "opt",
        ("opt",),
        "layers",
        "self_attn",
        "head_dim",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        ("fc1",),
        1,
        "fc2",
        cuts_heads=False,
    ),
    Layout(
        "gpt2",
        ("gpt2",),
        "h",
        "attn",
        "head_dim",
        ("attn.c_attn",),
        "attn.c_proj",
        ("mlp.c_fc",),
        1,
        "mlp.c_proj",
        cuts_heads=False,
    ),
    Layout(
        "bert",
        ("bert", "roberta", "xlm-roberta", "electra"),
        "layer",
        "attention.self",
        "attention_head_size",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        ("intermediate.dense",),
        1,
        "output.dense",
    ),
)


def layout(model_type: str) -> Layout:
    """How models of this type name their layers; models of `models.subnetwork` are of their stock type.

    Raises:
        ConfigError: we do not know the type.
    """
    kind = model_type.removeprefix(OURS)
    for known in _LAYOUTS:
        if kind in known.model_types:
            return known
    raise ConfigError(
        f"which layers of a {kind!r} model form a width is not known; known: {', '.join(model_types())}. Ranks can be "
        "elastic on any model"
    )


def model_types() -> list[str]:
    """The model types whose layouts we know, sorted."""
    return sorted(name for known in _LAYOUTS for name in known.model_types)


def family(model: nn.Module) -> str:
    """The family of `model`: llama, phi3, phi, opt, gpt2 or bert.

    Raises:
        ConfigError: we do not know it.
    """
    return layout(unwrapped(model).config.model_type).family


def unwrapped(model: nn.Module) -> Any:
    """The model inside a PEFT model (adapters still on its layers), or `model` itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The transformer layers of an unwrapped model by name, in order.

    Raises:
        ConfigError: we do not know the family, or there are none.
    """
    pattern = re.compile(rf"(?:.*\.)?{layout(unwrapped(model).config.model_type).blocks}\.\d+")
    found = {name: module for name, module in unwrapped(model).named_modules() if pattern.fullmatch(name)}
    if not found:
        raise ConfigError(f"{type(unwrapped(model)).__name__} has no transformer layers")
    return found


def widths(model: nn.Module) -> list[Width]:
    """The widths of `model`, those of each transformer layer together: heads first, then the MLP.

    Also of a model on the meta device or in PEFT; names are those of the model itself. Layers whose queries and keys
    are normalised over all heads at once (OLMo 2) have no heads to leave out.

    Raises:
        ConfigError: we do not know the family.
    """
    known = layout(unwrapped(model).config.model_type)
    found = []
    for index, (name, block) in enumerate(blocks(model).items()):
        if (heads := _heads(known, name, index, block)) is not None:
            found.append(heads)
        found.append(_channels(known, name, index, block))
    return found


def known_widths(model: nn.Module) -> list[Width]:
    """The `widths` of `model`; none where we do not know its family, whose ranks alone can be elastic."""
    try:
        return widths(model)
    except ConfigError:
        return []


def _channels(known: Layout, name: str, index: int, block: nn.Module) -> Width:
    units = _shape(block, known.channels_out)[1]
    parts = tuple((part * units, 1) for part in range(known.channels_parts))
    outputs = tuple(Port(f"{name}.{layer}", parts) for layer in known.channels)
    inputs = (Port(f"{name}.{known.channels_out}", ((0, 1),)),)
    return Width(f"{name}.mlp", "mlp", index, units, 1, outputs, inputs, cuts_outputs=True)


def _heads(known: Layout, name: str, index: int, block: nn.Module) -> Width | None:
    attention: Any = block.get_submodule(known.attention)
    size = int(getattr(attention, known.head_size))
    norms = [child for child_name, child in attention.named_children() if child_name in {"q_norm", "k_norm"}]
    if any(norm.weight.numel() != size for norm in norms):
        return None
    queries = _shape(block, known.heads_out)[1] // size
    if len(known.heads) == 1:
        units = (_shape(block, known.heads[0])[0] // size - queries) // 2
    else:
        units = _shape(block, known.heads[1])[0] // size
    each = queries // units
    per_unit = (each * size, size, size)
    if len(known.heads) == 1:
        starts = (0, queries * size, (queries + units) * size)
        outputs = (Port(f"{name}.{known.heads[0]}", tuple(zip(starts, per_unit, strict=True))),)
    else:
        layers = zip(known.heads, per_unit, strict=True)
        outputs = tuple(Port(f"{name}.{layer}", ((0, rows),)) for layer, rows in layers)
    inputs = (Port(f"{name}.{known.heads_out}", ((0, each * size),)),)
    return Width(f"{name}.heads", "heads", index, units, each, outputs, inputs, cuts_outputs=known.cuts_heads)


def _shape(block: nn.Module, name: str) -> tuple[int, int]:
    """(out, in) of the layer, whatever adapters are on it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = block.get_submodule(name)
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    fmt = format_of(base)
    assert fmt is not None, f"{name} is no linear layer"
    return fmt.shape(base)
