"""One recipe on two cores: quantize, tune, merge, export and measure, with `modicum run` as anybody runs it.

The recipe is recipes/qa_lora.yaml, once as it ships, on the bundled task, and once with English novels in place of
that task's rows. What it measures itself is the base, the adapter beside it and the merged model; the exported file
is read back by Transformers' own loader of GGUF files and measured on the same rows here.

    python benchmarks/quality/one_recipe.py --shared ../shared --work /somewhere

Result: benchmarks/quality/results/one_recipe.json, where a run that was not asked for (`--runs`) stays as it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path("recipes") / "qa_lora.yaml"
RESULT = Path(__file__).parent / "results" / "one_recipe.json"
CORES = 2
STAGES = ("quantize", "tune", "merge", "export", "measure")


def changes(shared: Path) -> dict[str, dict[str, Any]]:
    """What is changed of the recipe, by run."""
    books = shared.resolve() / "data" / "books"
    return {
        "notes": {},
        "novels": {
            "data.train": str(books / "train.jsonl.xz"),
            "data.test": str(books / "valid.jsonl.xz"),
            "data.max_rows": 4,
            "data.validation_fraction": 0.1,
            "data.packing": True,
            "data.max_eval_rows": 8,
            "train.max_steps": 40,
        },
    }


def run(name: str, changed: dict[str, Any], work: Path) -> dict[str, Any]:
    """The report of one run, with the seconds of every stage."""
    words = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
    command = [sys.executable, "-m", "modicum", "run", "--config", str(RECIPE), "--json", "--overwrite"]
    command += [f"output={work / name}", "train.report_to=none", *words]
    times, before = [("start", time.perf_counter())], processor_seconds()
    with (
        (work / f"{name}.json").open("w+") as answer,
        subprocess.Popen(command, cwd=ROOT, stdout=answer, stderr=subprocess.PIPE, text=True) as process,
    ):
        assert process.stderr is not None
        for line in process.stderr:
            print(line, end="", file=sys.stderr)
            stage = line.removesuffix(" …\n").partition(" ")[0]
            if line.endswith(" …\n") and stage in STAGES:
                times.append((stage, time.perf_counter()))
    times.append(("end", time.perf_counter()))
    report = json.loads((work / f"{name}.json").read_text())
    if process.returncode:
        sys.exit(f"{name}: {report['error']}")
    spent = itertools.pairwise(times)
    stages = {stage: end - start for (stage, start), (_, end) in spent}
    return {**report, "stages": stages, "processor_seconds": processor_seconds() - before}


def processor_seconds() -> float:
    """What processes that have ended took of processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def exported(folder: Path, changed: dict[str, Any]) -> dict[str, float]:
    """The loss and the perplexity of the exported file on the test rows."""
    import torch
    from transformers import AutoModelForCausalLM

    from modicum.evaluate.load import load_for_evaluation
    from modicum.evaluate.run import evaluate

    kept = [
        f"{key}={json.dumps(changed[key])}"
        for key in ("data.packing", "data.max_eval_rows")
        if key in changed
    ]
    rows = load_for_evaluation(
        str(folder / "merged"),
        changed.get("data.test", "bundled:notes"),
        overrides=["max_length=128", *kept],
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder / "export", gguf_file="gguf.gguf", dtype=torch.float32
    )
    found = evaluate(model, rows.tokenizer, rows.rows, rows.task, exact_match="data.packing" not in changed)
    return {name: measure.value for name, measure in found.metrics.items()}


def told(report: dict[str, Any], file: dict[str, float]) -> dict[str, Any]:
    """What is kept of a run."""
    merge, gguf = report["merge"], report["export"]["gguf"]
    measures = {
        who: {name: measure["value"] for name, measure in found.items()}
        for who, found in report["measure"].items()
    }
    return {
        "seconds": sum(report["stages"].values()),
        "processor_seconds": report["processor_seconds"],
        "seconds_by_stage": report["stages"],
        "bits_per_weight": report["quantize"]["bits_per_weight"],
        "trained_values": report["tune"]["trained_values"],
        "merge": {
            "exact": merge["exact"],
            "logit_error": merge["report"]["logit_error"],
            "effect": merge["report"]["effect"],
            "bits_after": merge["bits_after"],
        },
        "export": {
            "exact": gguf["exact"],
            "max_weight_error": gguf["max_weight_error"],
            "bytes": sum(gguf["files"].values()),
        },
        "measure": {**measures, "exported": file},
    }


def table(runs: dict[str, Any]) -> dict[str, Any]:
    """The documentation's table."""
    rows = [
        [
            name,
            f"{found['seconds']:.0f}",
            f"{found['processor_seconds']:.0f}",
            ", ".join(f"{found['seconds_by_stage'].get(stage, 0):.0f}" for stage in STAGES),
            *(f"{found['measure'][who]['loss']:.4f}" for who in ("base", "adapted", "merged", "exported")),
            f"{found['merge']['logit_error']:.0e}",
        ]
        for name, found in runs.items()
    ]
    return {
        "columns": [
            "text",
            "seconds",
            "of processors",
            "by stage",
            "loss: 4-bit base",
            "adapter apart",
            "merged",
            "GGUF",
            "merge error",
        ],
        "rows": rows,
        "note": (
            f"`{RECIPE.as_posix()}` on {CORES} cores, the embedded model: 4 bits by GPTQ, QA-LoRA, merged, written as "
            "GGUF. `of processors`: seconds they worked, both cores together. `by stage`: "
            f"{', '.join(STAGES)}; the rest is starting. Loss in nats per token on test rows, of the GGUF file as "
            "Transformers reads it. `merge error`: of the logits on validation rows."
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=["notes", "novels"], choices=["notes", "novels"])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(CORES)
    # inherited by what is started from here
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    runs = json.loads(RESULT.read_text(encoding="utf-8"))["runs"] if RESULT.is_file() else {}
    for name in options.runs:
        changed = changes(options.shared)[name]
        load = os.getloadavg()[0]
        found = told(run(name, changed, work), exported(work / name, changed))
        runs[name] = {**found, "load_before": load}
        result = {
            "what": f"one recipe from the dense model to the exported one, on {CORES} cores",
            "command": "python benchmarks/quality/one_recipe.py --shared ../shared --work FOLDER",
            "versions": {
                name: version(name) for name in ("modicum", "torch", "transformers", "peft", "gguf")
            },
            "cores": CORES,
            "runs": runs,
            "table": table(runs),
        }
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {RESULT.name}: {name}")


if __name__ == "__main__":
    main()
