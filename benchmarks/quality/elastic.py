"""Sparse and elastic fine-tuning against plain LoRA: Shears, SQFT's four pipelines, LoNAS.

The stages of `modicum run`, one by one, so that one base serves all arms: `sparsify`, `reorder` and `quantize` make the
bases, `tune` sweeps the learning rate on validation rows and trains three seeds, `search` looks for a sub-network on
validation rows, `merge` and `extract` write the model that ships, which is measured as any user would
load it. Same rows, steps and batch for all. Test rows select nothing.

    python benchmarks/quality/elastic.py --shared ../shared --work /somewhere --workers 2

Interrupted runs go on where they stopped. Results: benchmarks/quality/results/elastic_*.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_arms import (
    ALPHA,
    ARMS,
    BASES,
    BATCH,
    BUDGET,
    DROPOUT,
    JOBS,
    LENGTH,
    LONAS_TRIALS,
    MEASURED,
    RANK,
    RATES,
    SEARCH_ROWS,
    SEEDS,
    SETTINGS,
    SHIPPED_AS,
    TRIALS,
    folder_of,
    forms_of,
    model_of,
)
from elastic_tables import CHOSEN, PAIRED, RESULTS, collect, paired_result
from quantized import data_of, texts_of

from modicum.train import artifacts

if TYPE_CHECKING:
    from collections.abc import Callable


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON object at `path`, made and written if it is not there."""
    found = artifacts.read_json(path)
    if found is None:
        found = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(path, found)
    return found


def make_base(setting: str, base: str, shared: Path, work: Path) -> dict[str, Any]:
    """What the stage says about a base that it makes now."""
    from modicum.compress.quantize import quantize_model
    from modicum.compress.reorder import reorder_model
    from modicum.compress.sparsify import sparsify_model
    from modicum.train.stages import before_options

    stage, source, options = BASES[base]
    facts = SETTINGS[setting]
    values: dict[str, Any] = {"sequence_length": 256, **options}
    if facts["calibration"]:
        values["calibration"] = str(Path(data_of(setting, shared, work)) / facts["calibration"])
    if stage != "reorder":
        values["evaluate"] = False
    if stage == "quantize":
        values |= {"bits": 4, "group_size": 32, "zero_point": "integer", "keep_zeros": True}
        values["exclude"] = facts["exclude"]
    make: Any = {"sparsify": sparsify_model, "reorder": reorder_model, "quantize": quantize_model}[stage]
    target = Path(model_of(setting, base, shared, work))
    target.parent.mkdir(parents=True, exist_ok=True)
    report = make(
        model_of(setting, source, shared, work), target, before_options(stage, values), overwrite=True
    )
    names = ("bits_per_weight", "zeros", "zeros_kept", "calibration_tokens", "seconds", "logit_error")
    return {name: getattr(report, name) for name in names if hasattr(report, name)}


def run_bases(setting: str, shared: Path, work: Path) -> None:
    """All bases of a setting, and what they are worth untuned."""
    for base in ("dense", *BASES):
        folder = work / setting / "bases"
        if base != "dense":
            kept(folder / f"{base}.json", lambda base=base: make_base(setting, base, shared, work))
        model = model_of(setting, base, shared, work)
        kept(
            folder / f"{base}-measured.json",
            lambda model=model: measured_folder(setting, model, shared, work),
        )


def recipe_of(setting: str, arm: str, rates: list[float], shared: Path, work: Path) -> Any:
    """The recipe of the sweep of an arm."""
    from modicum.train.recipe import make_recipe

    facts, arm_facts = SETTINGS[setting], ARMS[arm]
    method = dict(arm_facts["method"])
    if facts["targets"] and arm_facts.get("ship") != "extract":
        method["target_modules"] = facts["targets"]
    space = arm_facts.get("space")
    return make_recipe(
        {
            "model": {
                "name_or_path": model_of(setting, arm_facts["base"], shared, work),
                "dtype": "float32",
            },
            "data": {"train": data_of(setting, shared, work), "max_length": LENGTH, "max_eval_rows": 200},
            "method": method,
            **({"elastic": {"space": facts["space"] if space == "shears" else space}} if space else {}),
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
            "sweep": {"learning_rate": rates, "seeds": SEEDS, "select_on": "first_seed"},
            "output": str(folder_of(setting, arm, work)),
        }
    )


def loaded(setting: str, model: str, adapter: Path | None, shared: Path, work: Path) -> Any:
    """A model with all test rows."""
    from modicum.evaluate.load import load_for_evaluation

    name = None if adapter is None else str(adapter)
    data, overrides = data_of(setting, shared, work), [f"max_length={LENGTH}"]
    return load_for_evaluation(model, data, adapter=name, overrides=overrides, dtype="float32")


