"""The published pipelines as the recipes that ship, one command each, from a dense model to what is deployed.

    python benchmarks/quality/pipelines.py --shared ../shared --work FOLDER [--workers 3]

`notes`: the recipes as they are. `novels`: paragraphs of English novels for data, fewer steps and a smaller search;
nothing else is changed. What was interrupted goes on where it stopped. Result:
benchmarks/quality/results/pipelines.json.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from elastic import kept, revived, sparsity

import modicum
from modicum.train import artifacts
from modicum.train.pipeline import REPORT

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).parent / "results" / "pipelines.json"
COMMAND = "python benchmarks/quality/pipelines.py --shared ../shared --work FOLDER"
#: the slowest first
RECIPES = ("sqft_qa_sparse_peft", "sqft_sparse_peft", "lonas", "sqft", "shears")
TEXTS = ("notes", "novels")
STEPS, TRIALS = 20, 5
#: split -> file of ../shared, the first paragraph taken, and how many
SPLITS = {"train": ("train", 0, 1600), "validation": ("valid", 0, 100), "test": ("valid", 100, 100)}
#: the stage whose folder ships; the others ship the base they were trained on, and the adapter beside it
SHIPPED = {"sqft_qa_sparse_peft": "merged", "sqft_sparse_peft": "merged", "lonas": "extracted"}


def paragraphs(file: Path, first: int, count: int) -> list[str]:
    """Different paragraphs of 80 to 160 characters, evenly from all books of a file."""
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        books = [json.loads(line)["text"].split("\n\n") for line in lines]
    fit = [[text for text in book if 80 <= len(text) <= 160] for book in books]
    mixed = [book[at] for at in range(max(map(len, fit))) for book in fit if at < len(book)]
    return list(dict.fromkeys(mixed))[first : first + count]


def data_of(shared: Path, work: Path) -> list[str]:
    """The overrides that name the novels, which are cut into files on first use."""
    changes = [f"train.max_steps={STEPS}", f"search.trials={TRIALS}"]
    for split, (name, first, count) in SPLITS.items():
        file = work / "novels" / f"{split}.jsonl"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            rows = paragraphs(shared / "data" / "books" / f"{name}.jsonl.xz", first, count)
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), encoding="utf-8")
        changes.append(f"data.{split}={file}")
    return changes


def run(recipe: str, text: str, shared: Path, work: Path) -> None:
    """One recipe on one text, in a process of its own on one thread."""
    folder = work / text / recipe
    changes = data_of(shared, work) if text == "novels" else []
    command = [sys.executable, "-m", "modicum", "run", "--config", str(ROOT / "recipes" / f"{recipe}.yaml")]
    command += ["--json", *(["--resume"] if folder.is_dir() else []), *changes, f"output={folder}"]

    def made() -> dict[str, Any]:
        began = time.monotonic()
        done = subprocess.run(
            [*command, "train.report_to=none"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{recipe} on {text}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        return {"seconds": round(time.monotonic() - began, 1), **judged(recipe, folder)}

    kept(work / text / f"{recipe}.json", made)
    print(f"{recipe} on {text}: done", flush=True)


def judged(recipe: str, folder: Path) -> dict[str, Any]:
    """What a finished run's reports and models say."""
    report = artifacts.read_json(folder / REPORT) or {}
    stages = ("base", "sparse", "reordered")
    trained_on = next(folder / name for name in stages if (folder / name).is_dir())
    shipped = folder / SHIPPED[recipe] if recipe in SHIPPED else trained_on
    found: dict[str, Any] = {
        "measured": report["measure"],
        "sparsity": sparsity(str(shipped)),
        "points": len((artifacts.read_json(folder / "search" / "search.json") or {})["points"]),
    }
    if (folder / "sparse").is_dir():
        found["revived"] = revived(str(folder / "sparse"), str(shipped))
    if recipe in SHIPPED:
        trained, measured = report["measure"]["adapted"], report["measure"][SHIPPED[recipe]]
        names = [name for name in trained if name != "perplexity"]
        found["largest_difference"] = max(abs(trained[n]["value"] - measured[n]["value"]) for n in names)
    if extracted := report.get("extract"):
        found["parameters"] = extracted["parameters"] / extracted["parameters_before"]
    if exported := report.get("export"):
        found["export"] = {
            name: {key: one[key] for key in ("exact", "max_weight_error")} for name, one in exported.items()
        }
    return found


def shown(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The documentation's table."""
    rows = []
    for name, one in found.items():
        text, _, recipe = name.partition("/")
        measured, way = one["measured"], SHIPPED.get(recipe)
        cells = []
        for metric, digits, unit in (("loss", 3, 1), ("exact_match", 1, 100)):
            values = [measured[who].get(metric) for who in ("base", "adapted", *([way] if way else []))]
            cells.append(
                " → ".join(f"{unit * v['value']:.{digits}f}" for v in values) if all(values) else "–"
            )
        same = one.get("largest_difference")
        rows.append(
            [
                text,
                f"`{recipe}`",
                *cells,
                f"{one['sparsity']:.0%}",
                one.get("revived", "–"),
                f"{one['parameters']:.1%}" if "parameters" in one else "–",
                "–" if same is None else f"{same:.0e}",
                f"{one['seconds']:.0f}",
            ]
        )
    return {
        "columns": [
            "text", "recipe", "loss", "exact match (%)", "zeros", "revived", "parameters", "shipped − trained", "s"
        ],
        "rows": rows,
        "note": (
            "The embedded model (5.8M parameters), one seed, `modicum run --config recipes/RECIPE.yaml`. `notes`: the "
            f"recipe as it is; `novels`: {SPLITS['train'][2]:,} short paragraphs of English novels, {STEPS} "
            f"steps, {TRIALS} points searched. On test rows: the base that was trained on → with the adapter "
            "→ the one model that ships, where one does. `revived`: pruned weights that are no zeros in what ships. "
            "`shipped − trained`: the largest difference of any metric but perplexity. Seconds of all stages, one "
            f"thread of a machine with much other work on it. Made by `{COMMAND}`."
        ),
    }  # fmt: skip


def write(work: Path) -> None:
    """Write the result file from all runs that are finished."""
    done = {
        f"{text}/{recipe}": found
        for text in TEXTS
        for recipe in sorted(RECIPES)
        if (found := artifacts.read_json(work / text / f"{recipe}.json"))
    }
    versions = {module.__name__: module.__version__ for module in (modicum, torch, transformers)}
    result = {"what": "the recipes of the published pipelines", "command": COMMAND, "versions": versions}
    artifacts.write_json(
        RESULT,
        {
            **result,
            "novels": {"steps": STEPS, "trials": TRIALS},
            "runs": done,
            "table": shown(done),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--texts", nargs="*", default=list(TEXTS), choices=TEXTS)
    options = parser.parse_args()
    shared, work = options.shared.resolve(), options.work.resolve()
    torch.set_num_threads(1)
    data_of(shared, work)
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [pool.submit(run, recipe, text, shared, work) for text in options.texts for recipe in RECIPES]
    for job in jobs:
        job.result()
    write(work)


if __name__ == "__main__":
    main()
