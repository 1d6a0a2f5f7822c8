"""What int8 and int4 records cost: bytes, error of the numbers, of the updates, and of the task.

Trains LoRA-XS and LoRA on the bundled notes with the embedded model (the recipes of `modicum demo`, three seeds),
writes every adapter as a record of each type, and measures the record, loaded as any user would load it, on held-out
rows.
"Update" is ‖ΔW' − ΔW‖ / ‖ΔW‖ over all layers, the error of what the adapter adds to inputs of no preferred direction.

    python benchmarks/store/low_bit_records.py --work /somewhere

Finished trainings in the work folder are used again. Result: benchmarks/store/results/low_bit_records.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, dict[str, Any]] = {
    "lora_xs": {"r": 32, "alpha": 32, "rate": 1e-2},
    "lora": {"r": 8, "lora_alpha": 8, "rate": 6e-3},
}
TYPES = ("float32", "bfloat16", "int8", "int4")
SEEDS = (0, 1, 2)
ROWS = 200
#: other ways to spend the bits, measured on the same numbers: values per scale, and whether there is a zero-point
SCHEMES = ((32, False), (64, False), (128, False), (256, False), (64, True), (128, True), (256, True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for trainings and records")
    work = parser.parse_args().work
    runs = [(method, seed, trained(method, seed, work)) for method in METHODS for seed in SEEDS]
    measured = [measure(method, seed, run, work) for method, seed, run in runs]
    result = {
        "what": "records of LoRA-XS and LoRA adapters in several number types; bundled notes, embedded model",
        "command": "python benchmarks/store/low_bit_records.py --work FOLDER",
        "schemes": schemes([run for _, _, run in runs]),
        "runs": measured,
        "table": table(measured),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "low_bit_records.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def trained(method: str, seed: int, work: Path) -> Path:
    """The adapter folder of one training, done if it is not there."""
    out = work / f"{method}-{seed}"
    if not (out / "report.json").is_file():
        options = dict(METHODS[method])
        recipe = {
            "model": {"name_or_path": "embedded", "dtype": "float32"},
            "data": {"train": "bundled:notes", "max_length": 96, "max_eval_rows": ROWS},
            "train": {
                "max_steps": 120, "batch_size": 16, "scheduler": "cosine", "load_best": False, "seed": seed,
                "evaluate_before": False, "eval_steps": 1000, "save_steps": 1000, "report_to": "none",
                "device": "cpu", "learning_rate": options.pop("rate"),
            },
            "method": {"name": method, **options},
            "output": str(out),
        }  # fmt: skip
        file = work / f"{method}-{seed}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(recipe))
        subprocess.run([sys.executable, "-m", "modicum", "tune", "--config", str(file)], check=True)
    return out / "adapter"


def measure(method: str, seed: int, adapter: Path, work: Path) -> dict[str, Any]:
    """Bytes and errors of one adapter in every type."""
    from modicum.store.convert import export_adapter, load_for
    from modicum.store.record import peek

    exact = weights(adapter)
    base = weights(None)
    found: dict[str, Any] = {"method": method, "seed": seed}
    for dtype in TYPES:
        file = work / f"{method}-{seed}-{dtype}.modicum"
        export_adapter(load_for("embedded", adapter)[0], file, "modicum", dtype=dtype, overwrite=True)
        header, rounded = peek(file), weights(file)
        off = sum(float(((rounded[n] - exact[n]) ** 2).sum()) for n in exact)
        update = sum(float(((exact[n] - base[n]) ** 2).sum()) for n in exact)
        rounding = header.rounding
        found[dtype] = {
            "bytes": header.bytes,
            "value_bytes": header.value_bytes,
            "values": header.values,
            "largest_error": rounding and rounding.largest,
            "relative_error": rounding and rounding.relative,
            "update_error": (off / update) ** 0.5,
            **task(file),
        }
        print(method, seed, dtype, found[dtype], flush=True)
    return found


def weights(adapter: Path | None) -> dict[str, Any]:
    """The weights of the embedded model, merged with the adapter."""
    from modicum.models.loading import load_base
    from modicum.store.convert import load_for

    if adapter is None:
        model = load_base("embedded", dtype="float32")
    else:
        model = load_for("embedded", adapter, dtype="float32")[0].merge_and_unload()
    return {name: value.detach().double() for name, value in model.state_dict().items() if "proj" in name}


def task(adapter: Path) -> dict[str, float]:
    """The metrics on held-out rows."""
    from modicum.evaluate.load import load_for_evaluation
    from modicum.evaluate.run import evaluate

    loaded = load_for_evaluation(
        "embedded", "bundled:notes", adapter=str(adapter), dtype="float32",
        overrides=["max_length=96", f"max_eval_rows={ROWS}"],
    )  # fmt: skip
    found = evaluate(loaded.model, loaded.tokenizer, loaded.rows, loaded.task, batch_size=50, resamples=100)
    return {name: measure.value for name, measure in found.metrics.items()}


def schemes(adapters: list[Path]) -> list[dict[str, Any]]:
    """Bits per number and relative error of other ways to quantize the same numbers, on the average of adapters."""
    from modicum.store.files import read_adapter

    tensors = [[v.float().numpy().ravel() for v in read_adapter(adapter)[1].values()] for adapter in adapters]
    found = []
    for bits in (4, 8):
        for block, zero_point in SCHEMES:
            errors = [relative(values, bits, block, zero_point) for values in tensors]
            found.append(
                {
                    "code_bits": bits,
                    "block": block,
                    "zero_point": zero_point,
                    "bits": bits + (32 if zero_point else 16) / block,
                    "relative_error": float(np.mean(errors)),
                }
            )
    return found


def relative(tensors: list[np.ndarray], bits: int, block: int, zero_point: bool) -> float:
    from modicum.store import low_bit

    off = norm = 0.0
    before, low_bit.BLOCK = low_bit.BLOCK, block
    try:
        for values in tensors:
            if zero_point:
                got = affine(values, bits, block)
            else:
                lengths = low_bit.block_lengths([values.size])
                kind = f"int{bits}"
                got = low_bit.dequantize(low_bit.quantize(values, lengths, kind), lengths, kind)
            off += float(((got - values) ** 2).sum())
            norm += float((values**2).sum())
    finally:
        low_bit.BLOCK = before
    return (off / norm) ** 0.5


def affine(values: np.ndarray, bits: int, block: int) -> np.ndarray:
    """`values` from the smallest to the largest of a block in equal steps."""
    rows = np.pad(values, (0, -values.size % block), mode="edge").reshape(-1, block)
    low = rows.min(1, keepdims=True)
    step = (rows.max(1, keepdims=True) - low) / (2**bits - 1)
    step[step == 0] = 1
    return (np.rint((rows - low) / step) * step + low).ravel()[: values.size]


def table(measured: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for method in METHODS:
        runs = [run for run in measured if run["method"] == method]
        for dtype in TYPES:
            cells = [run[dtype] for run in runs]

            def mean(key: str, cells: list[dict[str, Any]] = cells) -> float:
                return float(np.mean([cell[key] for cell in cells]))

            # seed by seed against the numbers as they were trained
            moved = [100 * (run[dtype]["exact_match"] - run["float32"]["exact_match"]) for run in runs]
            low = cells[0]["relative_error"] is not None
            rows.append(
                [
                    f"{method}, {cells[0]['values']:,} values",
                    dtype,
                    f"{mean('bytes'):,.0f}",
                    f"{max(c['largest_error'] for c in cells):.2g}" if low else "",
                    f"{100 * mean('relative_error'):.2f}" if low else "",
                    f"{100 * mean('update_error'):.2f}",
                    f"{mean('perplexity'):.4f}",
                    f"{100 * mean('exact_match'):.1f}",
                    f"{np.mean(moved):+.1f} ({min(moved):+.1f} to {max(moved):+.1f})",
                ]
            )
    columns = [
        "adapter", "type", "bytes", "largest error", "error (%)", "of the update (%)", "perplexity", "exact match (%)",
        "change",
    ]  # fmt: skip
    note = (
        f"Means of {len(SEEDS)} seeds, {ROWS} held-out rows each; the change is taken seed by seed against float32. "
        "Errors are relative to the norm, the largest is that of a single number."
    )
    return {"columns": columns, "rows": rows, "note": note}


if __name__ == "__main__":
    main()
