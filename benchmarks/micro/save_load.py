"""Bytes and seconds of saving and loading one adapter: the compact record, PEFT's folder, and a LoRA beside them.

A Llama of about 110M parameters, all 84 linear layers, r = 16. Loading is timed on a model that already holds
other adapters, because PEFT's own loading slows down with their number. The basis comes from the cache, as it
does for every adapter after the first of a base model.

    python benchmarks/micro/save_load.py [--adapters 32]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from modicum import LoraXSConfig, __version__
from modicum.store.files import load_adapter, save_adapter

sys.path.insert(0, str(Path(__file__).parent))
from training_step import RANK, base_model

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path(__file__).parent / "results" / "save_load.json"


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.name != "README.md")


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def growth(load: Callable[[str], object], adapters: int) -> dict[str, float]:
    """Seconds of the second, the last, and the median of many loads onto one model."""
    times = [timed(lambda name=f"user{index}": load(name)) for index in range(adapters)]
    return {"second": times[1], "last": times[-1], "median": statistics.median(times), "all": sum(times)}


def lora_xs(work: Path, adapters: int) -> dict:
    model = get_peft_model(base_model(), LoraXSConfig(r=RANK, alpha=RANK))
    model.save_pretrained(work / "xs")
    record = work / "xs.modicum"
    seconds = {
        "save_record": timed(lambda: save_adapter(model, record)),
        "save_folder": timed(lambda: model.save_pretrained(work / "again")),
        "first_load_with_cached_basis": timed(lambda: load_adapter(base_model(), record))
        - min(timed(base_model) for _ in range(3)),
    }
    saved = {"values": 84 * RANK**2, "payload_bytes": 84 * RANK**2 * 2, "record_bytes": record.stat().st_size}
    saved["record_limit_bytes"] = int(1.02 * saved["payload_bytes"] + 1024)
    saved["folder_bytes"] = folder_bytes(work / "xs")
    saved["folder_tensors"] = len(load_file(work / "xs" / "adapter_model.safetensors"))
    ours = load_adapter(base_model(), record)
    seconds["record"] = growth(lambda name: load_adapter(ours, record, adapter_name=name), adapters)
    theirs = PeftModel.from_pretrained(base_model(), work / "xs")
    seconds["folder_through_peft"] = growth(lambda name: theirs.load_adapter(work / "xs", name), adapters)
    return {"bytes": saved, "seconds": seconds}


def lora(work: Path, adapters: int) -> dict:
    model = get_peft_model(base_model(), LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    model.save_pretrained(work / "lora")
    theirs = PeftModel.from_pretrained(base_model(), work / "lora")
    seconds = {"folder_through_peft": growth(lambda name: theirs.load_adapter(work / "lora", name), adapters)}
    return {"bytes": {"folder_bytes": folder_bytes(work / "lora")}, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, default=32)
    adapters = parser.parse_args().adapters
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "what": "saving and loading one adapter, Llama 110M, 84 linear layers, r=16, one thread",
            "command": f"python benchmarks/micro/save_load.py --adapters {adapters}",
            "adapters": adapters,
            "versions": {"modicum": __version__, "torch": torch.__version__},
            "lora_xs": lora_xs(Path(folder), adapters),
            "lora": lora(Path(folder), adapters),
        }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
