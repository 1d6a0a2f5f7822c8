"""The options that every method shares, as a PEFT configuration.

An option is declared here or in a method's own config, nowhere else: CLI help, JSON and the docs tables
are generated from these dataclass fields and their `help` texts.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from peft import PeftConfig

from modicum.errors import ConfigError, did_you_mean, not_among

if TYPE_CHECKING:
    from modicum.adapters.basis import BasisSpec

#: what PEFT's own model card cannot know
_LOADING = """## Loading

This adapter needs modicum: `pip install modicum`, and `import modicum` before
PEFT loads it.
"""


def option(default: Any, help_text: str, **constraints: Any) -> Any:
    """A dataclass field with `default`, its help text and its constraints (`choices`, `minimum`, `maximum`)."""
    metadata = {"help": help_text, **constraints}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class AdapterConfig(PeftConfig):
    """The options that all methods share; names and meanings are PEFT's."""

    #: name of the method, set by the registry from the file name
    method: ClassVar[str] = ""

    r: int = option(16, "Rank of the adapter.", minimum=1)
    alpha: float = option(16.0, "Numerator of the scaling: scaling = alpha / r.")
    dropout: float = option(
        0.0, "Dropout probability on the input of the adapter while training.", minimum=0.0, maximum=1.0
    )
    target_modules: str | list[str] | set[str] | None = option(
        "all-linear",
        "Layers to adapt: a list of name endings, a regular expression, or 'all-linear' (all but the head).",
    )
    exclude_modules: str | list[str] | None = option(
        None, "Layers to leave alone: a list of name endings or a regular expression."
    )
    layers_to_transform: int | list[int] | None = option(
        None, "Indices of the transformer layers to adapt; all when unset."
    )
    layers_pattern: str | list[str] | None = option(
        None, "Name of the module list that `layers_to_transform` counts in, e.g. 'layers' or 'h'."
    )
    rank_pattern: dict[str, int] = option(
        {}, "Ranks that differ from `r`, by layer name or regular expression."
    )
    alpha_pattern: dict[str, float] = option(
        {}, "Alphas that differ from `alpha`, by layer name or regular expression."
    )
    modules_to_save: list[str] | None = option(
        None, "Modules besides the adapted layers to train and save in full, e.g. a classification head."
    )
    init_weights: bool = option(
        True,
        "Start from the method's own initial values (no update); False draws large random ones, for tests.",
    )
    seed: int = option(0, "Seed of the adapter's initial values.")
    base_fingerprint: str | None = option(
        None, "Fingerprint of the adapted base weights; set on creation, checked on loading."
    )

    basis_fingerprint: str | None = option(
        None, "Fingerprint of the frozen directions; set on creation, checked on loading."
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """A new config; unknown option names are refused, which PEFT would only warn about."""
        del args
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [name for name in kwargs if name not in known]
        if unknown:
            hints = "; ".join(f"{name!r}{did_you_mean(name, known)}" for name in unknown)
            raise ConfigError(f"{cls.__name__} has no option {hints}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every option; all faults are reported at once."""
        super().__post_init__()
        from modicum.adapters.registry import peft_type

        self.peft_type = cast("str", peft_type(type(self)))
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        faults = [*self._range_faults(), *self.faults()]
        if faults:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(faults))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, and tell the readers of a model card beside it what loading needs."""
        super().save_pretrained(save_directory, **kwargs)
        # PEFT writes the card into the folder itself, named adapters into folders below it
        for card in (Path(save_directory) / "README.md", Path(save_directory).parent / "README.md"):
            text = card.read_text(encoding="utf-8") if card.is_file() else ""
            if "library_name: peft" in text and _LOADING not in text:
                card.write_text(f"{text.rstrip()}\n\n{_LOADING}", encoding="utf-8")

    def basis_spec(self) -> BasisSpec | None:
        """The kind of frozen directions this method shares between adapters; None when it has none."""
        return None

    def faults(self) -> list[str]:
        """What is wrong between the options of this method; none by default."""
        return []

    def rank_for(self, name: str) -> int:
        """The rank of the layer `name`, after `rank_pattern`."""
        return int(_lookup(self.rank_pattern, name, self.r))

    def alpha_for(self, name: str) -> float:
        """The alpha of the layer `name`, after `alpha_pattern`."""
        return float(_lookup(self.alpha_pattern, name, self.alpha))

    def _range_faults(self) -> list[str]:
        faults = []
        for spec in dataclasses.fields(self):
            value, limits = getattr(self, spec.name), spec.metadata
            if "choices" in limits:
                faults += not_among(spec.name, value, limits["choices"])
            if "minimum" in limits and value < limits["minimum"]:
                faults.append(f"{spec.name} = {value!r}, must be at least {limits['minimum']}")
            if "maximum" in limits and value > limits["maximum"]:
                faults.append(f"{spec.name} = {value!r}, must be at most {limits['maximum']}")
        faults += [
            f"rank_pattern[{k!r}] = {v!r}, must be at least 1" for k, v in self.rank_pattern.items() if v < 1
        ]
        return faults


def _lookup(pattern: dict[str, Any], name: str, default: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return pattern.get(get_pattern_key(list(pattern), name), default)
