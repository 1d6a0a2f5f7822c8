"""Adapters on 4-, 3- and 2-bit bases with as many trained values each, before and after merging.

One base per bit width, quantized by `modicum quantize` (GPTQ), serves all methods; LoRA is run on bitsandbytes NF4 and
on the dense model too. Every method has its learning rate swept on validation rows at one bit width or at all, and is
trained with three seeds at every width. Each adapter is merged into its low-bit base: exactly where its update is
constant on blocks, by quantizing again with error feedback where it is not. Test rows see the adapter kept apart and
the merged folder, loaded as any user would load it.

    python benchmarks/quality/quantized.py --shared ../shared --work /somewhere --workers 2

Interrupted runs go on where they stopped. Results: benchmarks/quality/results/quantized_*.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SEEDS = [0, 1, 2]
BATCH = 16
LENGTH = 64
#: training texts that a merge measures on, and that quantizing again is calibrated on
MEASURED, CALIBRATED = 32, 128
DENSE, NF4 = "dense", "nf4"
ORDER = (DENSE, "4", NF4, "3", "2")


def lowrank(name: str, rank: int, others: dict[str, int], scaling: int = 1, **options: int) -> dict[str, Any]:
    """A method of rank `rank`, with `others` for some layers and the same scaling in all."""
    alpha = {"lora": "lora_alpha"}.get(name, "alpha")
    return {
        "name": name,
        "r": rank,
        alpha: scaling * rank,
        "rank_pattern": others,
        "alpha_pattern": {layer: scaling * value for layer, value in others.items()},
        **options,
    }


def hira(repeat: int, pool: int) -> dict[str, Any]:
    """QA-HiRA whose trained numbers are the update of their block."""
    return {"name": "qa_hira", "repeat": repeat, "pool": pool, "r": 1, "alpha": pool}


# Ranks and blocks are solved for as many trained values as QA-HiRA has. Scaling = pool makes the update of a pooled
# method as large as LoRA's for the same factors.
_MLP = ("gate_proj", "up_proj")
_LARGE: dict[str, dict[str, Any]] = {
    "lora": lowrank("lora", 2, {"q_proj": 3, **dict.fromkeys(_MLP, 3)}),
    "q_bara 2x2": lowrank("q_bara", 2, {"q_proj": 3, **dict.fromkeys(_MLP, 3)}, 2, pool=2, repeat=2),
    "qa_lora 1x32": lowrank("qa_lora", 4, dict.fromkeys(_MLP, 5), 32, pool=32),
    "qa_hira 2x32": hira(2, 32),
    "qa_hira 8x8": hira(8, 8),
    "qa_blora 4x8": lowrank("qa_blora", 13, {}, 8, pool=8, repeat=4),
    "lora_xs": lowrank("lora_xs", 42, {}),
}
_SMALL: dict[str, dict[str, Any]] = {
    "lora": lowrank("lora", 1, {"o_proj": 2}),
    "q_bara 2x2": lowrank("q_bara", 1, {"o_proj": 2}, 2, pool=2, repeat=2),
    "qa_lora 1x16": lowrank("qa_lora", 2, {"k_proj": 1}, 16, pool=16),
    "qa_hira 2x16": hira(2, 16),
    "qa_hira 4x8": hira(4, 8),
    "qa_blora 4x4": lowrank("qa_blora", 5, {"gate_proj": 4}, 4, pool=4, repeat=4),
    "lora_xs": lowrank("lora_xs", 13, dict.fromkeys(_MLP, 14)),
}
_RATES: dict[str, list[float]] = {
    "lora": [5e-3, 1.2e-2, 3e-2],
    "q_bara": [5e-3, 1.2e-2, 3e-2],
    "qa_lora": [8e-3, 2.5e-2, 6e-2],
    "qa_hira": [1.5e-3, 4e-3, 1e-2],
    "qa_blora": [5e-3, 1.2e-2, 3e-2],
    "lora_xs": [3e-3, 8e-3, 2e-2],
}

#: what is trained on what; where no learning rates are swept, the last one that was chosen serves. Stories want larger
#: rates on 2 bits than on 3, and their seeds differ so little that the first may choose
SETTINGS: dict[str, dict[str, Any]] = {
    "notes": {
        "what": "bundled task notes on the embedded model (5.8M parameters)",
        "model": "embedded", "group": 32, "exclude": [], "methods": _LARGE, "widths": [3, 2, 4], "steps": 70,
        "rows": 200, "score": "exact_match", "select_on": "all_seeds", "swept": ["3"],
    },
    "stories260k": {
        "what": "TinyStories on stories260k (0.26M parameters; down projections left dense and unadapted)",
        "model": "models/stories260k", "group": 16, "exclude": ["down_proj"], "methods": _SMALL, "widths": [3, 2, 4],
        "steps": 80, "rows": 200, "score": "token_accuracy",
        "rates": {"qa_hira": [5e-4, 1.5e-3, 4e-3], "qa_lora": [3e-3, 8e-3, 2.5e-2]},
        "select_on": "first_seed", "swept": ["3", "2", "4"],
    },
}  # fmt: skip
#: what is compared, seed by seed
PAIRS = [
    ("q_bara", "lora"), ("qa_hira", "qa_lora"), ("qa_hira", "lora"), ("qa_blora", "qa_lora"), ("lora_xs", "lora"),
]  # fmt: skip
#: file and characters of each split; `stories` is what the embedded model is calibrated on. stories260k learned from
#: stories with their case kept, of which this sample is all there is: the adapters saw none of its test rows, but the
#: base model may have.
_TEXTS = {
    "stories": {
        "train": ("train", 0, 600_000),
        "validation": ("valid", 0, 20_000),
        "test": ("valid", 100_000, 160_000),
    },
    "stories260k": {
        "train": ("sample_cased", 0, 140_000),
        "validation": ("sample_cased", 140_000, 155_000),
        "test": ("sample_cased", 155_000, 200_000),
    },
}


def places(setting: str, method: str) -> list[str]:
    """The bases that a method is trained on: bit widths, NF4 and the dense model for LoRA."""
    widths = [str(bits) for bits in SETTINGS[setting]["widths"]]
    extra = [NF4] if "4" in widths else []
    return [*widths, *extra, DENSE] if method == "lora" else widths


def model_of(setting: str, place: str, shared: Path, work: Path) -> str:
    """The model of a setting, as it is or quantized."""
    name = SETTINGS[setting]["model"]
    dense = name if name == "embedded" else str(shared / name)
    return dense if place == DENSE else str(work / "bases" / f"{Path(name).name}-{place}")


def data_of(setting: str, shared: Path, work: Path) -> str:
    """The rows of a setting; stories are cut into files on first use."""
    if setting == "notes":
        return "bundled:notes"
    folder = work / "texts" / setting
    for split, (name, start, end) in _TEXTS[setting].items():
        if not (folder / f"{split}.txt").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            file = shared / "data" / "tinystories" / f"{name}.txt.gz"
            with gzip.open(file, "rt", encoding="utf-8") as text:
                (folder / f"{split}.txt").write_text(text.read()[start:end], encoding="utf-8")
    return str(folder)


def make_base(setting: str, place: str, shared: Path, work: Path) -> None:
    """Quantize the model of a setting, unless it has been."""
    from modicum.compress.quantize import quantize_model
    from modicum.compress.quantize_report import QuantizeOptions

    output = model_of(setting, place, shared, work)
    if place == DENSE or Path(output).is_dir():
        return
    facts = SETTINGS[setting]
    stories = Path(data_of("stories" if setting == "notes" else setting, shared, work))
    common: dict[str, Any] = {
        "exclude": tuple(facts["exclude"]),
        "sequence_length": 256,
        "eval_text": stories / "validation.txt",
        "eval_sequences": 16,
    }
    if place == NF4:
        options = QuantizeOptions(algorithm="nf4", **common)
    else:
        options = QuantizeOptions(
            bits=int(place),
            group_size=facts["group"],
            algorithm="gptq",
            clip="mse",
            calibration=(stories / "train.txt",),
            **common,
        )
    quantize_model(model_of(setting, DENSE, shared, work), output, options)


def recipe_values(
    setting: str, method: str, place: str, rates: list[float], shared: Path, work: Path
) -> dict:
    """The recipe of one cell of the table."""
    facts = SETTINGS[setting]
    options = dict(facts["methods"][method])
    if facts["exclude"]:
        options["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    return {
        "model": {"name_or_path": model_of(setting, place, shared, work), "dtype": "float32"},
        "data": {
            "train": data_of(setting, shared, work),
            "max_length": LENGTH,
            "max_eval_rows": facts["rows"],
        },
        "method": options,
        "train": {
            "max_steps": facts["steps"],
            "batch_size": BATCH,
            "eval_batch_size": 64,
            "scheduler": "cosine",
            "load_best": False,
            "eval_steps": 10_000,
            "save_steps": 10_000,
            "evaluate_before": False,
            "report_to": "none",
            "device": "cpu",
        },
        "sweep": {"learning_rate": rates, "seeds": SEEDS, "select_on": facts["select_on"]},
        "output": str(work / setting / method.replace(" ", "-") / place),
    }


def measured(setting: str, model: str, adapter: str | None, shared: Path, work: Path) -> dict[str, float]:
    """Perplexity, token accuracy and, where rows have a prompt, exact match on the test rows."""
    from modicum.evaluate.load import load_for_evaluation
    from modicum.evaluate.run import evaluate

    overrides = [f"max_length={LENGTH}", f"max_eval_rows={SETTINGS[setting]['rows']}"]
    loaded = load_for_evaluation(
        model, data_of(setting, shared, work), adapter=adapter, overrides=overrides, dtype="float32"
    )
    found = evaluate(loaded.model, loaded.tokenizer, loaded.rows, loaded.task, batch_size=64, resamples=100)
    return {name: measure.value for name, measure in found.metrics.items()}


def texts_of(setting: str, count: int, shared: Path, work: Path) -> list[str]:
    """`count` training texts."""
    from modicum.data.files import load_rows

    rows = load_rows(data_of(setting, shared, work), "train").rows
    texts = ["".join(row.values()) for row in rows] if setting == "notes" else rows[0]["text"].splitlines()
    return [text for text in texts if len(text) > 40][:count]


def finish(setting: str, place: str, run: Path, shared: Path, work: Path) -> None:
    """Merge the adapter of one finished run, and measure both forms."""
    from modicum.compress.merge import merge_to_folder

    target, model = run / "measured.json", model_of(setting, place, shared, work)
    if target.is_file():
        return
    found: dict[str, Any] = {"separate": measured(setting, model, str(run / "adapter"), shared, work)}
    if place != DENSE:
        exact = not any(name in run.parts for name in ("lora", "lora_xs"))
        texts, merged = texts_of(setting, MEASURED if exact else CALIBRATED, shared, work), run / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        about = merge_to_folder(model, run / "adapter", merged, texts=texts, allow_inexact=not exact)
        found["merge"] = {
            "exact": about.exact,
            "logit_error": about.report.logit_error,
            "lost": about.report.lost,
            "bits_before": about.bits_before,
            "bits_after": about.bits_after,
        }
        found["merged"] = measured(setting, str(merged), None, shared, work)
        shutil.rmtree(merged)
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run_method(setting: str, method: str, shared: Path, work: Path) -> None:
    """All cells of a method in this process, on one thread."""
    import torch

    from modicum.train.recipe import make_recipe
    from modicum.train.run import tune

    torch.set_num_threads(1)
    facts, name = SETTINGS[setting], method.partition(" ")[0]
    swept = facts.get("rates", _RATES).get(name, _RATES[name])
    best = None
    for place in places(setting, method):
        rates = swept if best is None or place in facts["swept"] else [best]
        recipe = make_recipe(recipe_values(setting, method, place, rates, shared, work))
        best = tune(recipe, resume=True).report["best_learning_rate"]
        for seed in SEEDS:
            finish(setting, place, recipe.folder / f"lr={best:g}" / f"seed={seed}", shared, work)


def run_bases(setting: str, shared: Path, work: Path) -> None:
    """All bases of a setting, and what they are worth untuned."""
    import torch

    torch.set_num_threads(1)
    for place in places(setting, "lora"):
        make_base(setting, place, shared, work)
        target = work / setting / f"base-{place}.json"
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            found = measured(setting, model_of(setting, place, shared, work), None, shared, work)
            target.write_text(json.dumps(found) + "\n", encoding="utf-8")


def collect(setting: str, work: Path) -> dict | None:
    """The result file of a setting; None while a cell is missing."""
    import torch
    import transformers

    from modicum import __version__

    facts, cells = SETTINGS[setting], {}
    try:
        for method in facts["methods"]:
            for place in places(setting, method):
                cells.setdefault(place, {})[method] = cell(setting, method, place, work)
        untuned = {
            place: json.loads((work / setting / f"base-{place}.json").read_text())
            for place in places(setting, "lora")
        }
    except FileNotFoundError:
        return None
    return {
        "what": f"{facts['what']}, CPU, float32 computation",
        "command": "python benchmarks/quality/quantized.py --shared ../shared --work FOLDER",
        "protocol": {
            "seeds": SEEDS,
            "batch": BATCH,
            "length": LENGTH,
            **{key: facts[key] for key in ("group", "exclude", "steps", "widths", "methods", "rows")},
            "base": "gptq, mse grids, bfloat16 scales and offsets, 128 x 256 tokens of training stories",
            "selection": f"learning rate by validation loss ({facts['select_on']}) at {facts['swept']} bits",
            "merge": f"exact ones measured on {MEASURED} training texts, the others calibrated on {CALIBRATED}",
        },
        "versions": {
            "modicum": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "untuned": untuned,
        "cells": cells,
        "paired": paired(facts, cells),
        "table": shown(facts, untuned, cells),
    }


def cell(setting: str, method: str, place: str, work: Path) -> dict[str, Any]:
    """What was measured of a method on a base, seed by seed."""
    folder = work / setting / method.replace(" ", "-") / place
    summary = json.loads((folder / "summary.json").read_text())
    rate = summary["best_learning_rate"]
    runs = [json.loads((folder / f"lr={rate:g}" / f"seed={s}" / "measured.json").read_text()) for s in SEEDS]
    swept = {
        f"{entry['learning_rate']:g}": entry["validation"]["loss"]["value"]
        for entry in summary["learning_rates"]
    }
    return {
        "learning_rate": rate,
        "validation_loss_by_rate": swept,
        "trained_values": summary["trained_values"]["adapter"],
        "runs": runs,
    }


def series(found: dict[str, Any], form: str, metric: str) -> list[float] | None:
    """One value per seed, None where a form was not made."""
    return [run[form][metric] for run in found["runs"]] if form in found["runs"][0] else None


def paired(facts: dict[str, Any], cells: dict[str, dict]) -> list[dict[str, Any]]:
    """Differences between two methods seed by seed, with Student's interval."""
    from dataclasses import asdict

    from modicum.evaluate.intervals import over_seeds

    entries = []
    for place, own in cells.items():
        methods = {**own, "lora nf4": cells[NF4]["lora"]} if place == "4" else own
        pairs = [
            (a, b)
            for left, right in PAIRS
            for a in methods
            for b in methods
            if (a.partition(" ")[0], b.partition(" ")[0]) == (left, right)
        ]
        for (a, b), form, metric in product(pairs, ("separate", "merged"), ("loss", facts["score"])):
            x, y = series(methods[a], form, metric), series(methods[b], form, metric)
            assert x is not None
            assert y is not None
            gaps = [one - other for one, other in zip(x, y, strict=True)]
            entries.append(
                {"base": place, "pair": [a, b], "form": form, "metric": metric}
                | {"differences": gaps, "mean": asdict(over_seeds(gaps))}
            )
    return entries


