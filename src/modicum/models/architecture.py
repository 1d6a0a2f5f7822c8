"""Architectures without their weights: which linear layers a model has, how wide they are, what its head is.

Read from a Hugging Face `config.json` (the model is built on the meta device, which takes no memory), or from
a small YAML of shapes for models that have no such file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from modicum.errors import ConfigError, TargetError, did_you_mean, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

_BUNDLED = Path(__file__).parent / "shapes"
_REGEX = re.compile(r"[\\^$*+?()\[\]{}|]")


@dataclass(frozen=True)
class Architecture:
    """What a plan needs to know of a model."""

    name: str
    #: (out, in) of every linear layer, head included, by name
    linear: dict[str, tuple[int, int]]
    #: names among `linear` that 'all-linear' leaves out
    head: frozenset[str]
    #: all numbers of the model, head included
    parameters: int
    #: numbers in the modules that are trained and saved in full (a classification head)
    head_parameters: int = 0
    #: the model on the meta device, where there is one
    model: Any = field(default=None, repr=False, compare=False)

    def shapes(self, target_modules: Targets = "all-linear", **options: Any) -> dict[str, tuple[int, int]]:
        """(out, in) of the layers that PEFT would adapt, by name; see `linear_shapes` for the options."""
        if self.model is not None:
            modules_to_save = list(self.head) or None
            return linear_shapes(self.model, target_modules, modules_to_save=modules_to_save, **options)
        return _select(self.linear, target_modules, self.head, **options)


if TYPE_CHECKING:
    Targets = str | Iterable[str]


def read_architecture(source: str, task: str = "auto", num_labels: int | None = None) -> Architecture:
    """The architecture of a model folder, a `config.json`, a hub name, or a YAML of shapes.

    `task`: causal_lm, seq_cls (with a head, for `num_labels` classes where given), base (without), or auto,
    which goes by the architecture that the config names. Bundled shape files are known by name (`gpt3`).

    Raises:
        ConfigError: there is no such model, or it has no such task.
    """
    bundled = {file.stem: file for file in _BUNDLED.glob("*.yaml")}
    path = bundled.get(source, Path(source).expanduser())
    if path.suffix in {".yaml", ".yml"}:
        return _from_yaml(path)
    config = read_config(source, bundled)
    task = _task_of(config) if task == "auto" else task
    model = meta_model(config, task, num_labels)
    from modicum.models.loading import head_names

    heads = head_names(model) if task == "seq_cls" else []
    head_parameters = sum(p.numel() for head in heads for p in model.get_submodule(head).parameters())
    linear = {name: shape for name, module in model.named_modules() if (shape := linear_shape(module))}
    return Architecture(
        name=model.config.name_or_path or f"{model.config.model_type} ({Path(source).name})",
        linear=linear,
        head=frozenset(heads),
        parameters=sum(p.numel() for p in model.parameters()),
        head_parameters=head_parameters,
        model=model,
    )


def read_config(source: str, also: Iterable[str] = ()) -> Any:
    """The Hugging Face config of a model folder, a config file, or a hub name.

    Raises:
        ConfigError: there is none, or Transformers does not know its model type.
    """
    from transformers import AutoConfig

    from modicum.models.loading import resolve

    path = Path(source).expanduser()
    found = str(path) if path.is_file() else resolve(source)
    try:
        config = AutoConfig.from_pretrained(found)
    except (OSError, ValueError, KeyError) as error:
        known = f"; bundled shapes: {', '.join(also)}" if also else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"no model config at {source!r}: {reason}{known}") from error
    config.name_or_path = "" if path.exists() else source
    return config


def meta_model(config: Any, task: str = "auto", num_labels: int | None = None) -> Any:
    """The model of a config on the meta device: names and shapes, no memory. `task` as in `read_architecture`.

    Raises:
        ConfigError: Transformers has no model of this type for the task.
    """
    import torch
    import transformers

    factories = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "seq_cls": transformers.AutoModelForSequenceClassification,
        "base": transformers.AutoModel,
    }
    task = _task_of(config) if task == "auto" else task
    if task not in factories:
        raise ConfigError(
            f"no task {task!r}{did_you_mean(task, factories)}; known: auto, {', '.join(factories)}"
        )
    if task == "seq_cls" and num_labels is not None:
        config.num_labels = num_labels
    try:
        with torch.device("meta"):
            return factories[task].from_config(config)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{config.model_type!r} has no model for {task}: {str(error).splitlines()[0]}"
        ) from error


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer (also GPT-2's transposed Conv1D and adapted layers), else None."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        into, out = module.weight.shape
        return out, into
    return None


def linear_shapes(
    model: nn.Module, target_modules: Targets = "all-linear", exclude: Targets | None = None, **options: Any
) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers that PEFT would adapt, by name, in the order of the model.

    `target_modules` and `exclude` as PEFT's `target_modules` and `exclude_modules`: name endings, a regular
    expression, or 'all-linear' (all but the head). `options`: `layers_to_transform`, `layers_pattern`,
    `modules_to_save`.

    Raises:
        TargetError: a target matches no linear layer.
    """
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    linear = {name: shape for name, module in model.named_modules() if (shape := linear_shape(module))}
    config = _matching(target_modules, exclude, **options)
    before = config.target_modules
    config = cast("Any", _maybe_include_all_linear_layers(config, model))
    return _matched(linear, config, before)


