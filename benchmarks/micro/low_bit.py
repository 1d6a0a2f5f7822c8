"""Generation and training on a 4-bit base against bfloat16 and against bitsandbytes, ratios within one run.

A random Llama of 1.1B parameters (hidden 2048, 22 layers, grouped-query attention), row groups of 128. Decoding is
one row at a time after a prompt of 128 tokens; "merged" carries the offsets of a folded QA-LoRA adapter, more
digits than the packed kernel takes. A training step is forward and backward of all linear layers of four such
layers, 4 x 128 tokens, with an adapter on each. Steps of all variants are taken in turn.

    python benchmarks/micro/low_bit.py [--threads 4] [--repeats 5] [--small] [--only adapters]
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modicum.adapters import registry
from modicum.quant import int4pack
from modicum.quant.affine import AffineLinear, fold
from modicum.quant.huggingface import effective_bits
from modicum.quant.spec import AffineSpec

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path(__file__).parent / "results" / "low_bit.json"
TRAINING = RESULT.with_name("low_bit_training.json")
ADAPTERS = RESULT.with_name("low_bit_adapters.json")
GROUP = 128
PROMPT = 128


def config(layers: int, small: bool, wide: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=512 if small else (4096 if wide else 2048),
        intermediate_size=1408 if small else (11008 if wide else 5632),
        num_hidden_layers=2 if small else layers,
        num_attention_heads=8 if small else 32,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )


def dense_model(layers: int, small: bool, wide: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config(layers, small, wide)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else nn.init.ones_(parameter)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


def low_bit(model: LlamaForCausalLM, *, merged: bool = False, head: bool = False) -> LlamaForCausalLM:
    """`model` with random 4-bit layers in the places of its linear ones; the speed does not depend on the codes."""
    generator = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or (name == "lm_head" and not head):
            continue
        layer = AffineLinear(
            module.in_features,
            module.out_features,
            AffineSpec(4, (1, GROUP)),
            bias=False,
            dtype=torch.bfloat16,
        )
        layer.codes.random_(0, 256, generator=generator)
        layer.scales.fill_(0.005)
        if merged:
            values = torch.randn(layer.scales.shape, generator=generator) * 1e-3
            fold(layer, values, (1, GROUP))
        model.set_submodule(name, layer)
    return model


def stored_bytes(model: nn.Module) -> int:
    """Bytes of everything a model keeps in memory."""
    tensors = {id(t): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def median(times: list[float]) -> float:
    return statistics.median(times)


def taken_in_turn(
    variants: dict[str, Callable[[], None]], repeats: int, warm: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, all variants in turn so that a slow moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + warm):
        for name, call in variants.items():
            began = time.perf_counter()
            call()
            if turn >= warm:
                times[name].append(time.perf_counter() - began)
    return times


@torch.no_grad()
def generation(repeats: int, small: bool) -> dict[str, Any]:
    models = {
        "bf16": dense_model(22, small),
        "4-bit": low_bit(dense_model(22, small)),
        "4-bit merged": low_bit(dense_model(22, small), merged=True),
        "4-bit merged, head too": low_bit(dense_model(22, small), merged=True, head=True),
    }
    gc.collect()
    ids = torch.randint(0, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    state: dict[str, Any] = {}

    def prefill(name: str) -> Callable[[], None]:
        def call() -> None:
            output = models[name](ids, use_cache=True, logits_to_keep=1)
            state[name] = output.past_key_values, output.logits.argmax(-1)

        return call

    def decode(name: str) -> Callable[[], None]:
        def call() -> None:
            cache, token = state[name]
            state[name] = cache, models[name](token, past_key_values=cache, use_cache=True).logits.argmax(-1)

        return call

    first = taken_in_turn({name: prefill(name) for name in models}, repeats)
    then = taken_in_turn({name: decode(name) for name in models}, 6 * repeats)
    # prefill in the layout that decoding has left
    again = taken_in_turn({name: prefill(name) for name in models}, repeats)
    result: dict[str, Any] = {}
    for name, model in models.items():
        linears = [m for m in model.modules() if isinstance(m, AffineLinear)]
        kept = [m for m in (model.lm_head, model.model.embed_tokens) if not isinstance(m, AffineLinear)]
        head = sum(2 * m.weight.numel() for m in kept)
        weights = sum(m.in_features * m.out_features for m in linears)
        result[name] = {
            "decode_tokens_per_second": 1 / median(then[name]),
            "decode_against_bf16": median(then["bf16"]) / median(then[name]),
            "prefill_tokens_per_second": PROMPT / median(again[name]),
            "prefill_against_bf16": median(again["bf16"]) / median(again[name]),
            "prefill_before_decoding_against_bf16": median(first["bf16"]) / median(first[name]),
            "bytes": stored_bytes(model),
            "bits_per_weight_in_memory": 8 * (stored_bytes(model) - head) / weights if weights else 16.0,
            "bits_per_weight_stored": effective_bits(model) if linears else 16.0,
            "decode_seconds": then[name],
            "prefill_seconds": again[name],
        }
    return result


def switch(repeats: int, small: bool) -> list[dict[str, float]]:
    """Seconds of one layer by number of rows: packed kernel, dequantized, dense."""
    out, inner = (1408, 512) if small else (5632, 2048)
    model = nn.Sequential(nn.Linear(inner, out, bias=False, dtype=torch.bfloat16))
    dense = model[0].weight.detach()
    layer = low_bit(model)[0]
    layer.pack_layout()
    rows = []
    limit = int4pack.FEW_ROWS
    for count in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128, 512):
        x = torch.randn(count, inner, dtype=torch.bfloat16)

        def packed(x: torch.Tensor = x) -> None:
            int4pack.few_rows(x, layer.codes, layer.scales, layer.offsets)

        def dequantized(x: torch.Tensor = x) -> None:
            int4pack.FEW_ROWS = 0
            layer(x)
            int4pack.FEW_ROWS = limit

        def floor(x: torch.Tensor = x) -> None:
            nn.functional.linear(x, dense)

        with torch.no_grad():
            times = taken_in_turn({"packed": packed, "dequantized": dequantized, "dense": floor}, 4 * repeats)
        rows.append({"rows": count, **{name: median(found) for name, found in times.items()}})
    return rows


def training(repeats: int, small: bool) -> dict[str, Any]:
    """A step on layers of a 1B and of a 7B model (2048 and 4096 wide), with 64 and with 512 tokens."""
    cases = {"2048": (4, False), "4096": (1, True)}
    result = {}
    for width, (layers, wide) in cases.items():
        models = training_models(layers, small, wide)
        for tokens in (64, 512):
            result[f"width {width}, {tokens} tokens"] = training_steps(models, tokens, 2 * repeats)
        models.clear()
        gc.collect()
    return result


def training_models(layers: int, small: bool, wide: bool) -> dict[str, nn.Module]:
    """An adapter on every linear layer of our 4-bit base, NF4 and bfloat16."""
    import bitsandbytes as bnb

    def nf4(model: LlamaForCausalLM) -> LlamaForCausalLM:
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                layer = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=False,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                layer.load_state_dict({"weight": module.weight.data})
                layer.support_avx512bf16_for_cpu = False
                model.set_submodule(name, layer.to("cpu"))
        return model

    lora = LoraConfig(r=16, target_modules="all-linear")
    bara = registry.config_class("q_bara")(r=16, alpha=16, target_modules="all-linear")
    xs = registry.config_class("lora_xs")(r=16, target_modules="all-linear")
    bases = {"bf16": lambda m: m, "NF4": nf4, "4-bit": low_bit}
    chosen = [("bf16", "LoRA", lora), ("NF4", "LoRA", lora), ("4-bit", "LoRA", lora)]
    if not wide:
        chosen += [("4-bit", "Q-BaRA", bara), ("4-bit", "LoRA-XS", xs)]
    models = {}
    for base, method, adapter in chosen:
        name, model = f"{base} + {method}", bases[base](dense_model(layers, small, wide))
        adapted = get_peft_model(model, adapter, autocast_adapter_dtype=False).to(torch.bfloat16)
        models[name] = adapted.train()
    return models


def training_step(model: nn.Module, tokens: int) -> Callable[[], None]:
    """Forward and backward through the stack of layers: head and loss are the same for all."""
    ids = torch.randint(0, 32000, (-(-tokens // PROMPT), min(tokens, PROMPT)))

    def call() -> None:
        hidden = model.base_model.model.model(ids).last_hidden_state
        hidden.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return call


def training_steps(models: dict[str, nn.Module], tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of steps, all models in turn."""
    times = taken_in_turn({name: training_step(model, tokens) for name, model in models.items()}, repeats)
    floor = median(times["NF4 + LoRA"])
    return {
        name: {
            "seconds": median(found),
            "against_nf4": floor / median(found),
            "trained_values": sum(p.numel() for p in models[name].parameters() if p.requires_grad),
            "bytes": stored_bytes(models[name]),
            "all_seconds": found,
        }
        for name, found in times.items()
    }