def paired_result(found: dict[str, dict]) -> dict:
    """The result file of the two questions: Q-BaRA against QLoRA, QA-HiRA against QA-LoRA, in all settings."""
    rows = []
    for setting, result in found.items():
        score = SETTINGS[setting]["score"]
        keys = dict.fromkeys((entry["base"], *entry["pair"]) for entry in result["paired"])
        for base, left, right in sorted(keys, key=lambda key: ORDER.index(key[0])):
            if (left.partition(" ")[0], right.partition(" ")[0]) not in PAIRS[:2]:
                continue
            gaps = {
                (entry["form"], entry["metric"]): entry["mean"]
                for entry in result["paired"]
                if (entry["base"], *entry["pair"]) == (base, left, right)
            }
            cells = [
                _gap(gaps[form, metric], 100 if metric == score else 1)
                for metric in ("loss", score)
                for form in ("separate", "merged")
            ]
            rows.append([setting, base, f"{left} - {right}", *cells])
    columns = ["setting", "bits", "difference", "loss", "loss, merged", "score", "score, merged"]
    return {
        "what": "differences between methods, seed by seed",
        "command": "python benchmarks/quality/quantized.py --shared ../shared --work FOLDER",
        "table": {
            "columns": columns,
            "rows": rows,
            "note": (
                "Mean over three seeds of the difference within a seed ± half of Student's 95 % interval, on test "
                "rows. Loss in nats per token: below zero the first is better; score in points (exact match on notes, "
                "else token accuracy): above zero it is. `*`: the interval excludes zero."
            ),
        },
    }