def measured(found: Any) -> dict[str, float]:
    """Loss, perplexity, token accuracy and, where rows have a prompt, exact match on the test rows."""
    from modicum.evaluate.run import evaluate

    result = evaluate(found.model, found.tokenizer, found.rows, found.task, batch_size=64, resamples=2)
    return {name: measure.value for name, measure in result.metrics.items()}


def measured_folder(setting: str, model: str, shared: Path, work: Path) -> dict[str, Any]:
    """The test metrics of a model as it lies there, its zeros and bytes."""
    from modicum.models.loading import resolve

    return {
        "metrics": measured(loaded(setting, model, None, shared, work)),
        "bytes": sum(file.stat().st_size for file in Path(resolve(model)).glob("*.safetensors")),
        "sparsity": sparsity(model),
    }


def weights_of(model: str) -> dict[str, Any]:
    """The weights of the linear layers of the transformer layers, low-bit ones dequantized."""
    from torch import nn

    from modicum.models.loading import load_base
    from modicum.quant.base import format_of

    found: dict[str, Any] = {}
    for name, module in load_base(model, dtype="float32").named_modules():
        fmt = format_of(module) if isinstance(module, nn.Linear) and ".layers." in name else None
        if fmt is not None:
            found[name] = fmt.weight(module)
    return found


def sparsity(model: str) -> float:
    """The share of zeros of all those weights."""
    weights = weights_of(model).values()
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def revived(sparse: str, shipped: str) -> int:
    """How many zeros of the sparse model are none in the model that ships."""
    before, after = weights_of(sparse), weights_of(shipped)
    return sum(int(((weight == 0) & (after[name] != 0)).sum()) for name, weight in before.items())


def run_forms(setting: str, arm: str, run: Path, shared: Path, work: Path) -> None:
    """Measure every form of one finished run, with the adapter beside the base and as it ships."""
    facts = ARMS[arm]
    base = model_of(setting, facts["base"], shared, work)
    found = None
    for form in forms_of(arm):
        chosen = None if form == "whole" else sub_network(arm, form, run)
        target = run / f"measured-{form}.json"
        if artifacts.read_json(target) is None:
            found = found or loaded(setting, base, run / artifacts.ADAPTER, shared, work)
            if chosen is not None:
                from modicum.adapters.elastic import Switch

                Switch(found.model).activate(chosen)
            artifacts.write_json(target, {"metrics": measured(found)})
        ships = facts.get("ship") and (form == "searched" or form == forms_of(arm)[0])
        if ships:
            kept(
                run / f"shipped-{form}.json",
                lambda chosen=chosen: shipped(setting, arm, run, chosen, shared, work),
            )


def sub_network(arm: str, form: str, run: Path) -> Any:
    """A sub-network of a finished run by name; searched for when it has to be."""
    from modicum.adapters.elastic import SubNetwork
    from modicum.models.loading import load_adapted, load_base
    from modicum.search.options import SearchOptions
    from modicum.search.space import SearchSpace
    from modicum.train.search import finished_recipe, search_run

    if form == "searched":
        lonas = ARMS[arm]["space"] == "lonas"
        values = {"strategy": "hill", "trials": LONAS_TRIALS if lonas else TRIALS, "max_rows": SEARCH_ROWS}
        options = SearchOptions.model_validate(
            values | ({"budgets": {"parameters": BUDGET}} if lonas else {})
        )
        done = artifacts.read_json(run / "search" / "sub_network.json")
        found = done or search_run(run, options, resume=True).sub_network()
        if found is None:
            sys.exit(f"{arm}: no sub-network of {options.trials} keeps the budget")
        return SubNetwork.read(found)
    recipe = finished_recipe(run)
    model = load_adapted(load_base(recipe.model.name_or_path), run / artifacts.ADAPTER)
    assert recipe.elastic is not None
    space = SearchSpace.of_model(recipe.elastic.space, model)
    return space.sub_network(space.named(form))


def shipped(setting: str, arm: str, run: Path, chosen: Any, shared: Path, work: Path) -> dict[str, Any]:
    """What was measured of a sub-network as one model, merged or extracted."""
    from modicum.compress.extract import extract
    from modicum.compress.merge import merge_to_folder
    from modicum.store.active import with_sub_network

    base = model_of(setting, ARMS[arm]["base"], shared, work)
    aside, target = run / "chosen", run / "shipped"
    texts = texts_of(setting, MEASURED, shared, work)
    for folder in (aside, target):
        shutil.rmtree(folder, ignore_errors=True)
    with_sub_network(run / artifacts.ADAPTER, aside, chosen)
    if ARMS[arm]["ship"] == "merge":
        dtype = "auto" if "int4" in ARMS[arm]["base"] else SHIPPED_AS
        merged = merge_to_folder(base, aside, target, texts=texts, dtype=dtype)
        sparse = model_of(setting, "sparse-50", shared, work)
        about = {
            "logit_error": merged.report.logit_error,
            "revived": revived(sparse, str(target)),
            "bits": merged.bits_after,
        }
    else:
        found = loaded(setting, base, aside, shared, work)
        small = extract(found.model, target, tokenizer=found.tokenizer, dtype=SHIPPED_AS, texts=texts)
        names = ("logit_error", "parameters", "parameters_before", "linear", "linear_before", "stock")
        about = {name: getattr(small, name) for name in names}
    result = about | measured_folder(setting, str(target), shared, work)
    for folder in (aside, target):
        shutil.rmtree(folder)
    return result


