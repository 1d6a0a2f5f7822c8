"""Extracted sub-networks of a random Llama of 1.1B parameters against the merged dense model, in one run.

Hidden 2048, 16 layers, 32 heads in 8 groups, MLP 8192, vocabulary 32000, bfloat16. An elastic LoRA of rank 32 on all
linear layers; every arm is a folder that `modicum extract` wrote (or, for the unmerged one, the base with PEFT's LoRA
of rank 32). Prompt 128, 32 tokens decoded, batch 1, arms in turn. Two baselines, never mixed: the merged dense model,
and the dense model with its LoRA left unmerged.

    python benchmarks/micro/extraction.py [--threads 1 4] [--repeats 9] [--small]
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modicum.adapters.elastic import Switch
from modicum.compress.extract import extract
from modicum.evaluate.latency import measure
from modicum.methods.elastic_lora import ElasticLoraConfig
from modicum.models.loading import load_tokenizer
from modicum.search.costs import Costs
from modicum.search.space import SearchSpace

RESULT = Path(__file__).parent / "results" / "extraction.json"
RANK = 32
#: arm -> (MLP channels, query heads) of every layer, of 8192 and 32. Multiples of 128: with 5952 channels and four
#: threads the product runs at 1.09 of the full width's speed, with 5888 at 1.37 (oneDNN divides rows among threads)
ARMS = {"84 %": (6400, 32), "80 %": (6144, 28), "76 %": (5888, 24)}


def shape(small: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=256 if small else 2048,
        intermediate_size=1024 if small else 8192,
        num_hidden_layers=2 if small else 16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=8 if small else 64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )


def dense(small: bool) -> Any:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(shape(small)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


def extracted(folder: Path, small: bool) -> dict[str, dict[str, Any]]:
    """Writes every arm to `folder` and says what each is."""
    adapter = ElasticLoraConfig(r=RANK, alpha=2 * RANK, init_weights=False)
    model = get_peft_model(dense(small), adapter, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for layer in Switch(model).adapters.values():
            layer.B.mul_(1e-3)  # random weights turn bfloat16 rounding of more into percents
    groups = [
        {"width": "mlp", "choices": sorted({mlp // (8 if small else 1) for mlp, _ in ARMS.values()})},
        {"width": "heads", "choices": [24, 28, 32]},
    ]
    groups = [group | {"share": "model"} for group in groups]
    full = 1024 if small else 8192
    groups[0]["choices"] = [*groups[0]["choices"], full]
    space = SearchSpace.of_model({"name": "widths", "groups": groups}, model)
    costs, tokenizer, about = Costs.of_model(model), load_tokenizer("embedded"), {}
    arms = {"merged dense": (full * (8 if small else 1), 32), **ARMS}
    for name, (mlp, heads) in arms.items():
        chosen = space.sub_network({"width.mlp": mlp // (8 if small else 1), "width.heads": heads})
        found = extract(model, folder / name, tokenizer=tokenizer, sub_network=chosen, dtype="bfloat16")
        assert found.parameters == costs.parameters(chosen)
        about[name] = {
            "mlp": mlp,
            "heads": heads,
            "parameters": found.parameters,
            "share": found.parameters / found.parameters_before,
            "linear_share": found.linear / found.linear_before,
            "model_class": found.model_class,
            "stock": found.stock,
            "logit_error": found.logit_error,
        }
    return about


def unmerged(small: bool) -> Any:
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    return get_peft_model(dense(small), config, autocast_adapter_dtype=False).eval()


def write(about: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Runs at other numbers of threads stay in the file."""
    before = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    threads = {run["threads"] for run in runs}
    runs = [*(run for run in before if run["threads"] not in threads), *runs]
    found = {"table": shown(about, runs), "arms": about, "rank": RANK, "runs": runs}
    RESULT.write_text(json.dumps(found, indent=2) + "\n")


def shown(about: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of the docs."""
    columns = [
        "threads",
        "baseline",
        "parameters kept",
        "MLP, heads",
        "prefill",
        "decode",
        "decode by traffic",
    ]
    rows = []
    for run in runs:
        for model in run["models"]:
            if model["name"] == run["baseline"]:
                continue
            arm = about[model["name"]]
            kept = f"{100 * arm['share']:.1f} %"
            cells = [run["threads"], run["baseline"], kept, f"{arm['mlp']}, {arm['heads']}"]
            traffic = (1 + lora_share() * (run["baseline"] == "unmerged LoRA")) / arm["linear_share"]
            rows.append(
                [*cells, ratio(model["prefill_ratio"]), ratio(model["decode_ratio"]), f"{traffic:.2f}"]
            )
    note = (
        "Times as fast as the baseline named in the row, with 95 % intervals over paired turns: random Llama of 1.1B "
        "parameters, bfloat16, prompt 128, 32 tokens decoded, batch 1. The unmerged baseline is the dense model with "
        "PEFT's LoRA of rank 32 beside it; only the merged one tells what cutting brings. By traffic: the ratio of the "
        "weights that one token reads, which is what decoding comes to where memory is all that counts."
    )
    return {"columns": columns, "rows": rows, "note": note}


def lora_share() -> float:
    """Numbers of the LoRA beside the dense model, as a share of those in its linear layers."""
    with torch.device("meta"):
        model = LlamaForCausalLM(shape(small=False))
    linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    head = model.lm_head.weight
    beside = sum(RANK * sum(weight.shape) for weight in linear if weight is not head)
    return beside / sum(weight.numel() for weight in linear)


def ratio(measured: dict[str, Any]) -> str:
    return f"{measured['value']:.2f} ({measured['low']:.2f}–{measured['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--small", action="store_true", help="a tiny model, to try the script; writes nothing"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = extracted(folder, options.small)
        gc.collect()
        models = {arm: AutoModelForCausalLM.from_pretrained(folder / arm).eval() for arm in about}
        models["unmerged LoRA"] = unmerged(options.small)
        runs = []
        for threads in options.threads:
            for baseline in ("merged dense", "unmerged LoRA"):
                others = {arm: model for arm, model in models.items() if arm in ARMS or arm == baseline}
                found = measure(
                    others,
                    baseline=baseline,
                    threads=threads,
                    repeats=options.repeats,
                    prompt=128,
                    generate=32,
                )
                runs.append({"threads": threads, **asdict(found)})
                for sentence in found.sentences:
                    print(threads, sentence)
    if not options.small:
        write(about, runs)


if __name__ == "__main__":
    main()