def _gap(mean: dict[str, Any], unit: int) -> str:
    value, half = unit * mean["value"], unit * (mean["high"] - mean["low"]) / 2
    digits = 3 if unit == 1 else 1
    return f"{value:+.{digits}f} ± {half:.{digits}f}{' *' if abs(value) > half else ''}"


def shown(facts: dict[str, Any], untuned: dict[str, dict], cells: dict[str, dict]) -> dict:
    """The documentation's table: base and methods at each width, apart and merged."""
    from modicum.evaluate.intervals import over_seeds

    def worded(values: list[float] | None, percent: bool) -> str:
        if values is None:
            return "–"
        measure = over_seeds([100 * value for value in values] if percent else values)
        digits = 1 if percent or measure.value >= 1000 else 2
        if measure.low is None or measure.high is None:
            return f"{measure.value:.{digits}f}"
        return f"{measure.value:.{digits}f} ± {(measure.high - measure.low) / 2:.{digits}f}"

    rows = []
    for place in (place for place in ORDER if place in cells):
        base = untuned[place]
        rows.append([place, "untuned", "", "", worded([base["perplexity"]], False), "", worded([base[facts["score"]]], True), "", "", ""])  # fmt: skip  # noqa: E501
        for method, found in cells[place].items():
            merges = [run["merge"] for run in found["runs"] if "merge" in run]
            forms = {
                name: [series(found, form, name) for form in ("separate", "merged")]
                for name in ("perplexity", facts["score"])
            }
            rows.append(
                [
                    place,
                    method,
                    f"{found['trained_values']:,}",
                    f"{found['learning_rate']:g}",
                    *(worded(values, False) for values in forms["perplexity"]),
                    *(worded(values, True) for values in forms[facts["score"]]),
                    f"{sum(m['lost'] for m in merges) / len(merges):.1%}" if merges else "–",
                    f"{merges[0]['bits_after']:.1f}" if merges else "–",
                ]
            )
    score = facts["score"].replace("_", " ")
    columns = ["bits", "method", "trained", "rate", "perplexity", "merged", f"{score} (%)", "merged"]
    return {
        "columns": [*columns, "effect lost", "bits after"],
        "rows": rows,
        "note": (
            f"{facts['what'][0].upper()}{facts['what'][1:]}; {facts['steps']} steps of {BATCH} rows, groups of "
            f"{facts['group']}. Mean over three seeds ± half of Student's 95 % interval. `effect lost`: distance of "
            "the merged logits from the unmerged ones, over the adapter's effect on them. `bits after`: bits stored "
            "per quantized weight of the merged model, scales and offsets included. Made by "
            "`python benchmarks/quality/quantized.py --shared ../shared --work FOLDER`."
        ),
    }


