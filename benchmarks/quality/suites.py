"""The bundled suites on a real model of 260,000 parameters: running text, and two sets of questions by lm-eval.

The model tells children's stories and nothing else. It is measured bare, and with a LoRA and a LoRA-XS adapter that
were trained on Shakespeare, one run each at the rates that compare_books.json chose for another text.

    pip install 'modicum[eval]'
    python benchmarks/quality/suites.py --shared ../shared --work /somewhere

What is finished is not run again. Results: benchmarks/quality/results/suites_stories260k.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "suites_stories260k.json"
#: items of each task: windows of 512 tokens, questions
LIMIT = 300
STEPS = 200
#: suite, protocol, tasks and their main metric
SUITES = [
    ("text", "perplexity", ["tinyshakespeare", "tinystories", "wikitext2"], "perplexity"),
    ("commonsense", "lm-eval", ["arc_easy", "winogrande"], "acc"),
]
METHODS = {
    "lora": ({"name": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}, 0.01),
    "lora_xs": ({"name": "lora_xs", "r": 16, "alpha": 32}, 0.003),
}
COMMAND = "python benchmarks/quality/suites.py --shared ../shared --work FOLDER"


def trained(name: str, shared: Path, work: Path) -> dict[str, int]:
    """The trained values of one adapter, which lies in the folder of its name; trained if it was not yet."""
    from modicum.train.recipe import make_recipe
    from modicum.train.run import tune

    options, rate = METHODS[name]
    recipe = make_recipe(
        {
            "model": {"name_or_path": str(shared / "models/stories260k"), "dtype": "float32"},
            "data": {
                "train": str(shared / "data/tinyshakespeare/train.txt.gz"),
                "packing": True,
                "max_length": 128,
            },
            "method": options,
            "train": {
                "max_steps": STEPS,
                "batch_size": 16,
                "learning_rate": rate,
                "scheduler": "cosine",
                "report_to": "none",
                "device": "cpu",
            },
            "output": str(work / name),
        }
    )
    report = recipe.folder / "report.json"
    if not report.is_file():
        tune(recipe, resume=recipe.folder.is_dir())
    return json.loads(report.read_text())["trained_values"]


def measured(adapters: list[str], shared: Path, work: Path) -> dict[str, dict[str, Any]]:
    """The metrics of every task by name of the adapter, "none" for the bare model."""
    from modicum.evaluate.run_suite import run_suite
    from modicum.evaluate.suites import load_suite

    found: dict[str, dict[str, Any]] = {}
    for name, protocol, tasks, _ in SUITES:
        suite = load_suite(name, protocol).only(tasks)
        for names in ([], adapters):
            output = work / "results" / f"{name}-{'adapted' if names else 'bare'}"
            results = run_suite(
                suite,
                str(shared / "models/stories260k"),
                data_dir=shared / "data",
                output=output,
                adapters=[str(work / one) for one in names],
                limit=LIMIT,
                resume=True,
            )
            for one, result in zip(names or ["none"], results, strict=True):
                found.setdefault(one, {}).update(result.as_dict()["tasks"])
    return found


def shown(found: dict[str, dict[str, Any]], values: dict[str, int]) -> dict[str, Any]:
    """The documentation's table: one row for each adapter, and the bare model first."""
    columns = [(task, metric) for *_, tasks, metric in SUITES for task in tasks]
    rows = []
    for name, tasks in found.items():
        cells = []
        for task, metric in columns:
            one = tasks[task]["metrics"][metric]
            scale = 1 if metric == "perplexity" else 100
            low, value, high = (f"{scale * one[key]:.1f}" for key in ("low", "value", "high"))
            cells.append(f"{value} [{low}, {high}]")
        rows.append([name, f"{values.get(name, 0):,}", *cells])
    note = (
        f"stories260k bare and after {STEPS} steps on Shakespeare, one run each. First {LIMIT} windows or questions; "
        f"95 % intervals over these, which say nothing of other seeds. Made by `{COMMAND}`."
    )
    return {
        "columns": ["adapter", "trained values", *(f"{task} ({metric})" for task, metric in columns)],
        "rows": rows,
        "note": note,
    }


def main() -> None:
    import torch
    import transformers

    from modicum import __version__

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    values = {name: trained(name, options.shared, options.work)["adapter"] for name in METHODS}
    found = measured(list(METHODS), options.shared, options.work)
    result = {
        "what": "bundled suites on stories260k, CPU, float32, one thread",
        "command": COMMAND,
        "protocol": {"steps": STEPS, "limit": LIMIT, "methods": METHODS, "suites": SUITES},
        "versions": {
            "modicum": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "trained_values": values,
        "tasks": found,
        "table": shown(found, values),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
