"""A search space as it is written down: which layers share a choice, and what the choices are.

```yaml
name: LoNAS
groups:
  - rank: [heads.outputs]            # layers by role, or by the endings of their names: [q_proj, k_proj, v_proj]
    choices: [1.0, 0.875]            # shares of the largest rank; whole numbers are ranks: [32, 28]
  - width: mlp                       # or heads, or all layers whose outputs are cut: [gate_proj, up_proj]
    choices: [1.0, 0.875, 0.75]      # shares of the full width; whole numbers are channels (or query heads)
```

The roles are `heads.outputs` (queries, keys, values), `heads.inputs` (attention's output projection), `mlp.outputs`
(gate and up) and `mlp.inputs` (down), so that one file serves every family.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, model_validator

from modicum.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

_BUNDLED = Path(__file__).parent / "spaces"


class GroupSpec(BaseModel):
    """Layers that share one choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: list[str] | None = Field(None, description="Layers whose adapters share a rank.")
    width: str | list[str] | None = Field(
        None, description="'mlp', 'heads', or the layers whose outputs are cut together."
    )
    choices: list[StrictInt | StrictFloat] = Field(
        min_length=1, description="Ranks, channels or query heads; numbers with a point are shares."
    )
    multiple_of: int = Field(
        1,
        ge=1,
        description="Shares are taken to multiples of this many units; processors multiply fastest at multiples of 128 "
        "channels.",
    )
    share: Literal["block", "model"] = Field(
        "block", description="One choice in every transformer layer, or one for the whole model."
    )
    blocks: list[int] | None = Field(None, description="Indices of the transformer layers; all when unset.")

    @model_validator(mode="after")
    def _sensible(self) -> GroupSpec:
        faults = [
            f"{name} is empty" for name in ("rank", "width", "blocks") if getattr(self, name) in ([], "")
        ]
        if (self.rank is None) == (self.width is None):
            faults.append("a group is either a rank or a width: give one of the two")
        shares = [choice for choice in self.choices if isinstance(choice, float)]
        for share in shares:
            if not 0 < share <= 1:
                count = f"; as a count write {share:.0f}" if share > 1 and share.is_integer() else ""
                faults.append(f"{share} is no share, which is above 0 and at most 1{count}")
        if shares and any(choice == 1 for choice in self.choices if isinstance(choice, int)):
            faults.append("1 is a count of one, and other choices are shares: write 1.0 for all of it")
        if faults:
            raise ValueError("; ".join(faults))
        return self


class SpaceSpec(BaseModel):
    """A search space, not yet fitted to a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "unnamed"
    source: str | None = Field(None, description="Where the space was published.")
    groups: list[GroupSpec] = Field(min_length=1)


def bundled_spaces() -> dict[str, Path]:
    """The files of the search spaces inside the package, by name."""
    return {file.stem: file for file in sorted(_BUNDLED.glob("*.yaml"))}


def read_space(source: str | Path | Mapping[str, Any] | SpaceSpec) -> SpaceSpec:
    """The search space of a bundled name, a YAML file, or the values of one.

    Raises:
        ConfigError: there is no such space; or everything that is wrong with it.
    """
    import yaml

    if isinstance(source, SpaceSpec):
        return source
    name, values = "search space", source
    if isinstance(source, str | Path):
        known = bundled_spaces()
        file = known.get(str(source), Path(source).expanduser())
        name = str(source)
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            hint = did_you_mean(str(source), known)
            raise ConfigError(
                f"no search space {name!r}{hint}; give a YAML file or one of {', '.join(known)} ({error})"
            ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: a search space is a mapping with `groups`")
    try:
        return SpaceSpec.model_validate(values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {_worded(fault)}" for fault in error.errors()]
        raise ConfigError(f"{name}: " + "; ".join(faults)) from error


def _worded(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        known = [*SpaceSpec.model_fields, *GroupSpec.model_fields]
        return f"no option {fault['loc'][-1]!r}{did_you_mean(str(fault['loc'][-1]), known)}"
    return fault["msg"].removeprefix("Value error, ")