def _select(
    linear: Mapping[str, tuple[int, int]],
    target_modules: Targets,
    head: Iterable[str],
    exclude: Targets | None = None,
    **options: Any,
) -> dict[str, tuple[int, int]]:
    config = _matching(target_modules, exclude, **options)
    before = config.target_modules
    if before == "all-linear":
        config.target_modules = set(linear) - set(head)
    return _matched(linear, config, before)


def _matching(target_modules: Targets, exclude: Targets | None, **options: Any) -> Any:
    """A PEFT config that carries nothing but which modules it matches."""
    from peft import LoraConfig

    def plain(value: Targets | None) -> Any:
        return value if value is None or isinstance(value, str) else list(value)

    return LoraConfig(target_modules=plain(target_modules), exclude_modules=plain(exclude), **options)


def _matched(
    linear: Mapping[str, tuple[int, int]], config: Any, wanted: str | set[str] | None
) -> dict[str, tuple[int, int]]:
    from peft.tuners.tuners_utils import check_target_module_exists

    found = {name: shape for name, shape in linear.items() if check_target_module_exists(config, name)}
    targets = [] if wanted is None or isinstance(wanted, str) else sorted(wanted)
    missing = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in linear)]
    if missing or not found:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        hints = "; ".join(f"{t!r}{did_you_mean(t, ends)}" for t in missing) or repr(wanted)
        raise TargetError(f"no linear layer matches {hints}; linear layers here: {listing(ends, 12)}")
    return found


def parse_targets(words: Iterable[str]) -> str | list[str]:
    """PEFT's `target_modules` from words of a command line: 'all-linear', one regular expression, or endings."""
    names = [part.strip() for word in words for part in ([word] if _REGEX.search(word) else word.split(","))]
    if len(names) == 1 and (names[0] == "all-linear" or _REGEX.search(names[0])):
        return names[0]
    return names


def _task_of(config: Any) -> str:
    named = (getattr(config, "architectures", None) or [""])[0]
    if named.endswith("ForSequenceClassification"):
        return "seq_cls"
    if named.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    return "base"


def _from_yaml(path: Path) -> Architecture:
    import yaml

    try:
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        layers = {
            f"layers.{index}.{name}": (int(shape[0]), int(shape[1]))
            for index in range(int(spec["layers"]))
            for name, shape in spec["per_layer"].items()
        }
        outside = {
            name: (int(shape[0]), int(shape[1])) for name, shape in (spec.get("outside") or {}).items()
        }
        others = int(spec.get("other_parameters", 0))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(
            f"{path} is no description of shapes ({type(error).__name__}: {error}); it needs `layers: N` and "
            "`per_layer: {name: [out, in]}`, and may have `name`, `outside` and `other_parameters`"
        ) from error
    linear = layers | outside
    parameters = sum(out * into for out, into in linear.values()) + others
    return Architecture(str(spec.get("name", path.stem)), linear, frozenset(outside), parameters)
