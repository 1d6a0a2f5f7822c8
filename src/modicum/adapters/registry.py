"""Which methods exist: the files of `modicum/methods`, and the entry points of third parties.

Nothing is listed by hand. A method's name is its file name; a third-party package announces a module in
the entry-point group `modicum.methods` under the method's name. `register` makes all of them known to PEFT.
"""

from __future__ import annotations

import enum
import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from modicum.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from modicum.adapters.config import AdapterConfig
    from modicum.adapters.contract import Adapter

ENTRY_POINT_GROUP = "modicum.methods"


@functools.cache
def _modules() -> dict[str, str]:
    import modicum.methods

    found = {
        info.name: f"modicum.methods.{info.name}" for info in pkgutil.iter_modules(modicum.methods.__path__)
    }
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in found:
            raise ConfigError(
                f"the method {point.name!r} of {point.value!r} is already taken by {found[point.name]!r}"
            )
        found[point.name] = point.value
    return dict(sorted(found.items()))


def names() -> list[str]:
    """The names of all methods, sorted; imports none of them."""
    return list(_modules())


@functools.cache
def get(name: str) -> type[Adapter]:
    """The adapter class of the method `name`.

    Raises:
        ConfigError: no such method, or its file does not define exactly one adapter class.
    """
    from modicum.adapters.contract import Adapter

    if name not in _modules():
        raise ConfigError(f"no method {name!r}{did_you_mean(name, names())}; known: {', '.join(names())}")
    module = importlib.import_module(_modules()[name])
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Adapter) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ConfigError(
            f"{module.__name__} must define exactly one Adapter class, it defines {len(classes)}"
        )
    classes[0].config_class.method = name
    return classes[0]


def config_class(name: str) -> type[AdapterConfig]:
    """The config class of the method `name`."""
    return get(name).config_class


def method_of(config: type[AdapterConfig] | AdapterConfig) -> str:
    """The method name that a config (class) belongs to."""
    wanted = config if isinstance(config, type) else type(config)
    for name in names():
        if get(name).config_class is wanted:
            return name
    raise ConfigError(f"{wanted.__name__} belongs to no registered method; known: {', '.join(names())}")


@functools.cache
def _peft_types() -> type[enum.Enum]:
    # PEFT reads `.value` in places, so plain strings do not do; values keep clear of PEFT's own names
    members = {f"MODICUM_{name.upper()}": f"MODICUM_{name.upper()}" for name in names()}
    return enum.Enum("ModicumPeftType", members, type=str, module=__name__)


def peft_type(config: type[AdapterConfig]) -> enum.Enum:
    """The PEFT type of a method's config, an own `str` enum member such as `MODICUM_LORA_XS`."""
    return _peft_types()[f"MODICUM_{method_of(config).upper()}"]


def prefix(name: str) -> str:
    """What the state-dict keys of the method start with inside a layer, e.g. `modicum_lora_xs_`."""
    return f"modicum_{name}_"


def register() -> None:
    """Make every method known to PEFT; calling it again changes nothing."""
    from peft import mapping

    from modicum.adapters.host import host_class

    for name in names():
        kind = peft_type(config_class(name))
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config_class(name)  # pyright: ignore[reportArgumentType]
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] = host_class(name)  # pyright: ignore[reportArgumentType]
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] = prefix(name)  # pyright: ignore[reportArgumentType]


def __getattr__(name: str) -> type[enum.Enum]:
    """The enum of PEFT types, which a pickled config asks for."""
    if name == "ModicumPeftType":
        return _peft_types()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