def write(path: Path, found: dict) -> None:
    """Write a result file."""
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--collect", action="store_true", help="run nothing, write what is complete")
    parser.add_argument(
        "--cell", nargs=2, metavar=("SETTING", "METHOD"), help="run this one in this process ('bases' too)"
    )
    options = parser.parse_args()
    if options.cell:
        setting, method = options.cell
        if method == "bases":
            run_bases(setting, options.shared, options.work)
        else:
            run_method(setting, method, options.shared, options.work)
        return

    def start(cell: tuple[str, str]) -> int:
        command = [sys.executable, __file__, "--shared", str(options.shared), "--work", str(options.work)]
        log = options.work / f"{'-'.join(cell).replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            code = subprocess.run(
                [*command, "--cell", *cell],
                stdout=out,
                stderr=out,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                check=False,
            ).returncode
        print(*cell, "done" if code == 0 else f"failed, see {log}", flush=True)
        return code

    failed, done = False, {}
    for setting in options.settings:
        if not options.collect:
            failed |= start((setting, "bases")) != 0
            with ThreadPoolExecutor(options.workers) as pool:
                failed |= any(
                    list(pool.map(start, [(setting, name) for name in SETTINGS[setting]["methods"]]))
                )
        found = collect(setting, options.work)
        if found is not None:
            done[setting] = found
            write(RESULTS / f"quantized_{setting}.json", found)
            write(RESULTS / "quantized_paired.json", paired_result(done))
    if failed:
        sys.exit("some cells failed; run again to continue")


if __name__ == "__main__":
    main()