def chosen_rate(recipe: Any, factor: float) -> dict[str, Any]:
    """The learning rate of an arm by validation loss: of all rates on one seed, then of the close ones on all seeds."""
    from modicum.train.run import run_one, tune
    from modicum.train.sweep import cell_recipe

    def losses(rate: float) -> list[float]:
        cells = [cell_recipe(recipe, rate, seed) for seed in SEEDS]
        return [run_one(cell, resume=True, use_test=False).metrics["validation"]["loss"] for cell in cells]

    report = tune(recipe, resume=True).report
    first = {e["learning_rate"]: e["runs"][0]["validation"]["loss"] for e in report["learning_rates"]}
    close = [rate for rate, loss in first.items() if loss <= factor * min(first.values())]
    found = {rate: losses(rate) for rate in close}
    best = min(found, key=lambda rate: sum(found[rate]))
    by_rate = {f"{rate:g}": found.get(rate, [loss]) for rate, loss in first.items()}
    return {"learning_rate": best, "validation_loss_by_rate": by_rate}


def run_job(setting: str, arms: list[str], shared: Path, work: Path) -> None:
    """Some arms in this process, on one thread."""
    best: dict[str, float] = {}
    for arm in arms:
        rates = [best[ARMS[arm]["rate"]]] if "rate" in ARMS[arm] else RATES
        recipe = recipe_of(setting, arm, rates, shared, work)
        best[arm] = kept(
            recipe.folder / CHOSEN, lambda recipe=recipe: chosen_rate(recipe, SETTINGS[setting]["close"])
        )["learning_rate"]
        for seed in SEEDS:
            run_forms(setting, arm, recipe.folder / f"lr={best[arm]:g}" / f"seed={seed}", shared, work)
        write(setting, work)


def write(setting: str, work: Path) -> None:
    """Write the result files from all that is measured so far."""
    protocol = {
        "seeds": SEEDS, "rates": RATES, "batch": BATCH, "length": LENGTH, "rank": RANK, "alpha": ALPHA,
        "dropout": DROPOUT, "search_rows": SEARCH_ROWS, "trials": TRIALS, "lonas_trials": LONAS_TRIALS,
        "budget": BUDGET, "shipped_as": SHIPPED_AS, "arms": ARMS, "bases": BASES, **SETTINGS[setting],
        "selection": "learning rates and sub-networks by validation loss",
    }  # fmt: skip
    folders = {arm: folder_of(setting, arm, work) for arm in ARMS}
    forms = {arm: forms_of(arm) for arm in ARMS}
    found = collect(protocol, folders, forms, work / setting / "bases")
    artifacts.write_json(RESULTS / f"elastic_{setting}.json", found)
    done = {name: artifacts.read_json(RESULTS / f"elastic_{name}.json") for name in SETTINGS}
    artifacts.write_json(RESULTS / f"{PAIRED}.json", paired_result({k: v for k, v in done.items() if v}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--collect", action="store_true", help="run nothing, write what is complete")
    parser.add_argument("--job", nargs=2, metavar=("SETTING", "NUMBER"), help="run this one here; -1: bases")
    options = parser.parse_args()
    if options.job:
        import torch

        torch.set_num_threads(1)
        setting, number = options.job[0], int(options.job[1])
        if number < 0:
            run_bases(setting, options.shared, options.work)
        else:
            run_job(setting, JOBS[number], options.shared, options.work)
        return

    def start(job: tuple[str, int]) -> int:
        command = [sys.executable, __file__, "--shared", str(options.shared), "--work", str(options.work)]
        log = options.work / f"{job[0]}-{job[1]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as out:
            code = subprocess.run(
                [*command, "--job", job[0], str(job[1])],
                stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
            ).returncode  # fmt: skip
        print(*job, "done" if code == 0 else f"failed, see {log}", flush=True)
        return code

    failed = False
    for setting in options.settings:
        if not options.collect:
            failed |= start((setting, -1)) != 0
            with ThreadPoolExecutor(options.workers) as pool:
                failed |= any(list(pool.map(start, [(setting, number) for number in range(len(JOBS))])))
        write(setting, options.work)
    if failed:
        sys.exit("some cells failed; run again to continue")


if __name__ == "__main__":
    main()
