"""What `modicum bench` compares: models by name, with or without an adapter, and which of them is the baseline."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from modicum.errors import ConfigError, did_you_mean
from modicum.evaluate.latency import measure
from modicum.models.architecture import meta_model, read_config
from modicum.models.loading import load_base, quiet_transformers, resolve
from modicum.store.convert import load_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from modicum.evaluate.latency import Latency

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Arm:
    """One model to be timed."""

    #: as it was named
    name: str
    #: a folder, a hub name, 'embedded', or a configuration to make random weights for
    model: str
    #: a record or a PEFT folder that stays unmerged
    adapter: str | None = None
    random: bool = False


def bench(
    models: Sequence[str],
    *,
    baseline: str | None = None,
    adapters: Sequence[str] = (),
    random: bool = False,
    dtype: str = "bfloat16",
    device: str = "auto",
    advance: Callable[[], None] | None = None,
    **options: Any,
) -> Latency:
    """The times of `models` and of the first of them with each of `adapters`; `options` as in `measure`.

    Without `baseline`, what a model was made from is the baseline: the base model that a folder or adapter names. It
    has the shape and the speed of the merged dense model. With `random`, a configuration without weights gets random
    ones.

    Raises:
        ConfigError: a model that is not there or has no weights, no baseline that could be derived, or what
            `measure` refuses.
    """
    place = device_for(dtype, device)
    arms, chosen, reason = choose(models, adapters, baseline, random=random)
    loaded = {arm.name: load(arm, dtype, place) for arm in arms}
    found = measure(loaded, baseline=chosen, advance=advance, **options)
    return found if reason is None else replace(found, sentences=(*found.sentences, reason))


def device_for(dtype: str, device: str) -> str:
    """The device that `device` stands for here, for models in `dtype`.

    Raises:
        ConfigError: no such dtype, or no such device here.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"no dtype {dtype!r}{did_you_mean(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        there = ", ".join(DEVICES if torch.cuda.is_available() else DEVICES[:2])
        raise ConfigError(f"no device {device!r} here; there are {there}")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def choose(
    models: Sequence[str], adapters: Sequence[str], baseline: str | None, *, random: bool
) -> tuple[list[Arm], str, str | None]:
    """All arms, the name of the baseline among them, and a sentence that says why it was chosen if nobody named it.

    Raises:
        ConfigError: see `bench`.
    """
    arms = {name: arm_of(name, random) for name in models}
    arms |= {name: Arm(name, models[0], str(adapter_folder(Path(name)) or name)) for name in adapters}
    if baseline is not None:
        if baseline not in arms:
            arms = {baseline: arm_of(baseline, random), **arms}
        return list(arms.values()), baseline, None
    sources = {name: source for name, arm in arms.items() if (source := made_from(arm)) is not None}
    found = {_place(source): source for source in sources.values()}
    if len(found) != 1:
        why = f"the models were made from different ones ({', '.join(found.values())})" if found else (
            "nothing says what the models were made from"
        )  # fmt: skip
        raise ConfigError(
            f"a time means little alone, and no baseline can be derived: {why}. Name the model to compare with, e.g. "
            f"`--baseline {models[0] if len(arms) > 1 else 'DENSE'}`"
        )
    ((place, source),) = found.items()
    known = next((name for name, arm in arms.items() if not arm.adapter and _place(arm.model) == place), None)
    chosen = source if known is None else known
    if known is None:
        arms = {chosen: arm_of(chosen, random), **arms}
    reason = (
        f"{chosen} is the baseline because {', '.join(sources)} {'was' if len(sources) == 1 else 'were'} made from it. "
        "Merging an adapter changes neither its shape nor its number type, so it stands for the merged model too."
    )
    return list(arms.values()), chosen, reason


def load(arm: Arm, dtype: str, device: str) -> Any:
    """The model of `arm` on `device`, in evaluation mode.

    Raises:
        ConfigError: it cannot be loaded.
    """
    with quiet_transformers():
        if arm.adapter is not None:
            model = load_for(arm.model, arm.adapter, dtype=cast("Any", dtype))[0]
        elif arm.random:
            model = _random(arm.model, dtype)
        else:
            config = read_config(arm.model)
            head = not type(meta_model(config)).__name__.endswith(("ForCausalLM", "LMHeadModel"))
            model = load_base(
                arm.model,
                "seq_cls" if head else "causal_lm",
                dtype=cast("Any", dtype),
                num_labels=config.num_labels if head else None,
            )
        # quantized models of some formats refuse even to be moved to where they are
        return (model if model.device.type == device else model.to(device)).eval()


def _random(model: str, dtype: str) -> Any:
    """A model of this configuration with random weights, quantized by rounding where the configuration says so."""
    config = read_config(model)
    if not config.architectures:
        raise ConfigError(
            f'{model} does not say which class it configures; add it, e.g. "architectures": ["LlamaForCausalLM"]'
        )
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        if stored.get("quant_method") != "modicum":
            raise ConfigError(
                f"{model} is quantized by {stored.get('quant_method')!r}: random weights are made for dense models and "
                "our own quantized ones only"
            )
        del config.quantization_config
    number = config.dtype if dtype == "auto" else getattr(torch, dtype)
    # the class that the configuration asks for, whatever its task
    made = type(meta_model(config))._from_config(config, dtype=number)  # noqa: SLF001 - what Auto classes call
    if stored is not None:
        from modicum.quant.huggingface import AffineConfig, quantize_linears

        quantize_linears(made, AffineConfig(**stored))
        made.config.quantization_config = stored
    return made


def arm_of(name: str, random: bool = False) -> Arm:
    """The model, or the adapter and the model that it belongs to, that a name on the command line stands for.

    Raises:
        ConfigError: no model, an adapter that names no base model, a configuration without weights unless `random`.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".json":
            raise ConfigError(
                f"{name} is no model; name an adapter with --adapter, after the model that it belongs to"
            )
        return _without_weights(name, random)
    adapter = adapter_folder(path)
    if adapter is not None:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if not base:
            raise ConfigError(
                f"the adapter {name} does not say which model it belongs to: `modicum bench MODEL --adapter {name}`"
            )
        return Arm(name, base, str(adapter))
    folder = Path(resolve(name))
    if folder.is_dir() and not any((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        return _without_weights(name, random)
    return Arm(name, name)


def _without_weights(name: str, random: bool) -> Arm:
    if not random:
        raise ConfigError(
            f"{name} is a configuration without weights; --random gives it random ones of its shape"
        )
    return Arm(name, name, random=True)


def adapter_folder(path: Path) -> Path | None:
    """The folder of an adapter at `path`, or below it where a run has left it; None where there is none."""
    if (path / "config.json").is_file():
        return None
    folders = (path, path / "adapter")
    return next((folder for folder in folders if (folder / "adapter_config.json").is_file()), None)


def made_from(arm: Arm) -> str | None:
    """The model that `arm` was made from, as far as its files say."""
    if arm.adapter is not None:
        return arm.model
    path = Path(arm.model).expanduser()
    config = path if path.is_file() else path / "config.json"
    reports = (config.parent / f"{what}_report.json" for what in ("quantization", "sparsity"))
    for file, keys in ((config, ("modicum", "base_model")), *((report, ("model",)) for report in reports)):
        value: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            return value
    return None


def _place(model: str) -> str:
    """What tells two names of one model apart from names of two models."""
    found = resolve(model)
    return str(Path(found).resolve()) if Path(found).exists() else found
