"""Models whose widths are smaller: cut out of a model in memory, and as classes that the Auto classes load.

Where every transformer layer has the same widths, a stock configuration says so, and Transformers alone loads the
folder. Else `modicum_llama` (and so on for every type in `models.families`) is the stock class with the numbers of
channels and key/value heads of each layer in its configuration: it builds the stock model and cuts it. Our classes
are made when the first one is asked for, so that registering them imports no model.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, final

from modicum.errors import ConfigError, did_you_mean, listing
from modicum.models.families import OURS, blocks, layout, model_types, unwrapped, widths

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from modicum.adapters.elastic import Cut
    from modicum.models.families import Layout, Width

#: fields of our configurations, one number per transformer layer, by kind of width
_FIELDS = {"mlp": "mlp_channels", "heads": "key_value_heads"}
#: what stock configurations call the channels of all layers, where it is not intermediate_size
_STOCK_CHANNELS = {"gpt2": "n_inner", "opt": "ffn_dim"}
#: the Auto classes that load ours
_TASKS = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)


def register() -> None:
    """Make the Auto classes know our model types; no model is imported until one is loaded."""
    from transformers import AutoConfig

    for kind in model_types():
        AutoConfig.register(OURS + kind, _entry(kind), exist_ok=True)


def kept(model: nn.Module, units: Mapping[str, int]) -> dict[str, Cut]:
    """The rows and columns that each layer keeps where widths (by name) have so many units left, by layer.

    Layers of full width are left out. Unlike the cuts of a super-network these are of the weights themselves.

    Raises:
        ConfigError: we do not know the family, a width is not there or has no such number of units.
    """
    from modicum.adapters.elastic import Cut

    found = {width.name: width for width in widths(model)}
    unknown = [f"{name!r}{did_you_mean(name, found)}" for name in units if name not in found]
    if unknown:
        raise ConfigError(f"the model has no width {listing(unknown)}; one is called {next(iter(found))!r}")
    cuts: dict[str, Cut] = {}
    for name, left in units.items():
        width = found[name]
        if width.cuts(left):
            cuts |= {port.layer: Cut(outputs=port.runs(left)) for port in width.outputs}
            cuts |= {port.layer: Cut(inputs=port.runs(left)) for port in width.inputs}
    return cuts


def narrowed(part: str, tensor: Tensor, cut: Cut, *, transposed: bool = False) -> Tensor:
    """What is left of a layer's `weight`, (out, in) or `transposed`, or of its `bias`, as a tensor of its own."""
    from modicum.adapters.elastic import take

    if part == "bias":
        return take(tensor, cut.outputs, 0).clone()
    return take(take(tensor, cut.outputs, int(transposed)), cut.inputs, int(not transposed)).clone()


def narrow(model: nn.Module, units: Mapping[str, int]) -> None:
    """Leaves the first units of each width (by name) of a dense `model` without adapters, in place.

    Raises:
        ConfigError: we do not know the family, a width is not there or has no such number of units.
    """
    from torch.nn import Parameter

    found = {width.name: width for width in widths(model)}
    for name, cut in kept(model, units).items():
        layer: Any = model.get_submodule(name)
        for part, tensor in list(layer.named_parameters()):
            values = narrowed(part, tensor.detach(), cut, transposed=is_transposed(layer))
            setattr(layer, part, Parameter(values.contiguous(), tensor.requires_grad))
        if is_transposed(layer):
            layer.nx, layer.nf = layer.weight.shape
        else:
            layer.out_features, layer.in_features = layer.weight.shape
    known = layout(unwrapped(model).config.model_type)
    layers = list(blocks(model).values())
    for name, left in units.items():
        if found[name].kind == "heads":
            _fit(known, layers[found[name].block].get_submodule(known.attention), found[name], left)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight as (in, out): GPT-2's Conv1D."""
    from torch import nn

    return not isinstance(layer, nn.Linear)


def smaller_class(model: nn.Module, units: Mapping[str, int]) -> tuple[Any, Any]:
    """(class, configuration) of `model` with the first units of each width (by name).

    A stock class where one can express it: the model's own, or Mistral for a Llama whose heads no longer divide its
    hidden size. Else ours.

    Raises:
        ConfigError: we do not know the family, a width is not there or has no such number of units, or the model is
            of a class that none of the Auto classes we serve makes.
    """
    root: Any = unwrapped(model)
    kept(root, units)
    found = widths(root)
    left = {kind: [units.get(w.name, w.units) for w in found if w.kind == kind] for kind in _FIELDS}
    kind, task = root.config.model_type.removeprefix(OURS), _task(root)
    ours = _classes(kind)
    values = root.config.to_dict()
    for field in ("model_type", "architectures", *_FIELDS.values()):
        values.pop(field, None)
    own = values | {field: left[width] for width, field in _FIELDS.items()}
    config = _named(ours["config"].from_dict(own), ours[task])
    wanted = _shapes(ours[task], config)
    if all(len(set(units_of_kind)) <= 1 for units_of_kind in left.values()):
        first = {width.kind: width for width in found}
        uniform = values | _uniform(kind, root, first, {name: v[0] for name, v in left.items() if v})
        for stock_kind in dict.fromkeys((kind, "mistral" if kind == "llama" else kind)):
            stock = _stock(stock_kind, task, uniform)
            if stock is not None and _shapes(*stock) == wanted:
                return stock
    return ours[task], config


