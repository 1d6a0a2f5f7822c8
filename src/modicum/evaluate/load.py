"""A model, its tokenizer and rows, from names: what the `eval` verb needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from modicum.data.files import load_rows
from modicum.data.labelled import count_labels
from modicum.data.options import TASKS, DataOptions, Task
from modicum.data.prepare import encode
from modicum.errors import ConfigError, did_you_mean
from modicum.evaluate.mixing import adapted, check_heads
from modicum.models.loading import load_base, load_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modicum.data.encoded import Encoded


@dataclass
class Loaded:
    """A model ready to evaluate, its tokenizer, the rows and the task."""

    model: Any
    tokenizer: Any
    rows: Encoded
    task: Task


def load_for_evaluation(
    model: str,
    data: str,
    *,
    adapter: str | None = None,
    task: str = "causal_lm",
    overrides: Sequence[str] = (),
    num_labels: int | None = None,
    dtype: str = "auto",
) -> Loaded:
    """Everything `evaluate` needs: `data` is read as the test split, `overrides` change options of the data section.

    A folder of a finished run serves as `adapter`; the number of classes then comes from its head.

    Raises:
        ConfigError, DataError: what is wrong, and what there is instead; a head that nobody has trained.
    """
    if task not in TASKS:
        raise ConfigError(f"no task {task!r}{did_you_mean(task, TASKS)}; known: {', '.join(TASKS)}")
    kind = cast("Task", task)
    options = data_options(overrides)
    tokenizer = load_tokenizer(model)
    rows = load_rows(data, "test", options.hub_config).sample(options.max_eval_rows, options.seed)
    if kind == "seq_cls" and num_labels is None:
        num_labels = (_classes_of(Path(adapter)) if adapter else None) or count_labels(rows, options)
    encoded = encode(rows, options, tokenizer, kind, num_labels)
    with quiet_transformers():
        base = load_base(model, kind, dtype=cast("Any", dtype), num_labels=num_labels, tokenizer=tokenizer)
        check_heads(base, model, [adapter] if adapter else [])
        carrying = adapted(base, adapter) if adapter else base
    return Loaded(placed(carrying), tokenizer, encoded, kind)


def data_options(overrides: Sequence[str]) -> DataOptions:
    """The data section that `name=value` pairs stand for.

    Raises:
        ConfigError: unknown names or impossible values, all at once.
    """
    import yaml

    values = {}
    for pair in overrides:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"cannot read {pair!r}; write name=value, e.g. max_length=128")
        values[name.strip().removeprefix("data.")] = yaml.safe_load(text)
    try:
        return DataOptions.model_validate(values)
    except ValidationError as error:
        known = list(DataOptions.model_fields)
        faults = []
        for fault in error.errors():
            name = str(fault["loc"][0])
            hint = did_you_mean(name, known) if fault["type"] == "extra_forbidden" else ""
            faults.append(f"{name}{hint}: {fault['msg']}")
        raise ConfigError("; ".join(faults)) from error


def _classes_of(adapter: Path) -> int | None:
    """The number of rows of the head saved with an adapter, None when it has no head."""
    from safetensors import safe_open

    from modicum.models.loading import HEAD_NAMES

    for folder in (adapter, adapter / "adapter"):
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            continue
        with safe_open(file, "pt") as stored:
            shapes = {
                key: stored.get_slice(key).get_shape()
                for key in stored.keys()  # noqa: SIM118, not a dictionary
                if any(part in HEAD_NAMES for part in key.split(".")) and key.endswith("weight")
            }
        # heads of several layers end in the output layer
        last = [key for key in shapes if "dense" not in key]
        return shapes[last[-1]][0] if last else None
    return None


def placed(model: Any) -> Any:
    """`model` itself, moved in place to the GPU if there is one."""
    import torch

    return model.to("cuda") if torch.cuda.is_available() else model
