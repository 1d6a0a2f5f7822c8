"""NF4 and int8 as bitsandbytes stores them: the whole model is loaded, quantized by it, measured and saved.

Needs the extra `modicum[quant]`.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

from modicum._version import __version__
from modicum.compress.layerwise import perplexity
from modicum.compress.quantize_plan import Plan
from modicum.compress.quantize_report import LayerReport, QuantizationReport, QuantizeOptions, bits_of
from modicum.compress.writing import REPORT
from modicum.errors import ConfigError
from modicum.models.loading import quiet_transformers
from modicum.quant.base import format_of, prepare_model, require
from modicum.store.atomic import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from modicum.compress.source import Source
    from modicum.compress.work import Work

#: options that say how our own grid is laid out, which these formats do not have
_OWN = ("bits", "group_size", "block", "zero_point", "clip", "scale_dtype", "offset_dtype")


def faults_of(options: QuantizeOptions) -> list[str]:
    """The options that these formats do not have."""
    usual = QuantizeOptions()
    given = [name for name in _OWN if getattr(options, name) != getattr(usual, name)]
    return [f"{options.algorithm} has a layout of its own, without {', '.join(given)}"] if given else []


def quantize_with_bitsandbytes(
    source: Source, options: QuantizeOptions, work: Work, model: str, faults: list[str], *, dry_run: bool
) -> QuantizationReport:
    """The report of quantizing `source` with bitsandbytes; the model is in the work folder, to be published.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
        ConfigError: `faults`, and whatever else is wrong.
    """
    require(("bitsandbytes",), f"the algorithm {options.algorithm}", "pip install 'modicum[quant]'")
    started = time.monotonic()
    # blocks of one fit every layer
    plan = Plan.of(source, replace(options, algorithm="rtn", group_size=1))
    faults = [*faults, *plan.faults, *([] if dry_run else plan.faults_of_weights(source))]
    if faults:
        raise ConfigError(f"cannot quantize {model}: {'; '.join(faults)}")
    nominal = 4 if options.algorithm == "nf4" else 8
    layers = [
        LayerReport(linear.name, linear.shape, nominal, math.prod(linear.shape) * nominal // 8)
        for linear in plan.linears
    ]
    measured: dict[str, Any] = {"dry_run": True, "notes": [*plan.notes, "codes alone, without scales"]}
    if not dry_run:
        work.begin({"algorithm": options.algorithm}, resume=False)
        layers, measured = _run(source, plan, options, work.model)
    sizes = {key: (t.numel(), t.nbytes) for key in source.files for t in [source.tensor(key)]}
    replaced = {linear.key for linear in plan.linears}
    before = sum(size for _, size in sizes.values())
    report = QuantizationReport(
        model=model,
        output=str(work.output),
        options={
            "algorithm": options.algorithm,
            **({"double_quant": options.double_quant} if options.algorithm == "nf4" else {}),
            "exclude": list(options.exclude),
        },
        bits_per_weight=bits_of(layers),
        quantized_weights=sum(sizes[key][0] for key in replaced),
        kept_weights=sum(count for key, (count, _) in sizes.items() if key not in replaced),
        bytes_before=before,
        bytes_after=before - sum(sizes[k][1] for k in replaced) + sum(layer.bytes for layer in layers),
        layers=layers,
        seconds=round(time.monotonic() - started, 3),
        modicum_version=__version__,
        **plan.texts.reported(),
        **measured,
    )
    if not dry_run:
        folder = work.finished
        for file in source.beside():
            shutil.copyfile(file, folder / file.name)
        write_text(folder / REPORT, json.dumps(asdict(report), indent=2) + "\n")
    return report


def _run(
    source: Source, plan: Plan, options: QuantizeOptions, folder: Path
) -> tuple[list[LayerReport], dict[str, Any]]:
    from transformers import BitsAndBytesConfig

    kind: Any = type(source.model)
    config = BitsAndBytesConfig(
        load_in_4bit=options.algorithm == "nf4",
        load_in_8bit=options.algorithm == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=plan.dense,
    )
    measured: dict[str, Any] = {"notes": plan.notes}
    ids = None if plan.texts.evaluation is None else plan.texts.evaluation.ids
    with quiet_transformers():
        if ids is not None:
            dense = kind.from_pretrained(source.folder, dtype=torch.float32).eval()
            measured["perplexity_before"] = _perplexity(dense, ids)
            measured["evaluation_tokens"] = ids.shape[0] * (ids.shape[1] - 1)
            del dense
        model = kind.from_pretrained(source.folder, quantization_config=config).eval()
        # evaluation may not repack the weights for this processor, which fails on some shapes
        prepare_model(model)
        model.save_pretrained(folder)
    layers = _layers(source, plan, model, folder)
    if ids is not None:
        measured["perplexity_after"] = _perplexity(model, ids)
    return layers, measured


def _layers(source: Source, plan: Plan, model: Any, folder: Path) -> list[LayerReport]:
    sizes: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors gives 0600
        with safe_open(file, framework="pt") as stored:
            sizes |= {key: stored.get_tensor(key).nbytes for key in stored.keys()}  # noqa: SIM118 - no mapping
    layers = []
    for linear in plan.linears:
        module = model.get_submodule(linear.name)
        own = sum(
            n for key, n in sizes.items() if key.startswith(f"{linear.name}.") and not key.endswith(".bias")
        )
        weight, fmt = source.weight(linear).float(), format_of(module)
        assert fmt is not None
        error = torch.linalg.vector_norm(fmt.weight(module).float() - weight) / torch.linalg.vector_norm(
            weight
        )
        layers.append(
            LayerReport(linear.name, linear.shape, 8 * own / weight.numel(), own, weight_error=float(error))
        )
    return layers


@torch.no_grad()
def _perplexity(model: Any, ids: Tensor) -> float | None:
    total = 0.0
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it mentions each cast of each layer
    try:
        for row in ids.split(1):
            logits = model(input_ids=row, use_cache=False).logits
            total += float(F.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="sum"))
    finally:
        logger.setLevel(level)
    return perplexity(total / (ids.shape[0] * (ids.shape[1] - 1)))