def adapters(repeats: int, small: bool) -> dict[str, Any]:
    """A step with Q-BaRA and with LoRA, as many trained values each, and with LoRA again: how far noise goes."""
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    bara = registry.config_class("q_bara")(r=16, alpha=16, target_modules="all-linear")
    models = {}
    for name, adapter in (("LoRA", lora), ("Q-BaRA", bara), ("LoRA again", lora)):
        base = low_bit(dense_model(2, small))
        adapted = get_peft_model(base, adapter, autocast_adapter_dtype=False).to(torch.bfloat16)
        models[name] = adapted.train()
    result = {}
    for tokens in (64, 512):
        times = taken_in_turn({name: training_step(models[name], tokens) for name in models}, 8 * repeats)
        result[f"{tokens} tokens"] = {
            name: {
                "seconds": median(found),
                "against_lora": median([one / lora for one, lora in zip(found, times["LoRA"], strict=True)]),
            }
            for name, found in times.items()
        }
    return result


@torch.no_grad()
def openvino(repeats: int, small: bool) -> dict[str, Any]:
    """Generation with the OpenVINO export of the merged model: its default, and with inputs left as they are."""
    import numpy as np
    import openvino as ov
    from transformers import AutoTokenizer

    from modicum.compress.export import export_model
    from modicum.models.embedded import path

    dense = dense_model(22, small)
    ids = torch.randint(0, 32000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out"
        merged = low_bit(dense_model(22, small), merged=True)
        export_model(merged, AutoTokenizer.from_pretrained(path()), target, "openvino")
        del merged
        gc.collect()
        plain = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
        settings = {"default": plain, "exact": {**plain, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}}
        core = ov.Core()
        requests = {
            name: core.compile_model(target / "openvino_model.xml", "CPU", values).create_infer_request()
            for name, values in settings.items()
        }
    past = dict.fromkeys(requests, 0)
    state: list[Any] = [None, None]

    def torch_prefill() -> None:
        output = dense(ids, use_cache=True, logits_to_keep=1)
        state[:] = output.past_key_values, output.logits.argmax(-1)

    def torch_decode() -> None:
        output = dense(state[1], past_key_values=state[0], use_cache=True)
        state[:] = output.past_key_values, output.logits.argmax(-1)

    def infer(name: str, tokens: np.ndarray) -> None:
        start, stop = past[name], past[name] + tokens.shape[1]
        requests[name].infer(
            {
                "input_ids": tokens,
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": np.arange(start, stop)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        past[name] = stop

    def prefill(name: str) -> None:
        requests[name].reset_state()
        past[name] = 0
        infer(name, ids.numpy())

    first = taken_in_turn({"bf16": torch_prefill, **{n: (lambda n=n: prefill(n)) for n in requests}}, repeats)
    then = taken_in_turn(
        {"bf16": torch_decode, **{n: (lambda n=n: infer(n, ids[:, :1].numpy())) for n in requests}},
        6 * repeats,
    )
    return {
        name: {
            "decode_tokens_per_second": 1 / median(then[name]),
            "decode_against_bf16": median(then["bf16"]) / median(then[name]),
            "prefill_tokens_per_second": PROMPT / median(first[name]),
            "prefill_against_bf16": median(first["bf16"]) / median(first[name]),
            "decode_seconds": then[name],
            "prefill_seconds": first[name],
        }
        for name in first
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="small shapes, nothing written")
    parser.add_argument("--only", choices=("switch", "generation", "openvino", "training", "adapters"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # the engine last: its threads stay
    parts = {"switch": switch, "generation": generation, "training": training, "openvino": openvino}
    found: dict[str, Any] = {}
    if arguments.only == "adapters":
        parts = {"adapters": adapters}
    for name, measure in parts.items():
        if arguments.only in (None, name):
            found[name] = measure(arguments.repeats, arguments.small)
            print(json.dumps({name: found[name]}, indent=1, default=str))
            gc.collect()
    if arguments.small or arguments.only not in (None, "training", "adapters"):
        return
    only = f" --only {arguments.only}" if arguments.only else ""
    options = f"--threads {arguments.threads} --repeats {arguments.repeats}{only}"
    about = {
        "command": f"python benchmarks/micro/low_bit.py {options}",
        "versions": {name: version(name) for name in ("modicum", "torch", "bitsandbytes", "openvino")},
        "threads": arguments.threads,
    }
    note = f"{arguments.threads} threads; all variants in turn, medians."
    if "adapters" in found:
        what = "a training step with Q-BaRA and with LoRA on the same 4-bit base"
        write(ADAPTERS, {"what": what, **about, **found, "table": adapters_table(found["adapters"], note)})
        return
    steps = found.pop("training")
    what = "a training step on a 4-bit base"
    write(TRAINING, {"what": what, **about, **steps, "table": training_table(steps, note)})
    if not arguments.only:
        what = "generation with a 1.1B Llama, 4 bits"
        write(RESULT, {"what": what, **about, **found, "table": generation_table(found, note)})


def write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def generation_table(found: dict[str, Any], note: str) -> dict[str, Any]:
    rows = []
    engines = {f"OpenVINO, {name}": values for name, values in found["openvino"].items() if name != "bf16"}
    for name, values in {**found["generation"], **engines}.items():
        size, bits = values.get("bytes"), values.get("bits_per_weight_in_memory")
        rows.append(
            [
                name,
                f"{values['decode_tokens_per_second']:.1f}",
                f"{values['decode_against_bf16']:.2f}",
                f"{values['prefill_tokens_per_second']:.0f}",
                f"{values.get('prefill_before_decoding_against_bf16', values['prefill_against_bf16']):.2f}",
                f"{values['prefill_against_bf16']:.2f}",
                f"{size / 2**20:,.0f}" if size else "–",
                f"{bits:.2f}" if bits else "–",
            ]
        )
    columns = [
        "model",
        "decode tokens/s",
        "× bf16",
        "prefill tokens/s",
        "× bf16, first",
        "× bf16, later",
        "MiB",
        "bits",
    ]
    what = "Random Llama of 1.1B parameters, batch 1, a prompt of 128 tokens, groups of 128. "
    more = (
        "OpenVINO's default rounds inputs to 8 bits; ratios of OpenVINO are to bfloat16 in a run of its own. "
    )
    return {"columns": columns, "rows": rows, "note": what + more + note}


def adapters_table(found: dict[str, Any], note: str) -> dict[str, Any]:
    rows = [
        [tokens, f"{1e3 * steps['LoRA']['seconds']:.1f}"]
        + [f"{steps[name]['against_lora']:.3f}" for name in ("Q-BaRA", "LoRA again")]
        for tokens, steps in found.items()
    ]
    return {
        "columns": ["step of two layers 2048 wide", "LoRA, ms", "Q-BaRA", "LoRA again"],
        "rows": rows,
        "note": "Time against LoRA's in the same turn, as many trained values; a second LoRA says how far noise goes. "
        + note,
    }


def training_table(found: dict[str, Any], note: str) -> dict[str, Any]:
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    rows = []
    for case, values in found.items():
        cells = [f"{values[n]['against_nf4']:.2f}" if n in values else "–" for n in names]
        rows.append([case, f"{1000 * values['NF4 + LoRA']['seconds']:.0f}", *cells])
    columns = ["layers", "NF4 + LoRA, ms", *names]
    what = "Speed relative to NF4 + LoRA (bitsandbytes), forward and backward, all linear layers adapted, rank 16, "
    return {"columns": columns, "rows": rows, "note": f"{what}bfloat16. {note}"}


if __name__ == "__main__":
    main()
