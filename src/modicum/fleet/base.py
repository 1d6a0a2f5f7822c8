"""The base model of a fleet, ready for cohorts: what every adapter of it looks like, and where it starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from modicum.errors import ConfigError, listing
from modicum.fleet.layers import put_cohort_layers
from modicum.models.loading import HEAD_NAMES, load_base, load_tokenizer, quiet_transformers
from modicum.store.files import to_record
from modicum.store.numbers import to_storage
from modicum.train.methods import make_config, option_faults

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from modicum.data.options import Task
    from modicum.fleet.layers import Turn
    from modicum.fleet.spec import FleetSpec
    from modicum.store.record import Record


@dataclass(frozen=True)
class Kind:
    """What adapters of one rank look like: their record without numbers, and where training starts, (P,) float32."""

    rank: int
    record: Record
    start: Tensor
    #: alpha / r; LoRA alone reads it, LoRA-XS has it in its layers
    scaling: float


@dataclass(frozen=True)
class FleetBase:
    """A base model whose layers take cohorts."""

    model: Any
    tokenizer: Any
    turn: Turn
    task: Task
    #: rank -> what adapters of that rank are
    kinds: Mapping[int, Kind]

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.model.parameters()).device

    @property
    def widest(self) -> Kind:
        """The largest rank, whose numbers a stack has room for."""
        return self.kinds[max(self.kinds)]

    def padded(self, rank: int) -> Tensor:
        """Where an adapter of `rank` starts, as a row of a stack; (P,) float32."""
        return self.spread(rank, self.kinds[rank].start)

    def spread(self, rank: int, values: Tensor) -> Tensor:
        """The numbers of an adapter of `rank`, zeros around them where a stack is wider; (P,) float32."""
        if rank == self.widest.rank:
            return values
        wide, own = self.widest.record.layout, self.kinds[rank].record.layout
        row = torch.zeros(wide.size)
        for place, shape in enumerate(own.shapes):
            into = row[wide.offsets[place] : wide.offsets[place + 1]].view(wide.shapes[place])
            part = values[own.offsets[place] : own.offsets[place + 1]].view(shape)
            into[tuple(slice(size) for size in shape)] = part
        return row

    def gathered(self, rank: int, row: Tensor) -> Tensor:
        """The numbers of an adapter of `rank` out of a row of a stack: the inverse of `spread`."""
        if rank == self.widest.rank:
            return row
        wide, own = self.widest.record.layout, self.kinds[rank].record.layout
        parts = []
        for place, shape in enumerate(own.shapes):
            whole = row[wide.offsets[place] : wide.offsets[place + 1]].view(wide.shapes[place])
            parts.append(whole[tuple(slice(size) for size in shape)].reshape(-1))
        return torch.cat(parts)

    def record(self, rank: int, row: Tensor, dtype: str, **about: Any) -> Record:
        """A row of a stack as the record of an adapter of `rank`, rounded to `dtype`.

        Raises:
            ConfigError: a number is too large for `dtype`.
        """
        values: np.ndarray = self.gathered(rank, row).detach().cpu().numpy()
        return replace(self.kinds[rank].record, values=to_storage(values, dtype), dtype=dtype, **about)


def load_fleet_base(spec: FleetSpec) -> FleetBase:
    """The base model of `spec` with cohort layers in the places of those that its method adapts.

    Raises:
        ConfigError: no such model or method; a classifier whose head nobody has trained.
        TargetError: targets that do not fit the model.
    """
    options = spec.model
    tokenizer = load_tokenizer(
        options.name_or_path, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    model = load_base(
        options.name_or_path,
        options.task,
        dtype=options.dtype,
        num_labels=spec.num_labels,
        label_names=spec.data.label_names,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        attn_implementation=options.attn_implementation,
        tokenizer=tokenizer,
    )
    if model.drawn_tensors:
        raise ConfigError(
            f"{options.name_or_path} lacks {listing(model.drawn_tensors, 3)}: users' adapters share one head, which "
            "has to be there: train it on everybody's rows with `modicum tune` (method: full), and name that model"
        )
    if torch.cuda.is_available() and spec.train.device != "cpu":
        model.to("cuda")
    return fleet_base(model, tokenizer, spec)


def fleet_base(model: Any, tokenizer: Any, spec: FleetSpec) -> FleetBase:
    """`model`, changed in place, as the base of the fleet that `spec` describes; see `load_fleet_base`."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and spec.data.max_length > limit:
        raise ConfigError(
            f"data.max_length = {spec.data.max_length} is more than the {limit} positions of "
            f"{spec.model.name_or_path}"
        )
    model.eval()
    kinds, turn = {}, None
    for place, rank in enumerate(spec.all_ranks, 1):
        adapted = _adapted(model, spec, rank)
        kinds[rank] = _kind(adapted, rank)
        if place == len(spec.all_ranks):
            turn = put_cohort_layers(model)
        else:
            model = adapted.unload()
    assert turn is not None
    return FleetBase(model, tokenizer, turn, spec.model.task, kinds)


def _adapted(model: Any, spec: FleetSpec, rank: int) -> Any:
    """A PEFT model with the adapter on it that `modicum tune` would begin with."""
    import peft
    from transformers import set_seed

    from modicum.adapters import registry

    registry.register()
    name, options = spec.method.name, {**spec.method.options, "r": rank}
    faults = option_faults(name, options)
    if faults:
        raise ConfigError("; ".join(faults.values()))
    if spec.model.task != "causal_lm":
        given = options.get("exclude_modules")
        options["exclude_modules"] = [*(given if isinstance(given, list) else []), *HEAD_NAMES]
    config = make_config(name, options, "causal_lm", spec.train.seed)
    if spec.model.task != "causal_lm":
        # by the task's name PEFT would train a head of its own beside each adapter
        config.task_type = None
    # LoRA draws from the global generator
    set_seed(spec.train.seed)
    with quiet_transformers():
        return peft.get_peft_model(model, config)


def _kind(adapted: Any, rank: int) -> Kind:
    record, _ = to_record(adapted, dtype="float32")
    layers = [m for m in adapted.modules() if getattr(m, "scaling", None) and hasattr(m, "lora_A")]
    scalings = {layer.scaling["default"] for layer in layers}
    return Kind(rank, record, torch.from_numpy(record.values.copy()), scalings.pop() if scalings else 1.0)


def stacked(base: FleetBase, ranks: Sequence[int]) -> Tensor:
    """Where adapters of these ranks start, one per row, (N, P) float32 on the base model's device."""
    starts = {rank: base.padded(rank) for rank in set(ranks)}
    values = torch.empty(len(ranks), base.widest.record.layout.size, device=base.device)
    for row, rank in zip(values, ranks, strict=True):
        row.copy_(starts[rank])
    return values
