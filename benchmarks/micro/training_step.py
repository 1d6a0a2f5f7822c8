"""Time and peak memory of one training step: LoRA-XS, LoRA and the floor, side by side in one run.

A Llama of about 110M parameters (hidden 768, 12 layers, all 84 linear layers adapted), batch 8 x 128, AdamW. The
floor trains one layer norm of the first layer: the least a step can do that still runs backward through the
whole frozen model. Times are taken in turn, step by step, in one process, so that a slow moment hits all alike;
memory is the high-water mark of a process of its own per method.

    python benchmarks/micro/training_step.py [--threads 1] [--repeats 7]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from modicum import LoraXSConfig, __version__

RESULT = Path(__file__).parent / "results" / "training_step.json"
METHODS = ("floor", "lora_xs", "lora")
RANK = 16


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def prepared(method: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = base_model()
    if method == "floor":
        model.requires_grad_(False)
        model.model.layers[0].input_layernorm.weight.requires_grad_()
    elif method == "lora_xs":
        model = get_peft_model(model, LoraXSConfig(r=RANK, alpha=RANK))
    else:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    model.train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def batch() -> torch.Tensor:
    return torch.randint(0, 32000, (8, 128), generator=torch.Generator().manual_seed(0))


def peak_memory(method: str, threads: int) -> float:
    """Peak resident memory in MiB of a fresh process that runs three steps."""
    command = [sys.executable, __file__, "--memory", method, "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def memory_probe(method: str) -> None:
    model, optimizer = prepared(method)
    for _ in range(3):
        step(model, optimizer, batch())
    # not ru_maxrss, which a process inherits from the one that started it
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def measure(threads: int, repeats: int) -> dict:
    models = {method: prepared(method) for method in METHODS}
    ids = batch()
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(repeats + 1):
        for method in METHODS:
            start = time.perf_counter()
            step(*models[method], ids)
            if repeat:  # the first round warms up
                times[method].append(time.perf_counter() - start)
    rows = {}
    for method in METHODS:
        ratios = [mine / floor for mine, floor in zip(times[method], times["floor"], strict=True)]
        rows[method] = {
            "trained_values": sum(p.numel() for p in models[method][0].parameters() if p.requires_grad),
            "seconds_median": statistics.median(times[method]),
            "seconds_min": min(times[method]),
            "seconds_max": max(times[method]),
            "ratio_to_floor_median": statistics.median(ratios),
            "ratio_to_floor_min": min(ratios),
            "ratio_to_floor_max": max(ratios),
        }
    del models
    for method in METHODS:
        peaks = [peak_memory(method, threads) for _ in range(3)]
        rows[method]["peak_memory_mib"] = statistics.median(peaks)
    return rows


def shown(methods: dict) -> dict:
    """The documentation's table."""
    names = {"floor": "floor (one layer norm)", "lora_xs": "`lora_xs`", "lora": "`lora` (PEFT)"}
    return {
        "columns": ["method", "trained values", "seconds a step", "times the floor", "peak memory (MiB)"],
        "rows": [
            [
                names[method],
                row["trained_values"],
                f"{row['seconds_median']:.2f}",
                f"{row['ratio_to_floor_median']:.3f}",
                f"{row['peak_memory_mib']:,.0f}",
            ]
            for method, row in methods.items()
        ],
        "note": "Llama 110M, 84 linear layers, rank 16, batch 8 x 128, float32, one thread; steps taken in turn.",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", choices=METHODS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        memory_probe(options.memory)
        return
    result = {
        "what": "training step, Llama 110M (hidden 768, 12 layers, 84 linears), batch 8x128, float32, r=16",
        "command": f"python benchmarks/micro/training_step.py --threads {options.threads} --repeats {options.repeats}",
        "threads": options.threads,
        "repeats": options.repeats,
        "machine": platform.processor() or platform.machine(),
        "versions": {"modicum": __version__, "torch": torch.__version__},
        "methods": measure(options.threads, options.repeats),
    }
    result["table"] = shown(result["methods"])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["methods"], indent=2))


if __name__ == "__main__":
    main()
