"""What adapters cost in a forward step, against the same model with none in the step; ratios within one run.

A random Llama of 110M parameters (hidden 768, 12 layers), adapters of rank 16 on all linear layers. Decoding is one
token of each sequence, prefill 128 tokens of each of 4, which is what the engine takes at a time, and with --prefill
128 tokens of each of 64 at once. Steps of all variants are taken in turn, in an order that is drawn for each turn,
as a place in it is worth a percent; a ratio is that of the tenth percentiles, and of the medians.

    python benchmarks/serving/layers.py [--threads 1] [--repeats 60] [--small] [--only float32]
    python benchmarks/serving/layers.py --prefill [--repeats 5]      8,192 tokens in one step, about six minutes
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.serve.engine import native
from modicum.serve.engine.slots import Slots
from modicum.store.record import Record, build

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

RESULTS = Path(__file__).parent / "results"
RANK = 16
MOST = 64
#: name -> (sequences, tokens of each)
STEPS = {
    "decode, batch 1": (1, 1),
    "decode, batch 8": (8, 1),
    "decode, batch 64": (64, 1),
    "prefill, 512 tokens": (4, 128),
}
PREFILL = {"prefill, 64 × 128 tokens": (64, 128)}
LORA, PEFT = "LoRA, distinct", "PEFT LoRA, distinct"
#: variants that take several times as long
SLOW = (PEFT,)
KINDS = (
    "no adapters",
    "LoRA-XS, distinct",
    "LoRA-XS, identical",
    "LoRA-XS, every other",
    LORA,
    PEFT,
)
#: what a step of seconds is measured with
QUICK = KINDS[:3]


def llama(dtype: torch.dtype, small: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096 if small else 32000,
        hidden_size=256 if small else 768,
        intermediate_size=704 if small else 2048,
        num_hidden_layers=2 if small else 12,
        num_attention_heads=4 if small else 12,
        num_key_value_heads=4 if small else 12,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of all linear layers but the head."""
    found = ((n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head")
    return {name: (module.out_features, module.in_features) for name, module in found}


def lora_xs(shapes: dict[str, tuple[int, int]], seed: int) -> Record:
    rng = np.random.default_rng(seed)
    cores = {f"{name}.R": rng.standard_normal((RANK, RANK), np.float32) * 0.02 for name in shapes}
    return build("lora_xs", cores, config={"r": RANK, "target_modules": sorted(shapes)})


def lora(shapes: dict[str, tuple[int, int]], seed: int) -> Record:
    rng = np.random.default_rng(seed)
    factors = {}
    for name, (out, inner) in shapes.items():
        factors[f"{name}.lora_A.weight"] = rng.standard_normal((RANK, inner), np.float32) * 0.02
        factors[f"{name}.lora_B.weight"] = rng.standard_normal((out, RANK), np.float32) * 0.02
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": sorted(shapes)}
    return build("peft:LORA", factors, config=config)


def variants(
    dtype: torch.dtype, small: bool, wanted: Collection[str]
) -> tuple[LlamaForCausalLM, dict[str, Callable]]:
    """The served model, and steps `call(ids)` of each of the `wanted` kinds."""
    model = llama(dtype, small)
    shapes = linears(model)

    def read(name: str) -> Record:
        kind, _, number = name.partition("@")
        return {"xs": lora_xs, "lora": lora}[kind](shapes, int(number))

    slots = Slots(model, read, slots=2 * MOST, max_rank=RANK)
    # before the layers of the served one are replaced
    peft = of_peft(copy.deepcopy(model), sorted(shapes)) if PEFT in wanted else None
    cores = [slots.acquire(f"xs@{i}") for i in range(1, MOST + 1)]

    def served(leases: list) -> Callable:
        def call(ids: torch.Tensor) -> None:
            rows, length = ids.shape
            chosen = leases[:rows]
            slots.step(chosen, [length] * len(chosen))
            model(ids, use_cache=False, logits_to_keep=1)
            slots.end_step()

        return call

    half = [lease if place % 2 else None for place, lease in enumerate(cores)]
    calls = {
        "no adapters": served([None] * MOST),
        "LoRA-XS, distinct": served(cores),
        "LoRA-XS, identical": served([cores[0]] * MOST),
        "LoRA-XS, every other": served(half),
    }
    if LORA in wanted:
        calls[LORA] = served([slots.acquire(f"lora@{i}") for i in range(1, MOST + 1)])
    if peft is not None:
        calls[PEFT] = peft
    return model, {name: calls[name] for name in wanted}


def of_peft(model: LlamaForCausalLM, targets: list[str]) -> Callable:
    """A step in PEFT, with an adapter of its own for every row."""
    wrapped = get_peft_model(model, LoraConfig(r=RANK, target_modules=targets), adapter_name="a0")
    for number in range(1, MOST):
        wrapped.add_adapter(f"a{number}", LoraConfig(r=RANK, target_modules=targets))
    wrapped.to(model.dtype).eval()

    def call(ids: torch.Tensor) -> None:
        names = [f"a{i}" for i in range(len(ids))]
        wrapped(input_ids=ids, use_cache=False, logits_to_keep=1, adapter_names=names)

    return call


@torch.inference_mode()
def measured(calls: dict[str, Callable], ids: torch.Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step, all in turn, so that a slow moment hits all alike; slow ones less often.

    No variant always runs behind the same other one, whose work it would find in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for turn in range(-2, repeats):
        for name, call in order.sample(sorted(calls.items()), len(calls)):
            if name in SLOW and turn % 8:
                continue
            began = time.perf_counter()
            call(ids)
            if turn >= 0:
                times[name].append(time.perf_counter() - began)
    return times


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    base = times["no adapters"]
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(found),
            "tenth": tenth(base) / tenth(found),
            "median": statistics.median(base) / statistics.median(found),
        }
        for name, found in times.items()
    }


def tenth(times: list[float]) -> float:
    return sorted(times)[len(times) // 10]


def table(found: dict[str, Any], note: str) -> dict[str, Any]:
    names = list(next(iter(next(iter(found.values())).values())))
    rows = []
    for dtype, steps in found.items():
        for step, values in steps.items():
            cells = [f"{values[name]['tenth']:.3f} / {values[name]['median']:.3f}" for name in names[1:]]
            rows.append([dtype, step, f"{values[names[0]]['milliseconds']:.1f}", *cells])
    columns = ["type", "step", "no adapters, ms", *names[1:]]
    what = "Speed against the same model without adapters in the step (tenth percentile / median). Random Llama of "
    return {
        "columns": columns,
        "rows": rows,
        "note": f"{what}110M parameters, rank {RANK} on all linear layers. {note}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=0, help="60, or 5 with --prefill")
    parser.add_argument(
        "--prefill", action="store_true", help="64 prompts of 128 tokens in one step, that alone"
    )
    parser.add_argument("--small", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--only", choices=("float32", "bfloat16"), help="nothing written")
    parser.add_argument("--without-peft", action="store_true", help="nothing written")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (5 if arguments.prefill else 60)
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {}
    for name in ("float32", "bfloat16"):
        if arguments.only in (None, name):
            found[name] = measured_as(name, arguments)
            gc.collect()
    if arguments.small or arguments.only or arguments.without_peft:
        return
    options = f"{'--prefill ' if arguments.prefill else ''}--threads {arguments.threads}"
    about = {
        "what": "what adapters cost in a forward step",
        "command": f"python benchmarks/serving/layers.py {options} --repeats {arguments.repeats}",
        "versions": {name: version(name) for name in ("modicum", "torch", "transformers", "peft")},
        "threads": arguments.threads,
        "native": native.available(),
    }
    note = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}; all variants in turn, in random order."
    values = {**about, **found, "table": table(found, note)}
    RESULTS.mkdir(exist_ok=True)
    result = RESULTS / f"serving_{'prefill' if arguments.prefill else 'layers'}.json"
    result.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def measured_as(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The steps in one number type."""
    wanted = QUICK if arguments.prefill else KINDS
    if arguments.without_peft:
        wanted = tuple(kind for kind in wanted if kind != PEFT)
    model, calls = variants(getattr(torch, name), arguments.small, wanted)
    found = {}
    for step, (rows, length) in (PREFILL if arguments.prefill else STEPS).items():
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)
        # of fewer tokens more steps, which are noisier
        repeats = (
            arguments.repeats if arguments.prefill else max(2, arguments.repeats * 64 // max(ids.numel(), 32))
        )
        found[step] = summary(measured(calls, ids, repeats))
        print(name, step, json.dumps(found[step], indent=1), flush=True)
    return found


if __name__ == "__main__":
    main()