def is_ours(model_class: type) -> bool:
    """Whether Transformers needs `import modicum` to load the class."""
    return model_class.__module__ == __name__


def _uniform(kind: str, model: Any, first: Mapping[str, Width], left: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a stock configuration for these units in every transformer layer."""
    fields = {_STOCK_CHANNELS.get(kind, "intermediate_size"): left["mlp"]}
    if "heads" in left and left["heads"] != first["heads"].units:
        known = layout(kind)
        attention = next(iter(blocks(model).values())).get_submodule(known.attention)
        heads = left["heads"]
        fields |= {"num_attention_heads": heads * first["heads"].size, "num_key_value_heads": heads}
        fields["head_dim"] = getattr(attention, known.head_size)
    return fields


def _stock(kind: str, task: str, values: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """(class, configuration) of the stock model with these fields, None if its configuration refuses them."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    config_class = transformers.CONFIG_MAPPING[kind]
    if kind == "mistral":
        values = {name: v for name, v in values.items() if name not in {"attention_bias", "mlp_bias"}}
        values = {"sliding_window": None} | values
    model_class = getattr(transformers, task)._model_mapping[config_class]  # noqa: SLF001 - it has no public name
    try:
        config = _named(config_class.from_dict(dict(values)), model_class)
        _shapes(model_class, config)
    # whatever a configuration or a model raises when heads do not divide its hidden size
    except (StrictDataclassError, ValueError, TypeError, RuntimeError):
        return None
    return model_class, config


def _named(config: Any, model_class: type) -> Any:
    config.architectures = [model_class.__name__]
    return config


def _shapes(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    import torch

    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in model_class(config).state_dict().items()}


def _task(model: Any) -> str:
    """The Auto class that makes models of this class."""
    import transformers

    for task in _TASKS:
        mapping = getattr(transformers, task)._model_mapping  # noqa: SLF001 - it has no public name
        if type(model.config) in mapping and mapping[type(model.config)] is type(model):
            return task
    raise ConfigError(
        f"a {type(model).__name__} cannot be made smaller; load it with one of {', '.join(_TASKS)}"
    )


@functools.cache
def _classes(kind: str) -> dict[str, Any]:
    """Our classes for a stock model type, known to the Auto classes: by task, and `config`."""
    import transformers

    stock_config = transformers.CONFIG_MAPPING[kind]
    config_class: Any = type(
        f"Modicum{stock_config.__name__}",
        (stock_config,),
        {"model_type": OURS + kind, "__module__": __name__, "__doc__": stock_config.__doc__},
    )
    transformers.AutoConfig.register(OURS + kind, config_class, exist_ok=True)
    made = {"config": config_class}
    for task in _TASKS:
        auto = getattr(transformers, task)
        if stock_config in auto._model_mapping:  # noqa: SLF001 - it has no public name
            made[task] = _model_class(auto._model_mapping[stock_config], config_class)  # noqa: SLF001
            auto.register(config_class, made[task], exist_ok=True)
    return made


def _model_class(stock: Any, config_class: Any) -> Any:
    """The stock model class, cut to the widths in its configuration as soon as it is built."""

    def __init__(self: Any, config: Any, *args: Any, **options: Any) -> None:  # noqa: N807 - of the class below
        stock.__init__(self, config, *args, **options)
        narrow(self, {w.name: getattr(config, _FIELDS[w.kind])[w.block] for w in widths(self)})

    members = {
        "config_class": config_class,
        "__init__": __init__,
        "__module__": __name__,
        "__doc__": stock.__doc__,
    }
    return type(f"Modicum{stock.__name__}", (stock,), members)


def _entry(kind: str) -> type:
    """What AutoConfig finds under our model type until the classes are there."""

    def from_dict(values: dict[str, Any], **options: Any) -> Any:
        return _classes(kind)["config"].from_dict(values, **options)

    return type(f"Modicum_{kind}", (), {"model_type": OURS + kind, "from_dict": staticmethod(from_dict)})


def _fit(known: Layout, attention: Any, width: Width, units: int) -> None:
    """Give an attention module that counts its heads their new number."""
    queries, size = units * width.size, getattr(attention, known.head_size)
    if known.family == "phi3":
        attention.num_key_value_heads = units
        attention.config = _LayerConfig(attention.config, queries)
    elif known.family == "gpt2":
        attention.num_heads, attention.split_size = queries, queries * size
    elif known.family == "opt":
        attention.num_heads = queries
    elif known.family == "bert":
        attention.num_attention_heads, attention.all_head_size = queries, queries * size


@final
class _LayerConfig:
    """The configuration of a model as one attention module sees it: with a number of heads of its own."""

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self._config = config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # asked for by copy and pickle before there is one
            raise AttributeError(name)
        return getattr(self._config, name)
